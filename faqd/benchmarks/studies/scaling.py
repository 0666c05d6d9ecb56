"""What an iteration of `distill` is made of, how two and four processes share it, and a model of many GPUs.

`python -m faqd.benchmarks.studies.scaling --work FOLDER --json FILE` makes JPEG files of 640 x 480 pixels, times the
parts of an iteration in one process of one thread, then whole iterations under torchrun with gloo. What it says of GPUs
is the model of `faqd.benchmarks.studies.scaling_model`, with assumptions that stand in the record by name.
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
from faqd.benchmarks.studies.large_folder import make_files, make_links
from faqd.benchmarks.studies.scaling_model import Assumed, Parts, tables, to_json
from faqd.command import emit_json, json_option, run
from faqd.errors import UserError
from faqd.train.data.listed_files import listed

VERSION = 1
LINKS, LISTED = 2000, 200_000
"""Files to train on, and those that are listed."""
ASKED = [(1, 64), (8, 64), (64, 64), (8, 512), (64, 4096)]
"""GPUs and the batch that they share: of the predictions."""


def started(asked: dict[str, Any], processes: int, target: Path) -> dict[str, list[float]]:
    module = ["-m", "faqd.benchmarks.studies.scaling_process", json.dumps({**asked, "target": str(target)})]
    line = [sys.executable, *module]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        line = [sys.executable, *torchrun, *module]
    result = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if result.returncode:
        raise UserError(f"{shlex.join(line)}: {result.stderr}")
    found: dict[str, list[float]] = json.loads(target.read_text(encoding="utf-8"))
    least = {name: round(min(values), 4) for name, values in found.items()}
    click.echo(f"{processes} processes, batch {asked['batch']}: {least}", err=True)
    return found


def measure(work: Path, network: str, pixels: int, batch: int, times: int) -> dict[str, Any]:
    files = make_files(work / "files")
    folder, target = make_links(work / "links", files, LINKS), work / "found.json"
    asked = {"folder": str(folder), "network": network, "pixels": pixels, "batch": batch, "times": times}
    whole = started({**asked, "parts": True}, 1, target)
    few = started({**asked, "parts": False, "batch": batch // 4}, 1, target)
    # The least of all: other work on the machine only adds.
    iteration, of_few = min(whole["iteration_cpu"]), min(few["iteration_cpu"])
    # Of two sizes of a batch: what each image takes, and what none of them does.
    each = (iteration - of_few) / (batch - batch // 4)
    decode, teacher, affinity = (min(whole[f"{part}_cpu"]) / batch for part in ("decode", "teacher", "affinity"))
    parts = Parts(
        decode=decode,
        teacher=teacher,
        student=max(0.0, each - decode - teacher - affinity),
        affinity=affinity,
        fixed=max(0.0, iteration - each * batch),
        gradient_bytes=4 * int(whole["parameters"][0]),
    )
    rows = []
    for processes in (1, 2, 4):
        found = whole if processes == 1 else started({**asked, "parts": False}, processes, target)
        row: dict[str, Any] = {"processes": processes, "exchange_s": min(found.get("exchange", [0.0]))}
        for name, clock in (("cpu", "iteration_cpu"), ("wall", "iteration")):
            values = found[clock]
            row[f"{name}_s"] = {"least": min(values), "median": statistics.median(values), "most": max(values)}
        rows.append(row)
    return {**to_json(parts, Assumed()), "measured": rows, "listing": listing(work, files)}


def listing(work: Path, files: list[Path]) -> dict[str, Any]:
    """Seconds to list a folder, and the bytes that stay of each file in every process."""
    folder = make_links(work / "listed", files, LISTED)
    began = time.perf_counter()
    found = listed(folder)
    seconds = time.perf_counter() - began
    # A position in the split, and the orders of two epochs, beside the list.
    held = len(found.encoded.block) + found.encoded.ends.nbytes + found.states.nbytes + 3 * 8 * len(found)
    shutil.rmtree(folder)
    return {"files": LISTED, "seconds": round(seconds, 2), "bytes_a_file": round(held / len(found), 1)}


@click.command(help=(__doc__ or "").splitlines()[0])
@json_option
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Make everything in this folder.")
@click.option("--network", default="resnet18", show_default=True, help="Train this one of the zoo.")
@click.option("--pixels", default=112, show_default=True, type=click.IntRange(32), help="At this size.")
@click.option("--batch", default=16, show_default=True, type=click.IntRange(8), help="So many images an iteration.")
@click.option("--times", default=10, show_default=True, type=click.IntRange(2), help="Iterations that are timed.")
def command(json_target: str | None, work: Path, network: str, pixels: int, batch: int, times: int) -> None:
    torch.set_num_threads(1)
    work.mkdir(parents=True)
    record = {
        "version": VERSION,
        "what": "least seconds of iterations of distillation and of their parts, and assumptions for a model of GPUs",
        "command": shlex.join(["python", "-m", "faqd.benchmarks.studies.scaling", *sys.argv[1:]]),
        "environment": environment(),
        "versions": {"faqd": __version__, "torch": torch.__version__},
        "load": os.getloadavg(),
        "cores": len(os.sched_getaffinity(0)),
        "network": network,
        "pixels": pixels,
        "batch": batch,
        "times": times,
        "asked": ASKED,
        **measure(work, network, pixels, batch, times),
    }
    click.echo(tables(record), err=True)
    emit_json(json_target, record)


def main() -> None:
    run(command)


if __name__ == "__main__":
    main()
