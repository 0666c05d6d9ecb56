"""What each part of the method is worth: accuracy of deployed students by loss and bits, over several data seeds.

`python -m faqd.benchmarks.studies.ablation --data digits --out WORK --json FILE`. All students of a seed learn side by
side from one pass of the teacher, with one recipe and the same batches; nothing is chosen on the test set. A finished
cell is a file in WORK/cells: the same command goes on where it was stopped.
"""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from faqd import __version__
from faqd.benchmarks.measure.environment import environment
from faqd.benchmarks.studies.ablation_table import markdown, summary
from faqd.benchmarks.studies.resumable import STUDY, claim, going_on, say, training_seconds
from faqd.command import Finite, emit_json, json_option, run
from faqd.errors import UserError
from faqd.files import read_json, write_json
from faqd.quant import FLOAT_BITS
from faqd.quantize.calibrate import calibrate
from faqd.quantize.config import QuantConfig
from faqd.quantize.outputs import SINGLE, run_batches
from faqd.train.data.options import DataOptions
from faqd.train.distill import distill
from faqd.train.evaluate import BATCH, deployable
from faqd.train.loop.batches import splits_on
from faqd.train.loop.calibration_images import calibration_batches
from faqd.train.loop.distributed import ProcessGroup, process_group
from faqd.train.networks.zoo import check_architecture
from faqd.train.recipes import (
    DistillRecipe,
    TeacherRecipe,
    Training,
    cifar10_teacher,
    digits_teacher,
    distill_default,
    open_training,
)
from faqd.train.run.folder import finished, network_input
from faqd.train.run.lesson import Lesson, lesson_from
from faqd.train.run.student import load_student, new_student, student_source
from faqd.train.teacher import train_teacher

VERSION = 1

LOSSES: dict[str, dict[str, Any]] = {
    "qat": {"label_weight": 1.0, "logit_weight": 0.0, "affinity": "none"},
    "kd-mse": {"logit": "mse", "affinity": "none"},
    "kd-kl": {"logit": "kl", "affinity": "none"},
    "kd-fa": {},
    "kd-ffa": {"affinity": "fast"},
}
"""Method -> what it changes in the recipe, which has the exact L2 affinity and, of the outputs, the mean squared error
from scratch and the relative distance from trained weights. Only qat reads labels."""
FLOAT, PTQ = "float", "ptq"
BITS = ("8/8", "4/4", "2/4", "1/4")
BASELINE = "kd-mse"


@dataclass(frozen=True)
class Study:
    """What is compared on one data set: the teacher, the student's network, how all students are trained.

    threads: on the CPU; a second one only costs where a layer takes microseconds.
    """

    teacher: TeacherRecipe
    arch: str
    training: Training
    seeds: int
    threads: int


STUDIES = {
    # From scratch under a larger teacher.
    "digits": Study(digits_teacher(), "resnet8", open_training(20, 64), 5, 1),
    # From the teacher's own weights, in the time that two cores have for it.
    "cifar10": Study(
        replace(cifar10_teacher(), arch="resnet8", training=replace(cifar10_teacher().training, epochs=10)),
        "resnet8",
        open_training(1, 100, 300),
        3,
        1,
    ),
}


@dataclass(frozen=True)
class Cell:
    """One number of the table: a method, bits as W/A, a seed of data and initialisation."""

    method: str
    bits: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-w{self.bits.replace('/', 'a')}-s{self.seed}"


@dataclass(frozen=True)
class Work:
    """The folder of a study under way, and what all its cells share."""

    folder: Path
    study: Study
    bits: Sequence[str]
    lesson: Lesson

    def cells(self, seed: int) -> list[Cell]:
        trained = [Cell(method, bits, seed) for method, bits in product(LOSSES, self.bits)]
        return [
            Cell(FLOAT, f"{FLOAT_BITS}/{FLOAT_BITS}", seed),
            *[Cell(PTQ, bits, seed) for bits in self.bits],
            *trained,
        ]

    def file(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.name}.json"

    def run(self, cell: Cell) -> Path:
        return self.folder / "students" / cell.name

    @cached_property
    def inputs(self) -> Tensor:
        dataset = self.lesson.dataset
        return network_input(dataset.eval.images, dataset.preprocess)

    @cached_property
    def labels(self) -> Tensor:
        labels = self.lesson.dataset.eval.labels
        assert labels is not None
        return torch.from_numpy(labels)

    @cached_property
    def teacher_outputs(self) -> Tensor:
        return run_batches(self.lesson.teacher.network, self.inputs, BATCH)[SINGLE]

    def accuracy(self, values: Tensor) -> float:
        return round(float((values.argmax(1) == self.labels).float().mean()), 6)


def recipe_of(cell: Cell, study: Study) -> DistillRecipe:
    """The recipe of a cell; float and ptq have the losses of the whole method."""
    weights, activations = map(int, cell.bits.split("/"))
    training = replace(study.training, seed=cell.seed, data_seed=cell.seed)
    base = replace(distill_default(), about=cell.name, arch=study.arch, training=training)
    return replace(base, weight_bits=weights, act_bits=activations, **LOSSES.get(cell.method, {}))


def fill(work: Work, seed: int, processes: ProcessGroup) -> None:
    """Train and measure what is missing of the cells of one seed."""
    cells = work.cells(seed)
    if all(work.file(cell).is_file() for cell in cells):
        return
    trained = [cell for cell in cells if cell.method != PTQ]
    members = [(recipe_of(cell, work.study), work.run(cell)) for cell in trained]
    with going_on(work.folder):
        distill(members, work.lesson, None, resume=True, say=say, processes=processes)
    for cell in cells:
        if not work.file(cell).is_file():
            write_json(work.file(cell), measured(work, cell, work.run(cells[0])))
            say(f"{cell.name}: {100 * read_json(work.file(cell))['accuracy']:.2f} %")


def measured(work: Work, cell: Cell, float_run: Path) -> dict[str, Any]:
    """Accuracy of the deployed student on the eval split, and agreement with the teacher."""
    student = quantized_after_training(work, cell, float_run) if cell.method == PTQ else load_student(work.run(cell))
    values = run_batches(deployable(student), work.inputs, BATCH)[SINGLE]
    agreement = (values.argmax(1) == work.teacher_outputs.argmax(1)).float().mean()
    return {**asdict(cell), "accuracy": work.accuracy(values), "agreement": round(float(agreement), 6)}


def quantized_after_training(work: Work, cell: Cell, float_run: Path) -> Any:
    """The float student of the same seed with quantizers and their scales, as a distillation would start from it."""
    recipe = replace(recipe_of(cell, work.study), init=str(float_run))
    train, _ = splits_on(torch.device("cpu"), work.lesson.dataset)
    example = train.normalised(train.pixels[:2]).contiguous()
    teacher = work.lesson.teacher
    student = new_student(recipe, student_source(recipe.arch, teacher), teacher, example)
    calibrate(student, calibration_batches(train), "mse")
    student.network.eval()
    return student


def seconds_of(work: Work, seed: int) -> float:
    """Of training, all students of a seed together."""
    return max(training_seconds(work.run(cell)) for cell in work.cells(seed) if cell.method != PTQ)


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--data", type=click.Choice(list(STUDIES)), required=True, help="Compare on this data set.")
@click.option("--data-root", type=click.Path(path_type=Path), help="Look for a published data set in this folder.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Keep runs and finished cells here.")
@click.option("--teacher", type=click.Path(path_type=Path), help="Learn from this finished run instead of a new one.")
@click.option("--arch", help="Train students of this network; the teacher's own starts from its weights.")
@click.option("--bits", multiple=True, metavar="W/A", help=f"Compare at these bits, repeatable. [{', '.join(BITS)}]")
@click.option("--steps", type=click.IntRange(1), help="Train every student so many iterations.")
@click.option("--lr", type=Finite(0, min_open=True), help="Use this learning rate at its peak.")
@click.option("--seeds", type=click.IntRange(2), help="Repeat with so many seeds.")
@click.option(
    "--baseline", type=click.Choice([PTQ, *LOSSES]), default=BASELINE, show_default=True, help="Give differences to it."
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Train here."
)
@json_option
def command(
    data: str,
    data_root: Path | None,
    out: Path,
    teacher: Path | None,
    arch: str | None,
    bits: tuple[str, ...],
    steps: int | None,
    lr: float | None,
    seeds: int | None,
    baseline: str,
    device: str,
    json_target: str | None,
) -> None:
    study = STUDIES[data]
    training = replace(study.training, steps=steps or study.training.steps, lr=lr or study.training.lr)
    study = replace(study, arch=arch or study.arch, training=training, seeds=seeds or study.seeds)
    check_architecture(study.arch)
    torch.set_num_threads(study.threads)
    with process_group(device) as processes:
        if processes.size > 1:
            raise UserError("torchrun: this command trains in one process; start it by itself.")
        work = begun(out, study, bits or BITS, data, data_root, teacher, processes)
        for seed in range(study.seeds):
            fill(work, seed, processes)
    cells = [read_json(work.file(cell)) for seed in range(study.seeds) for cell in work.cells(seed)]
    result = {
        "version": VERSION,
        "what": "accuracy of deployed students on the test set, by method and bits",
        "command": shlex.join(["python", "-m", "faqd.benchmarks.studies.ablation", *sys.argv[1:]]),
        "environment": environment(),
        "versions": {"faqd": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if processes.device.type == "cuda" else "cpu",
        "study": read_json(out / STUDY),
        "images": len(work.inputs),
        "teacher_accuracy": work.accuracy(work.teacher_outputs),
        "training_s": [seconds_of(work, seed) for seed in range(study.seeds)],
        "baseline": baseline,
        "table": summary(cells, baseline),
        "cells": cells,
    }
    click.echo(markdown(result), err=json_target == "-")
    emit_json(json_target, result)


def begun(
    out: Path,
    study: Study,
    bits: Sequence[str],
    data: str,
    data_root: Path | None,
    teacher: Path | None,
    processes: ProcessGroup,
) -> Work:
    """The study's folder with its teacher. UserError where the folder holds another study."""
    for pair in bits:
        _refuse_bits(pair)
    options = DataOptions(data, root=data_root)
    if teacher is None:
        teacher = out / "teacher"
        train_teacher(study.teacher, options, teacher, resume=True, say=say, processes=processes)
    lesson = lesson_from(str(teacher), None, asdict(options), with_labels=True, say=say)
    asked = {
        "data": data,
        "teacher": {"recipe": finished(teacher)["recipe"], "sha256": lesson.teacher.sha256},
        "arch": study.arch,
        "training": asdict(replace(study.training, seed=0, data_seed=0)),
        "bits": list(bits),
        "losses": LOSSES,
    }
    claim(out, asked)
    return Work(out, study, bits, lesson)


def _refuse_bits(pair: str) -> None:
    weights, _, activations = pair.partition("/")
    if not (weights.isdecimal() and activations.isdecimal()):
        raise UserError(f"--bits {pair}: expected weights and activations, such as 4/4.")
    QuantConfig(int(weights), int(activations))


def main() -> None:
    run(command)


if __name__ == "__main__":
    main()
