"""How soon, in how much memory and how steadily `faqd-train distill` goes on folders of few images and of very many.

`python -m faqd.benchmarks.studies.large_folder --work FOLDER --json FILE` makes JPEG files of noise over waves, links
them under as many names as asked for, and trains a student of a network that hardly computes anything, 64 images of
224 pixels an iteration. FOLDER has to be on a file system with hard links.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from faqd import __version__
from faqd.benchmarks.measure.environment import environment
from faqd.command import emit_json, json_option, run
from faqd.errors import UserError

VERSION = 1
FILES = 300
"""Of these all names are links."""
PIXELS, BATCH = 224, 64
NET = """
from torch import nn


def build():
    first = nn.Conv2d(3, 8, 3, stride=4, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    second = nn.Conv2d(8, 16, 3, stride=4, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
"""
SAMPLE_EVERY_S = 0.5


def make_files(folder: Path) -> list[Path]:
    """Photographs of 640 x 480 as to their size and the time that they take to decode."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[0:480, 0:640]
    for number in range(FILES):
        draw = np.random.default_rng(number)
        slopes, offsets = draw.uniform(0.005, 0.06, (3, 2)), draw.uniform(0, 6, 3)
        waves = [np.sin(a * rows + b * columns + c) for (a, b), c in zip(slopes, offsets, strict=True)]
        pixels = 127 + 100 * np.stack(waves, -1) + draw.normal(0, 8 + number % 7, (480, 640, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=85)
    return sorted(folder.iterdir())


def make_links(folder: Path, files: list[Path], count: int) -> Path:
    for number, file in zip(range(count), itertools.cycle(files)):
        if number % 1000 == 0:
            below = folder / f"{number // 1000:05}"
            below.mkdir(parents=True, exist_ok=True)
        os.link(file, below / f"{number:07}.jpg")
    return folder


def make_network(folder: Path) -> list[str]:
    (folder / "net.py").write_text(NET, encoding="utf-8")
    names: dict[str, Any] = {}
    exec(compile(NET, "net.py", "exec"), names)
    torch.manual_seed(0)
    network = names["build"]()
    for _ in range(20):
        network(torch.randn(16, 3, PIXELS, PIXELS))
    torch.save(network.state_dict(), folder / "net.pth")
    return ["--teacher", f"{folder / 'net.py'}:build", "--teacher-weights", str(folder / "net.pth")]


def trained(arguments: list[str]) -> dict[str, Any]:
    """Seconds by the clock and of all CPUs, and the most memory that the command and its processes had together."""
    before, began, most = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic(), 0.0
    with subprocess.Popen(
        [sys.executable, "-m", "faqd.train", *arguments], stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None:
            most = max(most, sum(map(_mib, _tree(process.pid))))
            time.sleep(SAMPLE_EVERY_S)
        assert process.stderr is not None
        said = process.stderr.read()
    if process.returncode:
        raise UserError(f"{shlex.join(arguments)}: {said}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(time.monotonic() - began, 1), "cpu_seconds": round(cpu, 1), "mib": round(most)}


def _tree(pid: int) -> list[int]:
    try:
        lines = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    return [pid, *(below for child in " ".join(lines).split() for below in _tree(int(child)))]


def _mib(pid: int) -> float:
    """Of a process, and its share of what it has in common with others."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:  # it has ended
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def measure(work: Path, counts: list[int], workers: list[int], steps: int) -> list[dict[str, Any]]:
    network, files = make_network(work), make_files(work / "files")
    rows: list[dict[str, Any]] = []
    for count in counts:
        folder = make_links(work / str(count), files, count)
        data = ["--data", f"folder:{folder}", "--image-size", str(PIXELS), "--mean", "none", "--std", "none"]
        line = [
            "distill",
            *network,
            *data,
            "--batch-size",
            str(BATCH),
            "--steps",
            str(steps),
            "--out",
            str(work / "run"),
        ]
        for number in workers:
            pieces = {}
            for piece, more in (("first", ["--time-limit", "0.001"]), ("whole", [])):
                shutil.rmtree(work / "run", ignore_errors=True)
                pieces[piece] = trained([*line, "--workers", str(number), *more])
            ended = json.loads((work / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
            training = {"iterations": steps, "seconds": ended["seconds"], "waited": ended.get("waited")}
            rows.append({"images": count, "workers": number, **pieces, "training": training})
            click.echo(json.dumps(rows[-1]), err=True)
        shutil.rmtree(folder)
    return rows


@click.command(help=(__doc__ or "").splitlines()[0])
@json_option
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Make everything in this folder.")
@click.option("--images", multiple=True, type=int, default=(1000, 1_000_000), show_default=True, help="So many names.")
@click.option("--workers", multiple=True, type=int, default=(0, 1, 2), show_default=True, help="So many that decode.")
@click.option("--steps", default=30, show_default=True, type=click.IntRange(2), help="Iterations of each training.")
def command(json_target: str | None, work: Path, images: tuple[int, ...], workers: tuple[int, ...], steps: int) -> None:
    work.mkdir(parents=True)
    result = {
        "version": VERSION,
        "what": "faqd-train distill on folders: until the first iteration has ended, and a short training",
        "command": shlex.join(["python", "-m", "faqd.benchmarks.studies.large_folder", *sys.argv[1:]]),
        "environment": environment(),
        "versions": {"faqd": __version__, "torch": torch.__version__},
        "load": os.getloadavg(),
        "pixels": PIXELS,
        "batch": BATCH,
        "rows": measure(work, list(images), list(workers), steps),
    }
    emit_json(json_target, result)


def main() -> None:
    run(command)


if __name__ == "__main__":
    main()
