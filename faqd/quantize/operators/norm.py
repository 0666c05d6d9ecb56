"""Batch norms: those of the user's, those that stand still, and those that no layer can take in."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from faqd.quantize.operators.emit import Emission, Value
from faqd.quantize.operators.row import Call, ExactForm, Operator, Pieces, parameter
from faqd.quantize.operators.treatment import Treatment

NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class _Fixed(nn.modules.batchnorm._BatchNorm):
    """A batch norm that nothing moves: x * factor + offset (both (channels,)), whatever the batch and the mode; or that
    times `gamma` plus `beta`, parameters of the network's, which are trained. `factor` is then positive."""

    def __init__(self, factor: Tensor, offset: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None) -> None:
        super().__init__(len(factor), eps=0.0)
        self.weight = nn.Parameter(factor.clone(), requires_grad=False)
        self.bias = nn.Parameter(offset.clone(), requires_grad=False)
        if gamma is not None or beta is not None:
            self.running_mean, self.running_var = -offset / factor, 1 / factor**2
            learned = ((torch.ones_like(factor), gamma), (torch.zeros_like(factor), beta))
            self.weight, self.bias = (
                nn.Parameter(neutral, requires_grad=False) if own is None else nn.Parameter(own.detach().reshape(-1))
                for neutral, own in learned
            )
        self.train()

    def train(self, mode: bool = True) -> Any:
        return super().train(False)

    def reset_running_stats(self) -> None:
        """They are what makes it the identity before its factor."""


class FixedNorm1d(_Fixed, nn.BatchNorm1d):
    pass


class FixedNorm2d(_Fixed, nn.BatchNorm2d):
    pass


class FixedNorm3d(_Fixed, nn.BatchNorm3d):
    pass


def fixed_norm(dimensions: int) -> type[_Fixed]:
    """Of tensors with so many axes."""
    return {4: FixedNorm2d, 5: FixedNorm3d}.get(dimensions, FixedNorm1d)


class ChannelAffine(nn.Module):
    """A batch norm that no layer can take in: x * factor + offset, float32 numbers in a shape that meets channels."""

    factor: Tensor
    offset: Tensor

    def __init__(self, factor: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor.float())
        self.register_buffer("offset", offset.float())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.offset


def _batch_norm(call: Call) -> Any:
    names = ("weight", "bias", "running_mean", "running_var")
    own = {name: tensor for name in names if (tensor := call.tensor(call[name])) is not None}
    given = [name for name in names if call[name] is not None]
    if call.get("training") or not {"running_mean", "running_var"} <= own.keys() or len(own) < len(given):
        return None
    norm = norm_with(own, len(call.before), call["eps"], call["momentum"])
    tensors = [call[name] for name in given]
    if "_native" in call.name:  # which gives the statistics of the batch as well
        return Pieces([partial(call.layer, norm, tensors)])
    return call.layer(norm, tensors)


def norm_with(own: dict[str, Tensor], dimensions: int, eps: float, momentum: float) -> nn.Module:
    """The batch norm around tensors of the network's own, by the names that torch.nn gives them, in evaluation mode."""
    kind = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(dimensions, nn.BatchNorm1d)
    affine = "weight" in own or "bias" in own
    norm: nn.Module = kind(len(own["running_mean"]), affine=affine, eps=eps, momentum=momentum)
    norm.requires_grad_(False)  # what is not given; what is comes as it is
    norm.to(own["running_mean"].device)
    for name, tensor in own.items():
        if name in ("weight", "bias"):
            setattr(norm, name, parameter(tensor))
        else:
            norm.register_buffer(name, tensor.detach() if isinstance(tensor, nn.Parameter) else tensor)
    return norm.eval()


NO_STATISTICS = "batch norm without running statistics (track_running_stats=False) cannot be folded."


def _has_none(norm: Any, node: fx.Node) -> str | None:
    return NO_STATISTICS if norm.running_mean is None else None


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """float64 (channels,) each: a batch norm in evaluation as x * factor + offset."""
    deviation = (norm.running_var.double() + norm.eps).sqrt()
    gamma = norm.weight.detach().double() if norm.affine else torch.ones_like(deviation)
    beta = norm.bias.detach().double() if norm.affine else torch.zeros_like(deviation)
    factor = gamma / deviation
    return factor, beta - factor * norm.running_mean.double()


def _exact(norm: Any, dimensions: int, shift: Tensor | float = 0.0) -> nn.Module:
    per_channel = (-1, *[1] * (dimensions - 2))
    factor, offset = affine(norm)
    return ChannelAffine(factor.reshape(per_channel), (offset + shift).reshape(per_channel))


def _emit(emission: Emission) -> Value:
    norm = emission.module
    channels = len(norm.running_mean)
    neutral = {"weight": torch.ones(channels), "bias": torch.zeros(channels)}
    numbers = {
        name: neutral[name] if getattr(norm, name, None) is None else getattr(norm, name)
        for name in ("weight", "bias", "running_mean", "running_var")
    }
    inputs = [emission.number(*each) for each in numbers.items()]
    return emission.op("BatchNormalization", emission.x, *inputs, epsilon=norm.eps)


def emit_affine(emission: Emission) -> Value:
    """x * factor + offset"""
    factor, offset = (emission.number(name, getattr(emission.module, name)) for name in ("factor", "offset"))
    return emission.op("Add", emission.op("Mul", emission.x, factor), offset)


OPERATORS = (
    Operator(
        "norm",
        NORM,
        dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), _batch_norm),
        refusal=_has_none,
        exact=_exact,
        emit=_emit,
        stands_for="batch norm as a module, as `F.batch_norm`, or frozen in buffers and written out (`x * scale + "
        "shift`, `torch.addcmul`), with a parameter as last factor and as last offset or without",
        treatment=Treatment(
            "folded behind a layer: sign into the quantized weights, size into the scale; elsewhere "
            "`x * factor + offset` in float",
            "folded; elsewhere float, fused into a neighbour",
            "folded; elsewhere float",
        ),
    ),
)
EXACT_FORMS = (
    ExactForm(ChannelAffine, emit_affine, lambda affine: {"factor": affine.factor, "offset": affine.offset}),
)
