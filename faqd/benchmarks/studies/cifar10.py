"""CIFAR-10 at full length: one teacher, four label-free students on one pass of it, in pieces of minutes.

`python -m faqd.benchmarks.studies.cifar10 --data-root DATA --work WORK` works for `--time-limit` seconds, says that
it paused, and goes on when it is started again; after the last piece RESULTS holds cifar10-resnet20.json and, where
they are small enough, the teacher's weights.
"""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from faqd import __version__
from faqd.benchmarks.measure.environment import environment
from faqd.benchmarks.studies import iteration
from faqd.command import Finite, run
from faqd.errors import Paused
from faqd.files import read_json, write_json
from faqd.train.data.options import DataOptions
from faqd.train.distill import distill
from faqd.train.evaluate import evaluate_run
from faqd.train.loop.distributed import ProcessGroup, process_group
from faqd.train.networks.zoo import check_architecture
from faqd.train.recipes import cifar10_teacher, distill_cifar10
from faqd.train.run.folder import METRICS, NOT_MOVED, WEIGHTS, read_record
from faqd.train.run.lesson import lesson_from
from faqd.train.teacher import train_teacher

VERSION = 1
STUDENTS = ((8, 8), (4, 4), (2, 4), (1, 4))
"""QuantConfig of weights and activations."""
ROUNDS = 10
LARGEST_KEPT = 8_000_000
"""Bytes of teacher weights that are kept beside the record."""


@dataclass(frozen=True)
class Experiment:
    """What is trained: networks of the zoo, the schedule (epochs, or a few steps to rehearse it), where it lies."""

    data_root: Path
    work: Path
    teacher: str
    student: str
    epochs: int
    steps: int | None
    batch_size: int


def produce(
    experiment: Experiment, processes: ProcessGroup, deadline: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Everything that is not done yet, and the record. Paused, with all that was done kept, at the deadline."""
    schedule: dict[str, Any] = {
        "epochs": experiment.epochs,
        "steps": experiment.steps,
        "batch_size": experiment.batch_size,
    }
    teacher_recipe = cifar10_teacher()
    teacher_recipe = replace(
        teacher_recipe, arch=experiment.teacher, training=replace(teacher_recipe.training, **schedule)
    )
    teacher = experiment.work / "teacher"
    train_teacher(
        teacher_recipe, DataOptions("cifar10", root=experiment.data_root), teacher, True, say, processes, deadline
    )
    recipe = distill_cifar10()
    recipe = replace(recipe, arch=experiment.student, training=replace(recipe.training, **schedule))
    members = [
        (replace(recipe, weight_bits=weights, act_bits=activations), experiment.work / f"w{weights}a{activations}-s0")
        for weights, activations in STUDENTS
    ]
    lesson = lesson_from(str(teacher), None, {"root": experiment.data_root}, say=say)
    distill(members, lesson, None, True, say, processes, deadline)
    runs = [teacher, *(out for _, out in members)]
    measured = {out: _kept(out / "eval.json", deadline, partial(evaluate_run, out, NOT_MOVED)) for out in runs}

    def timing() -> dict[str, Any]:
        forms = tuple(iteration.TARGETS)
        return iteration.measure(
            forms, experiment.teacher, experiment.student, experiment.batch_size, ROUNDS, processes.device
        )

    return {
        "version": VERSION,
        "what": f"CIFAR-10: {experiment.teacher} with labels, then {experiment.student} students without, "
        "on one pass of it",
        "environment": environment(),
        "versions": {"faqd": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": torch.cuda.get_device_name(processes.device) if processes.device.type == "cuda" else "CPU",
        "teacher": _entry(teacher, measured[teacher]),
        "students": [_entry(out, measured[out]) for _, out in members],
        "iteration": _kept(experiment.work / "iteration.json", deadline, timing),
    }


def _kept(path: Path, deadline: float, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returned, now or in an earlier piece."""
    if not path.is_file():
        if time.monotonic() >= deadline:
            raise Paused(f"{path.parent}: paused by --time-limit; the same command goes on.")
        write_json(path, make())
    found: dict[str, Any] = read_json(path)
    return found


def _entry(out: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """One run: its recipe with the seeds, the deployed network on the test images, what an epoch took.

    seconds_per_epoch: of training; that of a student is of all students side by side.
    """
    record = read_record(out)
    lines = (out / METRICS).read_text(encoding="utf-8").splitlines()
    return {
        "run": out.name,
        "recipe": record["recipe"],
        "epochs": len(lines),
        "seconds_per_epoch": json.loads(lines[-1])["seconds"] / len(lines),
        **measured,
    }


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--data-root", required=True, type=click.Path(path_type=Path), help="Where cifar-10-batches-py is.")
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Keep runs and checkpoints here.")
@click.option("--results", default="results", show_default=True, type=click.Path(path_type=Path), help="Write here.")
@click.option(
    "--time-limit", default=540.0, show_default=True, type=Finite(0, min_open=True), help="Seconds of one piece."
)
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--teacher", default="resnet110", show_default=True, help="The teacher, a network of the zoo.")
@click.option("--student", default="resnet20", show_default=True, help="The student, a network of the zoo.")
@click.option("--epochs", default=200, show_default=True, type=click.IntRange(1), help="Of each training.")
@click.option("--steps", type=click.IntRange(1), help="Rehearse with so many iterations instead.")
@click.option("--batch-size", default=100, show_default=True, type=click.IntRange(2), help="Images per iteration.")
def command(results: Path, time_limit: float, device: str, **options: Any) -> None:
    deadline = time.monotonic() + time_limit
    experiment = Experiment(**options)
    for name in (experiment.teacher, experiment.student):
        check_architecture(name)
    with process_group(device) as processes:
        made = produce(experiment, processes, deadline, lambda text: click.echo(text, err=True))
    words = shlex.join(["python", "-m", "faqd.benchmarks.studies.cifar10", *sys.argv[1:]])
    results.mkdir(parents=True, exist_ok=True)
    weights = experiment.work / "teacher" / WEIGHTS
    if weights.stat().st_size < LARGEST_KEPT:
        shutil.copyfile(weights, results / f"cifar10-{experiment.teacher}.safetensors")
    write_json(results / f"cifar10-{experiment.student}.json", {"command": words, **made})
    click.echo(f"{results / f'cifar10-{experiment.student}.json'}: written.", err=True)


def main() -> None:
    run(command)


if __name__ == "__main__":
    main()
