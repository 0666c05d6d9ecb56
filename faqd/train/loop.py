"""The training loop: order, augmentation, schedule, checkpoints; what is trained and why is the caller's."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from faqd.errors import UserError
from faqd.preprocess import Preprocess
from faqd.train.augment import augment
from faqd.train.checkpoint import checkpoints, drop_checkpoints, load_checkpoint, save_checkpoint
from faqd.train.data import Augmentation
from faqd.train.progress import reporting
from faqd.train.recipes import Training
from faqd.train.run import METRICS

CHECKPOINT_EVERY_S = 60.0
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
    never stopped. Raises UserError naming the term when a loss is no longer finite.
    """
    training = job.training
    per_epoch = max(1, len(job.train.pixels) // training.batch_size)
    total = training.steps or training.epochs * per_epoch
    optimizer = torch.optim.SGD(
        [
            {"params": job.decayed, "weight_decay": training.weight_decay},
            {"params": job.free, "weight_decay": 0.0},
        ],
        lr=training.lr,
        momentum=training.momentum,
        nesterov=training.momentum > 0,
    )
    done = _resume(job, run, optimizer)
    seen: Losses = {}
    saved_at = started = time.monotonic()
    with reporting(job.title, total, done) as report, (run / METRICS).open("a", encoding="utf-8") as metrics:
        for iteration in range(done, total):
            _set_mode(job.network, iteration >= total * (1 - training.frozen_norm))
            for group in optimizer.param_groups:
                group["lr"] = _rate(training, iteration, total)
            losses = _step(job, optimizer, iteration, per_epoch)
            for name, value in losses.items():
                seen[name] = seen.get(name, torch.zeros_like(value)) + value
            news = None
            ends_epoch = (iteration + 1) % per_epoch == 0 or iteration + 1 == total
            if ends_epoch or (iteration + 1) % CHECK_EVERY == 0:
                _refuse_nan(seen, iteration)
                news = "loss " + " + ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
            if ends_epoch:
                line = _epoch_line(job, iteration + 1, per_epoch, seen, time.monotonic() - started)
                metrics.write(json.dumps(line) + "\n")
                metrics.flush()
                seen = {}
            # At an epoch's end only: the sums of an epoch are then complete in the metrics.
            if ends_epoch and iteration + 1 < total and time.monotonic() - saved_at > CHECKPOINT_EVERY_S:
                save_checkpoint(run, job.network, optimizer, iteration + 1)
                saved_at = time.monotonic()
            report(iteration + 1, news)
    settle_norms(job)


def finish(run: Path) -> None:
    """What remains to be cleared away once the final weights are written."""
    drop_checkpoints(run)


def _resume(job: Job, run: Path, optimizer: torch.optim.Optimizer) -> int:
    found = checkpoints(run)
    done = 0
    if found:
        position = load_checkpoint(found[-1], job.network, optimizer)
        torch.set_num_threads(position["threads"])
        done = int(position["iteration"])
    metrics = run / METRICS
    if metrics.is_file():
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["iteration"] <= done]
        metrics.write_text("".join(kept), encoding="utf-8")
    return done


def _step(job: Job, optimizer: torch.optim.Optimizer, iteration: int, per_epoch: int) -> Losses:
    batch_size = job.training.batch_size
    epoch, position = divmod(iteration, per_epoch)
    order = torch.randperm(len(job.train.pixels), generator=_generator(job.training.data_seed, 1, epoch))
    index = order[position * batch_size : (position + 1) * batch_size].to(job.train.pixels.device)
    generator = _generator(job.training.data_seed, 2, iteration)
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


def _generator(seed: int, use: int, position: int) -> torch.Generator:
    """An independent stream for each (seed, use, position)."""
    return torch.Generator().manual_seed((seed * 8 + use) * 2**40 + position)


def _rate(training: Training, iteration: int, total: int) -> float:
    """A linear rise over the warm-up, then half a cosine to zero."""
    rising = training.warmup * total
    if iteration < rising:
        return training.lr * (iteration + 1) / rising
    return training.lr * 0.5 * (1 + math.cos(math.pi * (iteration - rising) / max(1.0, total - rising)))


def _set_mode(network: nn.Module, norms_stand_still: bool) -> None:
    network.train()
    if norms_stand_still:
        for module in network.modules():
            if isinstance(module, NORMS):
                module.eval()


def _refuse_nan(seen: Losses, iteration: int) -> None:
    for name, value in seen.items():
        if not bool(torch.isfinite(value)):
            raise UserError(
                f"the {name} loss is not finite at iteration {iteration + 1}: the run stops here. A lower --lr, or a "
                "lower weight of that term, is the usual cure.",
                exit_code=1,
            )


def _epoch_line(job: Job, iteration: int, per_epoch: int, seen: Losses, seconds: float) -> dict[str, object]:
    count = (iteration - 1) % per_epoch + 1
    means = {f"{name}_loss": value.item() / count for name, value in seen.items()}
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
    losses = job.losses(job.select.normalised(pixels), labels, _generator(job.training.data_seed, 3, 0))
    return {name: float(value) for name, value in losses.items()}


@torch.no_grad()
def settle_norms(job: Job) -> None:
    """Re-estimate batch-norm statistics with the final weights on unaugmented training images, then freeze them."""
    norms = [module for module in job.network.modules() if isinstance(module, NORMS)]
    job.network.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
        norm.train()
    for pixels in job.train.pixels[:NORM_IMAGES].split(max(2, job.training.batch_size)):
        if len(pixels) > 1:
            job.network(job.train.normalised(pixels))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
