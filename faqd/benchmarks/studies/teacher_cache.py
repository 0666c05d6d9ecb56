"""What a cached teacher saves: iterations of distillation with it and without, on one network of a list.

`python -m faqd.benchmarks.studies.teacher_cache NETWORKS.json --network NAME --work FOLDER --json FILE`. NETWORKS.json
is that of `faqd.benchmarks.studies.defaults`. Both ways run in turn in one process, on the same student, each image as
it is (`--views 1`).
"""

from __future__ import annotations

import os
import shlex
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from faqd import __version__
from faqd.benchmarks.measure.environment import environment
from faqd.benchmarks.studies.defaults import lesson_of
from faqd.benchmarks.studies.one_iteration import TOTAL, prepared, timed
from faqd.benchmarks.studies.resumable import say
from faqd.command import emit_json, json_option, run
from faqd.files import read_json
from faqd.train.loop.batches import splits_on
from faqd.train.loop.distributed import ProcessGroup
from faqd.train.loop.teacher_cache import RECORD, TeacherCache, facts_of, written_cache

VERSION = 1


def measure(entry: dict[str, Any], folder: Path, work: Path, batch: int, times: int) -> dict[str, Any]:
    lesson, processes = lesson_of(entry, folder), ProcessGroup()
    train, _ = splits_on(processes.device, lesson.dataset, 1)
    (work / "run").mkdir(exist_ok=True)
    teacher = lesson.teacher
    trainer, batches, taps = prepared(teacher.network, teacher.source, train, batch, work / "run", processes)
    assert batches.teacher is not None
    facts = facts_of(teacher.source.to_json(), teacher.sha256, "fp32", train, taps)
    began = time.perf_counter()
    place = written_cache(work / "cache", facts, train, batches.teacher, batches, trainer.job.training, say)
    written, cache = time.perf_counter() - began, TeacherCache(place, processes.device)
    ways = {"plain": batches, "cached": replace(batches, cache=cache)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}

    def both(number: int) -> None:
        for way, of_way in ways.items():
            began = time.perf_counter()
            trainer.step(of_way.at(number), TOTAL)
            seconds[way].append(time.perf_counter() - began)

    timed(both, times)
    record = read_json(place / RECORD)
    return {
        "images": record["images"],
        "cache_bytes": record["bytes"],
        "maps_moved": record["maps_moved"],
        "written_s": round(written, 1),
        "seconds": {way: [round(each, 3) for each in found[-times:]] for way, found in seconds.items()},
        "median_s": {way: round(statistics.median(found[-times:]), 3) for way, found in seconds.items()},
        "least_s": {way: round(min(found[-times:]), 3) for way, found in seconds.items()},
    }


@click.command(help=(__doc__ or "").splitlines()[0])
@click.argument("networks", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@json_option
@click.option("--network", required=True, help="Take this one of them.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Keep the cache in this folder.")
@click.option("--batch", default=8, show_default=True, type=click.IntRange(2), help="So many images an iteration.")
@click.option("--times", default=12, show_default=True, type=click.IntRange(2), help="Iterations timed of each way.")
def command(networks: Path, json_target: str | None, network: str, work: Path, batch: int, times: int) -> None:
    work.mkdir(parents=True)
    result = {
        "version": VERSION,
        "what": "seconds of an iteration of distillation at 4/4 with the teacher and with its cache, in turn",
        "command": shlex.join(["python", "-m", "faqd.benchmarks.studies.teacher_cache", *sys.argv[1:]]),
        "environment": environment(),
        "versions": {"faqd": __version__, "torch": torch.__version__},
        "load": os.getloadavg(),
        "threads": torch.get_num_threads(),
        "network": network,
        "batch": batch,
        "times": times,
        **measure(read_json(networks)[network], networks.parent, work, batch, times),
    }
    click.echo(f"{result['least_s']}, {result['median_s']}", err=True)
    emit_json(json_target, result)


def main() -> None:
    run(command)


if __name__ == "__main__":
    main()
