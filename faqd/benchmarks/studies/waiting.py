"""How long a short training takes alone and beside another, by how the threads of torch's OpenMP runtime wait.

`python -m faqd.benchmarks.studies.waiting --json FILE` starts `faqd-train distill` on the digits, one process alone
and two at once on the same cores, with each way to wait in turn.
"""

from __future__ import annotations

import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

from faqd import __version__
from faqd.benchmarks.measure.environment import environment
from faqd.command import SPINS, emit_json, json_option, run
from faqd.errors import UserError

VERSION = 1
WAYS: dict[str, dict[str, str]] = {
    "as the runtime has it": {"GOMP_SPINCOUNT": "300000"},
    "asleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    f"{SPINS} spins, faqd's own": {"GOMP_SPINCOUNT": str(SPINS)},
}
"""The first is what libgomp documents for a variable that is not set."""


def seconds(arguments: list[str], folder: Path, way: dict[str, str], at_once: int) -> float:
    """Of `at_once` trainings started together, until the last has ended."""
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    started = time.perf_counter()
    running = [
        subprocess.Popen(
            [*arguments, "--out", str(folder / str(index))],
            env=kept | way,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for index in range(at_once)
    ]
    codes = [process.wait() for process in running]
    if any(codes):
        raise UserError(f"{shlex.join(arguments)}: ended with an error.")
    return time.perf_counter() - started


def measure(steps: int, rounds: int) -> list[dict[str, Any]]:
    trained = [sys.executable, "-m", "faqd.train"]
    rows: list[dict[str, Any]] = [{"way": way, "environment": WAYS[way], "alone_s": [], "two_s": []} for way in WAYS]
    with tempfile.TemporaryDirectory() as name:
        teacher = Path(name) / "teacher"
        made = [*trained, "teacher", "--recipe", "digits-teacher", "--epochs", "1", "--out", str(teacher)]
        subprocess.run(made, check=True, capture_output=True)
        student = [*trained, "distill", "--recipe", "digits", "--teacher", str(teacher), "--steps", str(steps)]
        for _ in range(rounds):
            for row in rows:
                for key, at_once in (("alone_s", 1), ("two_s", 2)):
                    with tempfile.TemporaryDirectory() as out:
                        row[key].append(seconds(student, Path(out), row["environment"], at_once))
    return rows


@click.command(help=(__doc__ or "").splitlines()[0])
@json_option
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1), help="Iterations of each training.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="How often all ways run.")
def command(json_target: str | None, steps: int, rounds: int) -> None:
    rows = measure(steps, rounds)
    for row in rows:
        alone, two = (statistics.median(row[key]) for key in ("alone_s", "two_s"))
        click.echo(f"{row['way']}: {alone:.1f} s alone, {two:.1f} s beside another (medians of {rounds})", err=True)
    result = {
        "version": VERSION,
        "what": "faqd-train distill on digits: seconds of a process with its start, alone and with a second one",
        "command": shlex.join(["python", "-m", "faqd.benchmarks.studies.waiting", *sys.argv[1:]]),
        "environment": environment(),
        "versions": {"faqd": __version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "steps": steps,
        "ways": rows,
    }
    emit_json(json_target, result)


def main() -> None:
    run(command)


if __name__ == "__main__":
    main()
