"""The training loop: order, augmentation, schedule, checkpoints; what is trained and why is the caller's."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from faqd.errors import INTERRUPTED, UserError
from faqd.files import leftovers, remove, written_beside
from faqd.preprocess import Preprocess
from faqd.train.augment import augment
from faqd.train.checkpoint import (
    Position,
    checkpoints,
    drop_checkpoints,
    iteration_of,
    load_checkpoint,
    save_checkpoint,
)
from faqd.train.data import Augmentation
from faqd.train.progress import reporting
from faqd.train.recipes import Training
from faqd.train.run import METRICS, held

CHECKPOINT_EVERY_S = 60.0
"""Seconds between checkpoints: what a kill costs at most."""
CHECK_EVERY = 20
"""Iterations between looks at the losses: reading them makes a GPU wait."""
SELECT_IMAGES = 512
NORM_IMAGES = 5000
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)

Losses = dict[str, Tensor]
"""Weighted loss terms by name; their sum is minimised."""


@dataclass(frozen=True)
class Images:
    """uint8 pixels (N, C, H, W) on the training device, labels (N,) or None, and how they become input."""

    pixels: Tensor
    labels: Tensor | None
    scale: Tensor
    offset: Tensor
    augmentation: Augmentation

    def normalised(self, pixels: Tensor) -> Tensor:
        x = pixels.float() * self.scale + self.offset
        return x.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Job:
    """What one run trains.

    losses: (network input, labels or None, private generator) -> weighted terms. after_step: what must hold after
    every step, such as positive scales. decayed, free: parameters with and without weight decay.
    """

    title: str
    network: nn.Module
    decayed: list[nn.Parameter]
    free: list[nn.Parameter]
    losses: Callable[[Tensor, Tensor | None, torch.Generator], Losses]
    after_step: Callable[[], None]
    train: Images
    select: Images
    training: Training


def images_on(
    device: torch.device, images_NHWC: object, labels: object, preprocess: Preprocess, augmentation: Augmentation
) -> Images:
    """Put a split on the device whole, as uint8."""
    pixels = torch.as_tensor(images_NHWC).permute(0, 3, 1, 2).contiguous().to(device)
    scale, offset = (torch.from_numpy(v).to(device).view(1, -1, 1, 1) for v in preprocess.affine())
    targets = None if labels is None else torch.as_tensor(labels).to(device)
    return Images(pixels, targets, scale, offset, augmentation)


def fit(job: Job, run: Path) -> None:
    """Train to the end, from the latest checkpoint in `run` if there is one.

    Iteration i is a function of the weights and of (data seed, i) alone, so that a resumed run ends as one that was
    never stopped. Raises UserError naming the term when a loss is no longer finite, and after Ctrl-C.
    """
    try:
        with held(run):
            _iterate(job, run)
            if resolved(job.training.frozen_norm) < 1:
                settle_norms(job)
    except KeyboardInterrupt:
        found = checkpoints(run)
        start = f"from iteration {iteration_of(found[-1])}" if found else "from the start"
        raise UserError(
            f"{run}: interrupted; the same command with --resume goes on {start}.", exit_code=INTERRUPTED
        ) from None
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{run}: the GPU has too little memory for --batch-size {job.training.batch_size}; start again with a "
            "smaller one and another --out.",
            exit_code=1,
        ) from error


def _iterate(job: Job, run: Path) -> None:
    training = job.training
    per_epoch = max(1, len(job.train.pixels) // training.batch_size)
    total = training.steps or training.epochs * per_epoch
    optimizer = _optimizer(job)
    start = _resume(job, run, optimizer)
    sums = {name: torch.tensor(value, device=job.train.pixels.device) for name, value in start.sums.items()}
    unseen: dict[int, Losses] = {}
    saved_at = time.monotonic()
    began_at = saved_at - start.seconds
    with reporting(job.title, total, start.iteration) as report, (run / METRICS).open("a", encoding="utf-8") as metrics:
        for iteration in range(start.iteration, total):
            _set_mode(job.network, iteration >= total * (1 - resolved(training.frozen_norm)))
            for group in optimizer.param_groups:
                group["lr"] = _rate(training, iteration, total)
            losses = _step(job, optimizer, iteration, per_epoch)
            sums = {name: value + sums[name] if sums else value for name, value in losses.items()}
            done = iteration + 1
            ends_epoch = done % per_epoch == 0 or done == total
            saves = done < total and time.monotonic() - saved_at >= CHECKPOINT_EVERY_S
            looks = ends_epoch or saves or done % CHECK_EVERY == 0
            unseen[done] = losses
            if looks:
                for number, values in unseen.items():
                    _refuse_nan(values, f"in iteration {number}")
                unseen = {}
            if ends_epoch:
                line = _epoch_line(job, done, per_epoch, sums, time.monotonic() - began_at)
                metrics.write(json.dumps(line, allow_nan=False) + "\n")
                metrics.flush()
                sums = {}
            if saves:
                plain_sums = {name: value.item() for name, value in sums.items()}
                position = Position(done, plain_sums, time.monotonic() - began_at)
                save_checkpoint(run, job.network, optimizer, position)
                saved_at = time.monotonic()
            report(done, _news(losses) if looks else None)


def _news(losses: Losses) -> str:
    return "loss " + " + ".join(f"{name} {value.item():.4g}" for name, value in losses.items())


def _optimizer(job: Job) -> torch.optim.Optimizer:
    training = job.training
    return torch.optim.SGD(
        [
            {"params": job.decayed, "weight_decay": training.weight_decay},
            {"params": job.free, "weight_decay": 0.0},
        ],
        lr=resolved(training.lr),
        momentum=training.momentum,
        nesterov=training.momentum > 0,
    )


def finish(run: Path) -> None:
    """What remains to be cleared away once the final weights are written."""
    drop_checkpoints(run)


def _resume(job: Job, run: Path, optimizer: torch.optim.Optimizer) -> Position:
    for path in leftovers(run):
        remove(path)
    found = checkpoints(run)
    position = load_checkpoint(found[-1], job.network, optimizer) if found else Position()
    torch.set_num_threads(position.threads)
    _cut_back(run / METRICS, position.iteration)
    return position


def _cut_back(metrics: Path, iteration: int) -> None:
    """Drop the lines that were written after the checkpoint, and a line cut short."""
    if not metrics.is_file():
        return
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["iteration"] <= iteration]
    with written_beside(metrics) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _step(job: Job, optimizer: torch.optim.Optimizer, iteration: int, per_epoch: int) -> Losses:
    batch_size = job.training.batch_size
    epoch, position = divmod(iteration, per_epoch)
    order = torch.randperm(len(job.train.pixels), generator=stream(job.training.data_seed, 1, epoch))
    index = order[position * batch_size : (position + 1) * batch_size].to(job.train.pixels.device)
    generator = stream(job.training.data_seed, 2, iteration)
    pixels = augment(job.train.pixels[index], job.train.augmentation, generator)
    labels = None if job.train.labels is None else job.train.labels[index]
    losses = job.losses(job.train.normalised(pixels), labels, generator)
    optimizer.zero_grad(set_to_none=True)
    torch.stack(list(losses.values())).sum().backward()
    if job.training.clip_norm is not None:
        nn.utils.clip_grad_norm_([*job.decayed, *job.free], job.training.clip_norm)
    optimizer.step()
    job.after_step()
    return {name: value.detach() for name, value in losses.items()}


def stream(seed: int, use: int, position: int) -> torch.Generator:
    """An independent stream for each (seed, use, position)."""
    # torch's generator on the CPU looks at the low 32 bits of a seed only, so that the three are hashed into those.
    hashed = np.random.SeedSequence(seed, spawn_key=(use, position)).generate_state(1)
    return torch.Generator().manual_seed(int(hashed[0]))


def _rate(training: Training, iteration: int, total: int) -> float:
    """A linear rise over the warm-up, then half a cosine to zero."""
    rising, peak = training.warmup * total, resolved(training.lr)
    if iteration < rising:
        return peak * (iteration + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (iteration - rising) / max(1.0, total - rising)))


def resolved(setting: float | None) -> float:
    """A setting of the schedule that the recipe left open, filled in by now."""
    assert setting is not None
    return setting


def _set_mode(network: nn.Module, norms_stand_still: bool) -> None:
    network.train()
    if norms_stand_still:
        for module in network.modules():
            if isinstance(module, NORMS):
                module.eval()


def _refuse_nan(losses: Mapping[str, Tensor | float], where: str) -> None:
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"the {' and the '.join(bad)} loss is not finite {where}: the run stops here. A lower --lr, or a lower "
            "weight of that term, is the usual cure; give another --out with it.",
            exit_code=1,
        )


def _epoch_line(job: Job, iteration: int, per_epoch: int, sums: Losses, seconds: float) -> dict[str, object]:
    count = (iteration - 1) % per_epoch + 1
    means = {f"{name}_loss": value.item() / count for name, value in sums.items()}
    return {
        "iteration": iteration,
        "epoch": -(-iteration // per_epoch),
        **means,
        **{f"select_{name}_loss": value for name, value in select_losses(job).items()},
        "seconds": round(seconds, 3),
    }


@torch.no_grad()
def select_losses(job: Job) -> dict[str, float]:
    """The losses on unaugmented images of the select split: what model selection may look at."""
    job.network.eval()
    pixels = job.select.pixels[:SELECT_IMAGES]
    labels = None if job.select.labels is None else job.select.labels[:SELECT_IMAGES]
    losses = job.losses(job.select.normalised(pixels), labels, stream(job.training.data_seed, 3, 0))
    plain = {name: float(value) for name, value in losses.items()}
    _refuse_nan(plain, "on the select split")
    return plain


@torch.no_grad()
def settle_norms(job: Job) -> None:
    """Re-estimate batch-norm statistics with the final weights on augmented training images.

    Augmented, because that is what the weights were trained on: the black frame of random crops moves the statistics
    so much that unaugmented images cost accuracy (docs/decisions.md).
    """
    norms = [module for module in job.network.modules() if isinstance(module, NORMS)]
    job.network.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
        norm.train()
    generator = stream(job.training.data_seed, 4, 0)
    for pixels in job.train.pixels[:NORM_IMAGES].split(max(2, job.training.batch_size)):
        if len(pixels) > 1:
            job.network(job.train.normalised(augment(pixels, job.train.augmentation, generator)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
