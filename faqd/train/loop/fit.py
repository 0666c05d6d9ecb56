"""The training loop: one stream of batches, any number of jobs that learn from it side by side."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from faqd.errors import INTERRUPTED, Paused, UserError
from faqd.train.loop.batches import Batches
from faqd.train.loop.checkpoint import checkpoints, drop_checkpoints, iteration_of
from faqd.train.loop.progress import reporting
from faqd.train.loop.select import Best
from faqd.train.loop.trainer import Job, Trainer, resolved, settle_norms
from faqd.train.networks.own_tensors import put_tensors

CHECKPOINT_EVERY_S = 60.0
"""Seconds between checkpoints: what a kill costs at most."""
CHECK_EVERY = 20
"""Iterations between looks at the losses: reading them makes a GPU wait."""


class Fitted(NamedTuple):
    """By run: what is known of the best weights where a job has a measure of them; and where it has none, the error of
    each whose loss was no longer finite."""

    failed: dict[Path, UserError]
    best: dict[Path, Best]


def fit(jobs: Sequence[Job], batches: Batches, deadline: float = math.inf) -> Fitted:
    """Train every job to its end, each from the latest checkpoint in its folder if there is one.

    The jobs have one schedule, up to its rates, and never touch one another: each ends as it would alone, with the best
    weights that were seen where it has a measure, those it started with among them. One whose loss is no longer finite
    learns no more; the others go on. UserError after Ctrl-C, or without memory; Paused with a checkpoint of every run
    once time.monotonic() has passed the deadline, after one iteration at least.
    """
    failed: dict[Path, UserError] = {}
    best: dict[Path, Best] = {}
    try:
        trainers = [Trainer(job, batches.processes) for job in jobs]
        for trainer in trainers:
            batches.broken.update(trainer.start.broken)
        # Sums of floats depend on the number of threads: each goes on with its own.
        for threads in sorted({trainer.start.threads for trainer in trainers}):
            torch.set_num_threads(threads)
            together = [trainer for trainer in trainers if trainer.start.threads == threads]
            _iterate(together, batches, failed, deadline)
            for trainer in (trainer for trainer in together if trainer.job.run not in failed):
                job = trainer.job
                if resolved(job.training.frozen_norm) < 1:
                    settle_norms(job.network, batches.train, job.training)
                    trainer.judge(batches, trainer.iteration)
                if job.measure is not None:
                    best[job.run] = trainer.best
                    put_tensors(job.network, trainer.best.weights)
    except KeyboardInterrupt:
        raise UserError(_interrupted([job.run for job in jobs]), exit_code=INTERRUPTED) from None
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{jobs[0].run}: the GPU has too little memory for --batch-size {batches.size}"
            f"{f' in {batches.accumulate} parts' * (batches.accumulate > 1)}; start again with --accumulate "
            f"{2 * batches.accumulate}, or with a smaller one, and another --out.",
            exit_code=1,
        ) from error
    finally:
        if batches.feed is not None:
            batches.feed.close()
    return Fitted(failed, best)


def _iterate(trainers: list[Trainer], batches: Batches, failed: dict[Path, UserError], deadline: float) -> None:
    total = batches.iterations(trainers[0].job.training)
    first = min(trainer.iteration for trainer in trainers)
    began_at = saved_at = time.monotonic()
    titles = [trainer.job.title for trainer in trainers] if batches.processes.is_rank_0 else []
    for trainer in trainers:
        if trainer.iteration == 0:
            trainer.judge(batches, total)
    with reporting(titles, total, first) as report:
        for iteration in range(first, total):
            # A kill can leave some one checkpoint ahead of the others, and lists may grow.
            due = [t for t in trainers if t.iteration == iteration and not t.broken]
            if not due:
                continue
            batch = batches.at(iteration)
            for trainer in due:
                trainer.step(batch, total)
                trainer.judge(batches, total)
            done = iteration + 1
            seconds = time.monotonic() - began_at
            ends_epoch = done % batches.per_epoch == 0 or done == total
            looks = ends_epoch or done % CHECK_EVERY == 0
            if looks:
                batches.share_findings()
            # Several processes look at the same iterations, so that they give a run up at the same one.
            may_save = done < total and (looks or not batches.processes.is_distributed)
            pauses = may_save and batches.processes.from_rank_0(lambda: time.monotonic() >= deadline)
            saves = may_save and batches.processes.is_rank_0 and time.monotonic() - saved_at >= CHECKPOINT_EVERY_S
            saves |= pauses and batches.processes.is_rank_0
            news = {}
            for trainer in due:
                try:
                    if looks or saves:
                        news[trainer.job.title] = trainer.look()
                    if ends_epoch:
                        trainer.end_epoch(batches, seconds)
                except UserError as error:
                    trainer.broken = True
                    if trainer.job.measure is None:
                        failed[trainer.job.run] = error
                    trainer.best.last = math.inf
            if saves:
                for trainer in due:
                    if not trainer.broken:
                        trainer.save(batches, seconds)
                saved_at = time.monotonic()
            report(done, news)
            if pauses:
                runs = _place([trainer.job.run for trainer in trainers])
                raise Paused(
                    f"{runs}: paused by --time-limit after iteration {done} of {total}; the same command with --resume "
                    "goes on."
                )


def _interrupted(runs: list[Path]) -> str:
    found = [iteration_of(there[-1]) if (there := checkpoints(run)) else 0 for run in runs]
    start = f"from iteration {min(found)}" if min(found) else "from the start"
    return f"{_place(runs)}: interrupted; the same command with --resume goes on {start}."


def _place(runs: list[Path]) -> str:
    return os.path.commonpath(runs)


def finish(run: Path) -> None:
    """What remains to be cleared away once the final weights are written."""
    drop_checkpoints(run)
