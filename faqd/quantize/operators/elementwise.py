"""The operators of one tensor that every way of writing them becomes, and what each computes in a network of floats.

faqd/quantize/capture/standardize.py rewrites a captured network in these terms; curves.py has their exact forms.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CURVES: tuple[type[nn.Module], ...] = (
    nn.LeakyReLU,
    nn.PReLU,
    nn.SiLU,
    nn.Hardswish,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.GELU,
    nn.Tanh,
)
"""Activations whose result has a signed 8-bit grid."""
NEVER_NEGATIVE = (nn.Sigmoid, nn.Hardsigmoid)


class Clamp(nn.Module):
    """Limits, as ReLU6 and hardtanh have them: min(max(x, low), high)."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(self.low, self.high)

    def extra_repr(self) -> str:
        return f"{self.low:g}, {self.high:g}"


class Scaled(nn.Module):
    """Numbers of the network's own: x * factor + offset.

    A tensor meets x without changing its shape; a parameter is trained.
    """

    factor: float | Tensor
    offset: float | Tensor

    def __init__(self, factor: float | Tensor, offset: float | Tensor) -> None:
        super().__init__()
        for name, value in (("factor", factor), ("offset", offset)):
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.offset

    def extra_repr(self) -> str:
        return ", ".join(f"{n:g}" if isinstance(n, float) else str(tuple(n.shape)) for n in (self.factor, self.offset))


class Constant(nn.Module):
    """The same for every image, whatever it shows: `value` (1, ...), or without a batch, once for each image of x."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        if isinstance(value, nn.Parameter):
            self.value = value
        else:
            self.register_buffer("value", value)

    def forward(self, x: Tensor) -> Tensor:
        return self.value.expand(x.shape[0], *self.value.shape[1:])


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


class Part(nn.Module):
    """One piece of what chunk or split returns: `start` up to `end` of `axis`."""

    def __init__(self, axis: int, start: int, end: int) -> None:
        super().__init__()
        self.axis, self.start, self.end = axis, start, end

    def forward(self, x: Tensor) -> Tensor:
        return x.narrow(self.axis, self.start, self.end - self.start)


class Rows(nn.Module):
    """All axes but the last in one, and back: (-1, *sizes)."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.sizes)


class Nearest(nn.Module):
    """Pixels repeated a whole number of times. before, size: spatial sizes of input and result."""

    def __init__(self, before: tuple[int, ...], size: tuple[int, ...]) -> None:
        super().__init__()
        self.before, self.size = before, size

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, self.size, mode="nearest")


class Bilinear(nn.Module):
    """Bilinear interpolation, a weighted average of up to four pixels. before, size: (H, W) of input and result."""

    def __init__(self, before: tuple[int, ...], size: tuple[int, ...], align_corners: bool) -> None:
        super().__init__()
        self.before, self.size, self.align_corners = before, size, align_corners

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, self.size, mode="bilinear", align_corners=self.align_corners)


def lines(inputs: int, outputs: int, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Linear interpolation along one axis: for each output the two input pixels (int64) and the second one's weight.

    weight: float64. The position of output i is (i + 1/2) * inputs / outputs - 1/2, or i * (inputs - 1) /
    (outputs - 1) with aligned corners, at least 0.
    """
    index = torch.arange(outputs, dtype=torch.float64)
    if align_corners:
        position = index * (inputs - 1) / max(1, outputs - 1)
    else:
        position = ((index + 0.5) * inputs / outputs - 0.5).clamp_min(0)
    low = position.floor().clamp_max(inputs - 1)
    return low.long(), (low + 1).clamp_max(inputs - 1).long(), position - low
