"""What `ptq`, `distill` and `export` take in time and memory, each as a process of its own.

`python -m faqd.benchmarks.studies.costs --json FILE` runs the three on networks of the zoo with random, calm
weights and made pictures: neither weights nor pictures change what a command costs.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from faqd import __version__
from faqd.benchmarks.measure.environment import environment
from faqd.benchmarks.studies.calm_weights import enliven, pictures, settle
from faqd.command import emit_json, json_option, run
from faqd.errors import UserError
from faqd.preprocess import Preprocess
from faqd.train.networks.zoo import build_architecture

VERSION = 1
NETWORKS = {"resnet20": 32, "resnet18": 224}
"""Of the zoo, with the side of their images in pixels."""
IMAGES, CLASSES, SETTLED = 256, 10, 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LOOK_EVERY_S = 0.05
SHORT = 2
"""Iterations of the run that is taken off a longer one, so that one iteration is left and no start."""


def cost(arguments: list[str], folder: Path) -> dict[str, float]:
    """Wall-clock seconds and the peak of the resident memory of a command.

    The kernel's ru_maxrss would not do: it counts what the parent held when it started the command.
    """
    started = time.perf_counter()
    log = folder / "log.txt"
    with log.open("w") as stream:
        process = subprocess.Popen([sys.executable, "-m", *arguments], cwd=folder, stdout=stream, stderr=stream)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _peak_kib(process.pid))
            time.sleep(LOOK_EVERY_S)
    if process.returncode:
        raise UserError(f"{shlex.join(arguments)}: ended with an error: {log.read_text().splitlines()[-1]}")
    return {"seconds": round(time.perf_counter() - started, 1), "peak_mib": peak // 1024}


def _peak_kib(process: int) -> int:
    """The high-water mark of a process so far; 0 where it has none any more."""
    try:
        found = re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0


def lay_out(folder: Path, name: str, side: int) -> list[str]:
    """A network, its weights and pictures in a folder; the options that name them."""
    made = pictures(side, IMAGES, seed=0)
    np.savez(folder / "images.npz", images=made)
    torch.manual_seed(0)
    network = build_architecture(name, 3, CLASSES, side).eval()
    enliven(network)
    settle(network, torch.from_numpy(Preprocess(side, side, MEAN, STD).normalise(made[:SETTLED])))
    torch.save(network.state_dict(), folder / "best.pth")
    (folder / "net.py").write_text(
        "from faqd.train.networks.zoo import build_architecture\n\n\n"
        f"def build():\n    return build_architecture({name!r}, 3, {CLASSES}, {side})\n"
    )
    mean, std = (",".join(map(str, values)) for values in (MEAN, STD))
    network_options = ["--teacher", "net.py:build", "--teacher-weights", "best.pth"]
    return [*network_options, "--data", "npz:images.npz", "--mean", mean, "--std", std]


def measured(name: str, side: int, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        options = lay_out(folder, name, side)
        ptq = cost(["faqd.deploy", "ptq", *options, "--out", "bundle"], folder)
        short, longer = (
            cost(["faqd.train", "distill", *options, "--steps", str(n), "--out", f"run{n}"], folder)
            for n in (SHORT, SHORT + steps)
        )
        export = cost(["faqd.deploy", "export", f"run{SHORT + steps}", "--out", "trained"], folder)
    return {
        "network": name,
        "pixels": side,
        "ptq": ptq,
        "distill_start": short,
        "iteration_s": round((longer["seconds"] - short["seconds"]) / steps, 3),
        "distill_peak_mib": longer["peak_mib"],
        "export": export,
    }


@click.command(help=(__doc__ or "").splitlines()[0])
@json_option
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1), help="Iterations that are timed.")
def command(json_target: str | None, steps: int) -> None:
    rows = []
    for name, side in NETWORKS.items():
        rows.append(measured(name, side, steps))
        click.echo(f"{name}: {rows[-1]}", err=True)
    result = {
        "version": VERSION,
        "what": "seconds and peak memory of commands, each with its start; distill_start has two iterations",
        "command": shlex.join(["python", "-m", "faqd.benchmarks.studies.costs", *sys.argv[1:]]),
        "environment": environment(),
        "versions": {"faqd": __version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "images": IMAGES,
        "networks": rows,
    }
    emit_json(json_target, result)


def main() -> None:
    run(command)


if __name__ == "__main__":
    main()
