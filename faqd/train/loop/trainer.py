"""One run in training: what is trained, how it steps, what it writes. Which batches it sees is not its business."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from faqd.errors import UserError
from faqd.files import leftovers, remove, written_beside
from faqd.train.loop.accumulate import Losses, backward
from faqd.train.loop.batches import FORWARD, NORMS, PROJECTION, Batch, Batches, Images, stream
from faqd.train.loop.checkpoint import BEST, Position, checkpoints, iteration_of, load_checkpoint, save_checkpoint
from faqd.train.loop.distributed import ProcessGroup
from faqd.train.loop.optimizer import RelativeAdam
from faqd.train.loop.select import Best, Measure, answers, is_due, mean_losses
from faqd.train.networks.tensor_files import read_tensors
from faqd.train.recipes import Training
from faqd.train.run.folder import METRICS

NORM_IMAGES = 5000
LOSS_SCALE = 2.0**12
"""Where the scale of a float16 loss starts; torch's own 2^16 costs the first iterations, whose gradients overflow."""
NORM_LAYERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Job:
    """What one run trains.

    run: its folder. losses: (what the network returns, batch, private generator) -> weighted terms. after_step: what
    must hold after every step, such as positive scales. decayed, free: parameters with and without weight decay.
    all_used: whether the losses reach every parameter. autocast: the dtype of convolutions and matrix products in
    training, None for float32; what is selected and kept is always computed in float32.
    balanced: weights by the first word of a term's name. Such terms are minimised as shares of what they are, so that
    none outweighs another by its units. measure: by which the best weights are told; None keeps the last ones.
    """

    title: str
    run: Path
    network: nn.Module
    decayed: list[nn.Parameter]
    free: list[nn.Parameter]
    losses: Callable[[Any, Batch, torch.Generator], Losses]
    after_step: Callable[[], None]
    training: Training
    all_used: bool = True
    autocast: torch.dtype | None = None
    balanced: Mapping[str, float] = field(default_factory=dict)
    measure: Measure | None = None

    def __post_init__(self) -> None:
        grouped = sorted(id(p) for p in [*self.decayed, *self.free])
        assert grouped == sorted(id(p) for p in self.network.parameters() if p.requires_grad), "not in one group each"


class Trainer:
    """A job at an iteration: its optimizer, its best weights, and the losses that were not reported yet.

    broken: a loss was no longer finite, so that nothing more can be learned.

    Starts from the latest checkpoint in the run's folder if there is one. Iteration i is a function of the weights, of
    the batch and of (seed, i) alone.
    """

    def __init__(self, job: Job, processes: ProcessGroup) -> None:
        self.job = job
        self.processes = processes
        self.optimizer = _optimizer(job)
        self.start, self.best = _resume(job, self.optimizer, processes)
        self.iteration = self.start.iteration
        device = job.decayed[0].device
        # Float16 has few exponents: a scaled loss keeps small gradients from vanishing. Passes through if disabled.
        self.scaler = torch.amp.GradScaler(device.type, LOSS_SCALE, enabled=job.autocast == torch.float16)
        if self.start.loss_scale:
            self.scaler.load_state_dict(self.start.loss_scale)
        self.sums = {name: torch.tensor(value, device=device) for name, value in self.start.sums.items()}
        self.broken = False
        self._unseen: dict[int, Losses] = {}
        self._forward = processes.data_parallel(job.network, job.all_used)

    def step(self, batch: Batch, total: int) -> None:
        """One iteration of `total`."""
        job, training = self.job, self.job.training
        _set_mode(job.network, self.iteration >= total * (1 - resolved(training.frozen_norm)))
        for group in self.optimizer.param_groups:
            group["lr"] = _rate(training, self.iteration, total)
        # What the network itself may draw, as for dropout, is then the same for a run that was resumed or had company.
        torch.manual_seed(stream(training.seed, FORWARD, self.iteration, self.processes.rank).initial_seed())
        generator = stream(training.seed, PROJECTION, self.iteration, self.processes.rank)

        def losses_of(part: Batch) -> Losses:
            with torch.autocast(part.x.device.type, job.autocast, enabled=job.autocast is not None):
                answer = self._forward(part.x)
            return job.losses(answer, part, generator)

        self.optimizer.zero_grad(set_to_none=True)
        parts = batch.parts(training.accumulate)
        losses = backward(parts, losses_of, self._forward, job.balanced, self.scaler.scale, self.processes)
        if training.clip_norm is not None and training.optimizer == "sgd":
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_([*job.decayed, *job.free], training.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        job.after_step()
        self.sums = {name: value + self.sums[name] if self.sums else value for name, value in losses.items()}
        self.iteration += 1
        self._unseen[self.iteration] = losses

    def judge(self, batches: Batches, total: int) -> None:
        """Look at the validation split where that is due, and remember the best weights."""
        job = self.job
        if job.measure is not None and is_due(self.iteration, total):
            self.best.see(self.iteration, self.processes.from_rank_0(lambda: measured(job, batches)), job.network)

    def look(self) -> str:
        """The latest losses in words. UserError where one since the last look is not finite."""
        unseen, self._unseen = self._unseen, {}
        for number, values in unseen.items():
            _refuse_nan(values, f"in iteration {number}")
        return "loss " + " + ".join(f"{name} {value.item():.4g}" for name, value in unseen[self.iteration].items())

    def end_epoch(self, batches: Batches, seconds: float) -> None:
        """Write the line of an epoch, with the losses on the validation split."""
        count = (self.iteration - 1) % batches.per_epoch + 1
        line = {
            "iteration": self.iteration,
            "epoch": -(-self.iteration // batches.per_epoch),
            **{f"{name}_loss": value.item() / count for name, value in self.sums.items()},
            **{f"select_{name}_loss": value for name, value in select_losses(self.job, batches).items()},
            "seconds": round(self.start.seconds + seconds, 3),
            **({} if batches.feed is None else {"waited": round(batches.feed.waited, 3)}),
        }
        self.sums = {}
        if self.processes.is_rank_0:
            with (self.job.run / METRICS).open("a", encoding="utf-8") as metrics:
                metrics.write(json.dumps(line, allow_nan=False) + "\n")

    def save(self, batches: Batches, seconds: float) -> None:
        sums = {name: value.item() for name, value in self.sums.items()}
        seconds += self.start.seconds
        best = self.best.to_json() if self.best.weights else {}
        scale, broken = self.scaler.state_dict(), batches.broken
        position = Position(self.iteration, sums, seconds, self.start.threads, scale, best, broken)
        save_checkpoint(self.job.run, self.job.network, self.optimizer, position, self.best.weights)


def _optimizer(job: Job) -> torch.optim.Optimizer:
    training = job.training
    if training.optimizer == "relative":
        return RelativeAdam([*job.decayed, *job.free], resolved(training.lr))
    return torch.optim.SGD(
        [
            {"params": job.decayed, "weight_decay": training.weight_decay},
            {"params": job.free, "weight_decay": 0.0},
        ],
        lr=resolved(training.lr),
        momentum=training.momentum,
        nesterov=training.momentum > 0,
        fused=job.decayed[0].is_cuda,
    )


def _resume(job: Job, optimizer: torch.optim.Optimizer, processes: ProcessGroup) -> tuple[Position, Best]:
    processes.from_rank_0(lambda: _clear(job.run))
    found = checkpoints(job.run)
    if not found:
        return Position(), Best()
    position = load_checkpoint(found[-1], job.network, optimizer)
    return position, Best.from_json(position.best, read_tensors(found[-1] / BEST)) if position.best else Best()


def _clear(run: Path) -> None:
    """Remove what a kill left half-written, and the metrics since the last checkpoint."""
    for path in leftovers(run):
        remove(path)
    found = checkpoints(run)
    (run / METRICS).touch()
    _cut_back(run / METRICS, iteration_of(found[-1]) if found else 0)


def _cut_back(metrics: Path, iteration: int) -> None:
    """Drop the lines that were written after the checkpoint, and a line cut short."""
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["iteration"] <= iteration]
    with written_beside(metrics) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _rate(training: Training, iteration: int, total: int) -> float:
    """A linear rise over the warm-up, then half a cosine to zero."""
    rising, peak = resolved(training.warmup) * total, resolved(training.lr)
    if iteration < rising:
        return peak * min(1.0, (iteration + 1) / rising)
    return peak * 0.5 * (1 + math.cos(math.pi * (iteration - rising) / max(1.0, total - rising)))


def resolved(setting: float | None) -> float:
    """A setting of the schedule that the recipe left open, filled in by now."""
    assert setting is not None
    return setting


def _set_mode(network: nn.Module, norms_stand_still: bool) -> None:
    network.train()
    if norms_stand_still:
        for module in network.modules():
            if isinstance(module, NORM_LAYERS):
                module.eval()


def _refuse_nan(losses: Mapping[str, Tensor | float], where: str) -> None:
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"the {' and the '.join(bad)} loss is not finite {where}: the run stops here. A lower --lr, or a lower "
            "weight of that term, is the usual cure; give another --out with it.",
            exit_code=1,
        )


@torch.no_grad()
def select_losses(job: Job, batches: Batches) -> dict[str, float]:
    """The losses on the validation split."""
    plain = mean_losses(answers(job.network, batches), job.losses, batches.data_seed)
    _refuse_nan(plain, "on the validation split")
    return plain


@torch.no_grad()
def measured(job: Job, batches: Batches) -> float:
    """The job's measure on the validation split."""
    assert job.measure is not None
    return job.measure(answers(job.network, batches))


@torch.no_grad()
def settle_norms(network: nn.Module, images: Images, training: Training) -> None:
    """Re-estimate batch-norm statistics with the final weights on augmented training images.

    Augmented, because that is what the weights were trained on: the black frame of random crops moves the statistics
    so much that unaugmented images cost accuracy (docs/decisions.md).
    """
    norms = [module for module in network.modules() if isinstance(module, NORM_LAYERS)]
    network.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
        norm.train()
    generator = stream(training.data_seed, NORMS, 0)
    for pixels in images.parts(max(2, training.batch_size // training.accumulate), NORM_IMAGES):
        if len(pixels) > 1:
            network(images.normalised(images.augmented(pixels, generator)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
