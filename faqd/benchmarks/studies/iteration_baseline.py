"""The straightforward distillation iteration, part by part as a textbook has it. Frozen: the baseline of `iteration`.

- Augmentation: a loop over the samples on the CPU; each is framed, cropped, mirrored and normalised by itself.
- Teacher: the float network as it is, batch norm unfolded, evaluation mode, no gradient, contiguous NCHW.
- Activation quantizer: the piecewise definition written with boolean indexing, its two derivatives likewise.
- Weight quantizer: one assignment and one least-squares scale per layer and iteration.
- Affinity: both (N, N) similarity matrices, their difference, autograd (`direct_affinity`).
- Update: clipping and SGD as torch has them by default.

It computes the same losses and gradients as the product, and learns from the same random numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from faqd.benchmarks.studies.affinity_baseline import direct_affinity
from faqd.quant import Quant
from faqd.quantize import nodes
from faqd.quantize.quantizers.activation import ActivationQuantizer
from faqd.quantize.quantizers.weight import WeightQuantizer
from faqd.quantize.student import Student
from faqd.train.loop.batches import AUGMENTATION, ORDER, Images, stream
from faqd.train.loop.trainer import Job

Mark = Callable[[str], None]
"""Called after each part of an iteration with its name."""


class Straightforward:
    """A student that learns from a teacher; `step` is one iteration.

    student, teacher, pairs: as `distill_job` takes them; the student is copied. job: whose parameter groups, rate and
    clipping hold here too. form: l1, l2 or l2_squared.
    """

    def __init__(
        self,
        student: Student,
        teacher: fx.GraphModule,
        pairs: list[tuple[str, str]],
        images: Images,
        job: Job,
        form: str,
        affinity_weight: float,
    ) -> None:
        network = copy.deepcopy(student.network)
        network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        _replace_quantizers(network)
        self.student = nodes.with_taps(network, [ours for _, ours in pairs]).train()
        self.teacher = nodes.with_taps(teacher, [theirs for theirs, _ in pairs]).eval()
        self.images, self.form, self.affinity_weight = images, form, affinity_weight
        self.training = job.training
        self.last: dict[str, Tensor] = {}
        self.parameters = list(self.student.parameters())
        decayed = _positions(job.decayed, job.network)
        groups = [[p for i, p in enumerate(self.parameters) if (i in decayed) == wanted] for wanted in (True, False)]
        self.scales = [m.scale for m in self.student.modules() if isinstance(m, PiecewiseActivation)]
        self.optimizer = torch.optim.SGD(
            [
                {"params": groups[0], "weight_decay": self.training.weight_decay},
                {"params": groups[1], "weight_decay": 0.0},
            ],
            lr=self.training.lr or 0.0,
            momentum=self.training.momentum,
            nesterov=True,
        )

    def step(self, iteration: int, rate: float, mark: Mark = lambda part: None) -> None:
        """One iteration at this learning rate; `last` are the weighted terms of its loss."""
        x = self.batch(iteration)
        mark("augmentation")
        with torch.no_grad():
            wanted, their_maps = self.teacher(x)
        mark("teacher forward")
        outputs, our_maps = self.student(x)
        mark("student forward")
        affinity = torch.zeros((), dtype=outputs.dtype, device=outputs.device)
        for ours, theirs in zip(our_maps, their_maps, strict=True):
            affinity = affinity + direct_affinity(ours, theirs, self.form)
        terms = {"logit": functional.mse_loss(outputs, wanted), "affinity": self.affinity_weight * affinity}
        mark("losses")
        self.optimizer.zero_grad()
        (terms["logit"] + terms["affinity"]).backward()
        if self.training.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.training.clip_norm)
        mark("backward")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        with torch.no_grad():
            for scale in self.scales:
                scale.clamp_(min=1e-6)
        mark("update")
        self.last = {name: value.detach() for name, value in terms.items()}

    def batch(self, iteration: int) -> Tensor:
        """The network input (B, C, H, W) of an iteration, one sample after the other."""
        size, seed, how = self.training.batch_size, self.training.data_seed, self.images.augmentation
        count = len(self.images.pixels)
        epoch, position = divmod(iteration, max(1, count // size))
        order = torch.randperm(count, generator=stream(seed, ORDER, epoch))
        generator = stream(seed, AUGMENTATION, iteration)
        mirrored = torch.randint(2, (size, 1), generator=generator)
        offsets = torch.randint(2 * how.pad + 1, (2, size, 1), generator=generator)
        samples = []
        for i, index in enumerate(order[position * size : (position + 1) * size].tolist()):
            image = functional.pad(self.images.pixels[index], (how.pad,) * 4)
            top, left = int(offsets[0, i]), int(offsets[1, i])
            image = image[:, top : top + self.images.pixels.shape[2], left : left + self.images.pixels.shape[3]]
            if mirrored[i]:
                image = image.flip(2)
            samples.append(image.float() * self.images.scale[0] + self.images.offset[0])
        return torch.stack(samples)


class PiecewiseActivation(nn.Module):
    """`ActivationQuantizer` by its definition: three cases, each picked out by a boolean index."""

    def __init__(self, quant: Quant, scale: Tensor) -> None:
        super().__init__()
        self.quant = quant
        self.scale = nn.Parameter(scale.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Piecewise.apply(x, self.scale, self.quant.low, self.quant.high)  # type: ignore[no-untyped-call]
        return result


class _Piecewise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        u = x / scale
        codes = torch.zeros_like(u)
        inside = (u >= low) & (u <= high)
        codes[inside] = torch.round(u[inside])
        codes[u < low] = low
        codes[u > high] = high
        ctx.save_for_backward(u)
        ctx.low, ctx.high = low, high
        return codes * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (u,) = ctx.saved_tensors
        inside = (u >= ctx.low) & (u <= ctx.high)
        passed = torch.zeros_like(gradient)
        passed[inside] = gradient[inside]
        slope = torch.zeros_like(u)
        slope[inside] = torch.round(u[inside]) - u[inside]
        slope[u < ctx.low] = ctx.low
        slope[u > ctx.high] = ctx.high
        return passed, (gradient * slope).sum() / math.sqrt(ctx.high * u[0].numel()), None, None


class PlainWeights(nn.Module):
    """`WeightQuantizer` for three bits and more: nearest levels, then the least-squares scale of each channel."""

    scale: Tensor

    def __init__(self, quant: Quant, scale: Tensor) -> None:
        super().__init__()
        self.quant = quant
        self.register_buffer("scale", scale.clone())

    def forward(self, weight: Tensor) -> Tensor:
        rows = weight.detach().flatten(1)
        codes = torch.round(rows / self.scale[:, None])
        codes[codes > self.quant.high] = self.quant.high
        codes[codes < -self.quant.high] = -self.quant.high
        scale = (rows * codes).sum(1) / (codes * codes).sum(1)
        if self.training:
            self.scale.copy_(scale)
        quantized = (codes * scale[:, None]).reshape(weight.shape)
        return weight + (quantized - weight).detach()


def _replace_quantizers(network: fx.GraphModule) -> None:
    for name, module in list(network.named_modules()):
        if isinstance(module, ActivationQuantizer):
            network.set_submodule(name, PiecewiseActivation(module.quant, module.scale))
        elif parametrize.is_parametrized(module, "weight"):
            chain: Any = module.parametrizations.weight
            assert isinstance(chain[0], WeightQuantizer)
            chain[0] = PlainWeights(chain[0].quant, chain[0].scale)


def _positions(chosen: list[nn.Parameter], network: nn.Module) -> set[int]:
    """Where `chosen` stand among the parameters of `network`, which the copy has in the same order."""
    ids = {id(parameter) for parameter in chosen}
    return {i for i, parameter in enumerate(network.parameters()) if id(parameter) in ids}
