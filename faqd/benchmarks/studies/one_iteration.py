"""The product's own iteration on a student that is prepared for it, without what a command does beside iterations."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from faqd.quantize.calibrate import calibrate
from faqd.quantize.capture.capture import capture
from faqd.quantize.config import QuantConfig
from faqd.quantize.prepare import insert_quantizers
from faqd.train.loop.batches import Batches, Images
from faqd.train.loop.distributed import ProcessGroup
from faqd.train.loop.teacher_forward import target_of
from faqd.train.loop.trainer import Trainer
from faqd.train.losses.heads import heads_of
from faqd.train.losses.objective import distill_job
from faqd.train.losses.taps import tap_pairs
from faqd.train.networks.source import NetworkSource
from faqd.train.recipes import DistillRecipe, Training
from faqd.train.run.plan import Plan

BITS, CALIBRATED = 4, 16
TOTAL = 100_000
"""Iterations of the schedule that is pretended: the rate stays where it is."""
WARM_UP = 2


def prepared(
    teacher: nn.Module,
    source: NetworkSource,
    images: Images,
    batch: int,
    run: Path,
    processes: ProcessGroup,
) -> tuple[Trainer, Batches, list[str]]:
    """A student at 4/4 of `teacher` with its weights, the batches that it sees, and the taps. run: an empty folder."""
    example = images.normalised(images.pixels[:CALIBRATED]).contiguous()
    traced = capture(teacher, example[:2])
    student = insert_quantizers(capture(teacher, example[:2]), QuantConfig(BITS, BITS), example[:2])
    calibrate(student, [example], "max")
    student.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pairs = tap_pairs(traced, student, None)
    taps = [theirs for theirs, _ in pairs]
    target = target_of(traced, taps, processes.device)
    training = Training(1, batch, 1e-4, optimizer="relative", frozen_norm=1.0)
    recipe = DistillRecipe("", training, weight_bits=BITS, act_bits=BITS, logit="relative")
    heads = heads_of(traced, lambda x: target(x).outputs, example.split(batch))
    job = distill_job(Plan(recipe, run, source, {}), student, pairs, heads)
    return Trainer(job, processes), Batches(images, images, batch, 0, target, processes), taps


def timed(work: Callable[[int], object], times: int) -> tuple[list[float], list[float]]:
    """Seconds of each call, by its number, after those that warm up: by the clock, and of this process's threads, which
    other work on the machine hardly changes."""
    clock, threads = [], []
    for number in range(WARM_UP + times):
        began, of_threads = time.perf_counter(), time.process_time()
        work(number)
        clock.append(time.perf_counter() - began)
        threads.append(time.process_time() - of_threads)
    return clock[WARM_UP:], threads[WARM_UP:]
