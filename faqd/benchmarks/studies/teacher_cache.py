"""What a cached teacher saves: an iteration of `distill` with it and without, on one network of a list.

`python -m faqd.benchmarks.studies.teacher_cache NETWORKS.json --network NAME --work FOLDER --json FILE`. NETWORKS.json
is that of `faqd.benchmarks.studies.defaults`. Each run is a process of its own, those with a cache and those without in
turn; the first with one writes it. Seconds are those of training alone, without the start.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

from faqd import __version__
from faqd.benchmarks.measure.environment import environment
from faqd.command import emit_json, json_option, run
from faqd.errors import UserError
from faqd.files import read_json

VERSION = 1
PATHS = ("data", "data_root")
"""Options of an entry that name places."""


def options_of(entry: dict[str, Any], folder: Path) -> list[str]:
    """The options of `faqd-train distill` for an entry, whose paths are relative to `folder`."""
    file, _, name = str(entry["teacher"]).rpartition(":")
    found = ["--teacher", f"{folder / file}:{name}", "--teacher-weights", str(folder / entry["weights"])]
    for option, value in entry["data"].items():
        kind, colon, where = value.partition(":")
        value = f"{kind}:{folder / where}" if colon and option in PATHS else value
        found += [f"--{option.replace('_', '-')}", str(folder / value) if option == "data_root" else value]
    return found


def trained(arguments: list[str], out: Path) -> dict[str, Any]:
    """Seconds of the command and of its training, and the losses of its first and last epoch."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    line = [sys.executable, "-m", "faqd.train", "distill", *arguments, "--out", str(out)]
    result = subprocess.run(line, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"{shlex.join(line)}: {result.stderr}")
    lines = [json.loads(text) for text in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = ("seconds", "logit_loss", "affinity_loss", "select_logit_loss")
    return {
        "command_s": round(time.monotonic() - began, 1),
        "training_s": lines[-1]["seconds"],
        "last": {name: lines[-1][name] for name in kept},
    }


def measure(options: list[str], work: Path, steps: int, rounds: int) -> dict[str, Any]:
    cache = work / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    line = [*options, "--views", "1", "--steps", str(steps)]
    ways: dict[str, list[str]] = {"plain": [], "cached": ["--cache-teacher", str(cache)]}
    writing = trained([*line, *ways["cached"]], work / "run")
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, more in ways.items():
            runs[way].append(trained([*line, *more], work / "run"))
            click.echo(f"{way}: {runs[way][-1]}", err=True)
    (record,) = cache.glob("*/cache.json")
    facts = read_json(record)
    return {
        "images": facts["images"],
        "cache_bytes": facts["bytes"],
        "maps_moved": facts["maps_moved"],
        "writing_run": writing,
        "runs": runs,
        "iteration_s": {
            way: round(statistics.median(each["training_s"] for each in found) / steps, 3)
            for way, found in runs.items()
        },
    }


@click.command(help=(__doc__ or "").splitlines()[0])
@click.argument("networks", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@json_option
@click.option("--network", required=True, help="Take this one of them.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Keep runs and cache in this folder.")
@click.option("--bits", default="4/4", show_default=True, help="Train a student of these bits, W/A.")
@click.option("--steps", default=26, show_default=True, type=click.IntRange(2), help="Iterations of each training.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="How often both ways run.")
def command(
    networks: Path, json_target: str | None, network: str, work: Path, bits: str, steps: int, rounds: int
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    weights, activations = bits.split("/")
    options = [*options_of(read_json(networks)[network], networks.parent), "--weight-bits", weights]
    result = {
        "version": VERSION,
        "what": "faqd-train distill with and without --cache-teacher: seconds of training, without the start",
        "command": shlex.join(["python", "-m", "faqd.benchmarks.studies.teacher_cache", *sys.argv[1:]]),
        "environment": environment(),
        "versions": {"faqd": __version__, "torch": torch.__version__},
        "load": os.getloadavg(),
        "threads": torch.get_num_threads(),
        "network": network,
        "bits": bits,
        "steps": steps,
        **measure([*options, "--act-bits", activations], work, steps, rounds),
    }
    emit_json(json_target, result)


def main() -> None:
    run(command)


if __name__ == "__main__":
    main()
