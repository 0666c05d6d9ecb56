"""How far faqd reaches: every network of public_networks.py from capture to a proved bundle and an engine.

`python -m faqd.benchmarks.studies.coverage --out WORK --json FILE`, in an environment that has the packages of
results/coverage/requirements.txt. Each network has a process of its own, whose record is a file in WORK: the same
command goes on where it was stopped, and tries again what `--again` names.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import torch

from faqd import __version__
from faqd.benchmarks.measure.environment import environment
from faqd.benchmarks.studies.public_networks import Public, public_networks
from faqd.benchmarks.studies.resumable import claim, say
from faqd.command import emit_json, json_option, run
from faqd.errors import UserError
from faqd.files import read_json, write_json

LATE = 900
"""Seconds after which a network is given up."""


def record_of(network: Public, folder: Path, engine: bool, limit: float) -> dict[str, Any]:
    """What became of a network, now or in an earlier run."""
    file = folder / f"{network.name.replace('/', '-')}.json"
    if not file.is_file():
        write_json(file, _tried_apart(network, engine, limit, file.with_suffix(".new")))
    found: dict[str, Any] = read_json(file)
    say(f"{network.name}: {found['reached'] or 'nothing'} reached. {found.get('sentence', '')}")
    return found


def _tried_apart(network: Public, engine: bool, limit: float, written: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "faqd.benchmarks.studies.coverage_network", network.name, "--json", str(written)]
    ended = {"kind": network.kind, "side": network.side, "reached": ""}
    try:
        done = subprocess.run(
            [*command, *["--engine"] * engine],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {**ended, "sentence": f"given up after {limit:.0f} s"}
    if done.returncode == 2:  # no such package, for one: nothing that is the network's
        raise UserError(done.stderr.strip().splitlines()[-1])
    if done.returncode or not written.is_file():
        said = done.stderr.strip().splitlines()[-1:] or [f"ended with {done.returncode}"]
        return {**ended, "sentence": f"the process ended with {done.returncode}: {said[0]}", "traceback": said}
    found: dict[str, Any] = read_json(written)
    written.unlink()
    return found


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Keep a record of each network here.")
@click.option("--only", metavar="REGEX", default="", help="Try the networks whose names this fits.")
@click.option("--again", metavar="REGEX", help="Forget the records of the networks whose names this fits.")
@click.option("--engine/--no-engine", default=True, show_default=True, help="Build TensorRT's engines too.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Try so many at once.")
@click.option("--limit", type=click.FloatRange(1), default=LATE, show_default=True, help="Give one up after seconds.")
@json_option
def command(
    out: Path, only: str, again: str | None, engine: bool, jobs: int, limit: float, json_target: str | None
) -> None:
    networks = {name: network for name, network in public_networks().items() if re.search(only, name)}
    claim(out, {"engine": engine})
    for name in networks:
        if again is not None and re.search(again, name):
            (out / f"{name.replace('/', '-')}.json").unlink(missing_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        records = list(pool.map(lambda network: record_of(network, out, engine, limit), networks.values()))
    result = {
        "what": "public networks at 8/8 without training: capture, student, proved bundle in both flavours, engine",
        "command": shlex.join(["python", "-m", "faqd.benchmarks.studies.coverage", *sys.argv[1:]]),
        "environment": environment(),
        "versions": {"faqd": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "networks": dict(zip(networks, records, strict=True)),
    }
    emit_json(json_target, result)


def main() -> None:
    run(command)


if __name__ == "__main__":
    main()
