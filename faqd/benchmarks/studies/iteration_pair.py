"""The product's own iteration and the straightforward one, on copies of one student."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from faqd.benchmarks.studies.iteration_baseline import Mark, Straightforward
from faqd.quantize.calibrate import calibrate
from faqd.quantize.capture.capture import capture
from faqd.quantize.config import QuantConfig
from faqd.quantize.prepare import insert_quantizers
from faqd.quantize.student import Student
from faqd.train.data.datasets import Augmentation
from faqd.train.loop.accumulate import Losses
from faqd.train.loop.batches import Batch, Batches, Images, Target
from faqd.train.loop.distributed import ProcessGroup
from faqd.train.loop.teacher_forward import target_of
from faqd.train.loop.trainer import Trainer, settle_norms
from faqd.train.losses.objective import distill_job
from faqd.train.losses.taps import tap_pairs
from faqd.train.networks.source import NetworkSource
from faqd.train.recipes import DistillRecipe, TeacherDtype, Training
from faqd.train.run.plan import Plan

BITS = 4
CLASSES = 10
PIXELS = 32
IMAGES = 1000
TOTAL = 100_000
"""Iterations of the schedule that is pretended: the rate stays where it is."""
TEACHER_DTYPES: tuple[TeacherDtype, ...] = ("fp32", "bf16")


@dataclass
class Pair:
    """The product's own iteration on one student, and the straightforward one on a copy of it."""

    ours: dict[TeacherDtype, Callable[[Mark], Trainer]]
    straightforward: Callable[[Mark], Straightforward]


def pair_of(
    form: str, teacher: str, student: str, batch_size: int, device: torch.device, folder: Path, dtype: torch.dtype
) -> Pair:
    """Random networks with settled batch norm on random images; `dtype` is that of all weights and inputs."""
    torch.manual_seed(0)
    source = NetworkSource(3, (PIXELS, PIXELS), CLASSES, architecture=student)
    big = replace(source, architecture=teacher).build().to(device)
    pixels = torch.randint(0, 256, (IMAGES, 3, PIXELS, PIXELS), dtype=torch.uint8).to(device)
    # Pixels of mean 0 and deviation 1, as after the usual normalisation.
    scale, offset = (torch.full((1, 3, 1, 1), v, dtype=dtype, device=device) for v in (1 / 73.9, -127.5 / 73.9))
    images = Images(pixels, None, scale, offset, Augmentation(pad=4, flip=True))
    training = Training(1, batch_size, 0.01, clip_norm=20.0, frozen_norm=0.0)
    settle_norms(big, replace(images, scale=scale.float(), offset=offset.float(), pixels=pixels[:200]), training)
    example = torch.zeros(2, 3, PIXELS, PIXELS)
    traced = capture(big.cpu(), example)
    learner = insert_quantizers(capture(source.build(), example), QuantConfig(BITS, BITS), example)
    calibrate(learner, [images.normalised(pixels[:128]).cpu().float()], "mse", batch_statistics=True)
    traced.to(device, dtype)
    learner.network.to(device, dtype)
    pairs = tap_pairs(traced, learner, None)
    recipe = DistillRecipe("", training, weight_bits=BITS, act_bits=BITS, affinity=form)  # type: ignore[arg-type]
    names = [theirs for theirs, _ in pairs]

    def ours(teacher_dtype: TeacherDtype) -> Callable[[Mark], Trainer]:
        copied = Student(
            copy.deepcopy(learner.network), learner.config, learner.taps, learner.float_network, learner.islands
        )
        copied.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        job = distill_job(Plan(recipe, folder, source, {}), copied, pairs)
        target, mark = target_of(traced, names, device, teacher_dtype), Marks()
        batches = Batches(images, images, batch_size, 0, mark.teacher(target), ProcessGroup(device=device))
        trainer = Trainer(replace(job, losses=mark.losses(job.losses)), ProcessGroup(device=device))
        trainer.optimizer.register_step_pre_hook(lambda *_: mark("backward"))

        def step(part_ends: Mark) -> Trainer:
            mark.report = part_ends
            trainer.step(batches.at(trainer.iteration), TOTAL)
            mark("update")
            return trainer

        return step

    job = distill_job(Plan(recipe, folder, source, {}), learner, pairs)
    plain = Straightforward(learner, traced, pairs, images, job, form, recipe.affinity_weight)
    numbers = iter(range(TOTAL))

    def straightforward(part_ends: Mark) -> Straightforward:
        plain.step(next(numbers), training.lr or 0.0, part_ends)
        return plain

    return Pair({kind: ours(kind) for kind in TEACHER_DTYPES}, straightforward)


class Marks:
    """Tells where the parts of the product's own iteration end, without a line for it in the product."""

    def __init__(self) -> None:
        self.report: Mark = lambda part: None

    def __call__(self, part: str) -> None:
        self.report(part)

    def teacher(self, target: Callable[[Tensor], Target]) -> Callable[[Tensor], Target]:
        def marked(x: Tensor) -> Target:
            self("augmentation")
            made = target(x)
            self("teacher forward")
            return made

        return marked

    def losses(
        self, losses: Callable[[Any, Batch, torch.Generator], Losses]
    ) -> Callable[[Any, Batch, torch.Generator], Losses]:
        def marked(answer: Any, batch: Batch, generator: torch.Generator) -> Losses:
            self("student forward")
            terms = losses(answer, batch, generator)
            self("losses")
            return terms

        return marked
