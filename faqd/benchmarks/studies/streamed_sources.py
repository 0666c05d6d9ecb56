"""How soon and in how much memory `faqd-train distill` goes on the same images from each kind of streamed source.

`python -m faqd.benchmarks.studies.streamed_sources --work FOLDER --json FILE` writes JPEG files of noise over waves as
a folder, tar files, tables and an array, and trains a student of a network that hardly computes anything on each, the
index of what has one included.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from faqd import __version__
from faqd.benchmarks.measure.environment import environment
from faqd.benchmarks.studies.large_folder import BATCH, PIXELS, make_files, make_links, make_network, trained
from faqd.command import emit_json, json_option, run
from faqd.preprocess import Preprocess
from faqd.train.data.decode import read_picture

VERSION = 1
PER_FILE, PER_GROUP = 1000, 100
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parts(files: list[Path], count: int) -> Iterator[tuple[int, list[tuple[str, bytes]]]]:
    """Names and contents of so many images, PER_FILE at a time."""
    contents = [file.read_bytes() for file in files]
    for start in range(0, count, PER_FILE):
        numbers = range(start, min(start + PER_FILE, count))
        yield start, [(f"{number:07}.jpg", contents[number % len(contents)]) for number in numbers]


def write_folder(folder: Path, files: list[Path], count: int) -> str:
    return f"folder:{make_links(folder, files, count)}"


def write_shards(folder: Path, files: list[Path], count: int) -> str:
    for start, images in parts(files, count):
        with tarfile.open(folder / f"{start:07}.tar", "w") as tar:
            for name, content in images:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return f"shards:{folder}/*.tar"


def table_of(images: list[tuple[str, bytes]]) -> pa.Table:
    return pa.table({"image": pa.array([{"bytes": content, "path": name} for name, content in images], IMAGE)})


def write_parquet(folder: Path, files: list[Path], count: int) -> str:
    for start, images in parts(files, count):
        pq.write_table(table_of(images), folder / f"{start:07}.parquet", row_group_size=PER_GROUP)
    return f"parquet:{folder}/*.parquet"


def write_arrow(folder: Path, files: list[Path], count: int) -> str:
    for start, images in parts(files, count):
        table = table_of(images)
        with pa.ipc.new_stream(folder / f"{start:07}.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=PER_GROUP)
    return f"arrow:{folder}/*.arrow"


def write_npy(folder: Path, files: list[Path], count: int) -> str:
    preprocess = Preprocess(PIXELS, PIXELS, (0.0,) * 3, (1.0,) * 3)
    decoded = np.stack([preprocess.fit(read_picture(file).pixels) for file in files])
    path = folder / "images.npy"
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (count, PIXELS, PIXELS, 3))
    for start in range(0, count, len(files)):
        array[start : start + len(files)] = decoded[: count - start]
    return f"npy:{path}"


WRITERS: dict[str, Callable[[Path, list[Path], int], str]] = {
    "folder": write_folder,
    "shards": write_shards,
    "parquet": write_parquet,
    "arrow": write_arrow,
    "npy": write_npy,
}


def measure(work: Path, count: int, kinds: list[str], workers: int, steps: int) -> list[dict[str, Any]]:
    network, files = make_network(work), make_files(work / "files")
    rows: list[dict[str, Any]] = []
    for kind in kinds:
        folder = work / kind
        folder.mkdir()
        source = WRITERS[kind](folder, files, count)
        data = ["--data", source, "--image-size", str(PIXELS), "--mean", "none", "--std", "none"]
        length = ["--batch-size", str(BATCH), "--steps", str(steps), "--workers", str(workers)]
        cost = trained(["distill", *network, *data, *length, "--out", str(work / "run")])
        ended = json.loads((work / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        training = {"iterations": steps, "seconds": ended["seconds"], "waited": ended["waited"]}
        row: dict[str, Any] = {"source": kind, "images": count, "workers": workers, **cost, "training": training}
        rows.append(row)
        click.echo(json.dumps(row), err=True)
        shutil.rmtree(folder)
        shutil.rmtree(work / "run")
    return rows


@click.command(help=(__doc__ or "").splitlines()[0])
@json_option
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Make everything in this folder.")
@click.option("--images", default=20_000, show_default=True, type=click.IntRange(10_001), help="So many of each.")
@click.option("--source", "kinds", multiple=True, type=click.Choice(list(WRITERS)), default=tuple(WRITERS))
@click.option("--workers", default=1, show_default=True, type=click.IntRange(0), help="So many that decode.")
@click.option("--steps", default=20, show_default=True, type=click.IntRange(2), help="Iterations of each training.")
def command(json_target: str | None, work: Path, images: int, kinds: tuple[str, ...], workers: int, steps: int) -> None:
    work.mkdir(parents=True)
    result = {
        "version": VERSION,
        "what": "faqd-train distill on each kind of streamed source: seconds, and memory of all its processes",
        "command": shlex.join(["python", "-m", "faqd.benchmarks.studies.streamed_sources", *sys.argv[1:]]),
        "environment": environment(),
        "versions": {"faqd": __version__, "torch": torch.__version__, "pyarrow": pa.__version__},
        "load": os.getloadavg(),
        "pixels": PIXELS,
        "batch": BATCH,
        "rows": measure(work, images, list(kinds), workers, steps),
    }
    emit_json(json_target, result)


def main() -> None:
    run(command)


if __name__ == "__main__":
    main()
