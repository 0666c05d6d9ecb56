"""Deployed forms of the operators in elementwise.py: exact in float64, in the order the file states.

Numbers that stand in the file are float32 there, so they are rounded to float32 here. The referee has the same
functions in numpy (faqd/exact_math.py); the steps are the same IEEE operations, so results are equal to the last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from faqd.exact_math import ERFC_TERMS, EXP_REACH, EXP_TERMS, LN2_HIGH, LN2_LOW, LOG2_E
from faqd.quantize.operators.elementwise import CURVES, Bilinear, Clamp, lines

SIXTH = float(np.float32(1 / 6))
ROOT_HALF = float(np.float32(0.5**0.5))
GELU_CUBE = float(np.float32(0.044715))
GELU_FACTOR = float(np.float32((2 / np.pi) ** 0.5))


class Curve(nn.Module):
    """An activation. kind: the torch class in lower case, `gelu-tanh` for that approximation.

    dimensions: of the input of a prelu, whose slopes meet its channels. slope: of leakyrelu a number, of prelu a
    tensor; float32 values.
    """

    slope: float | Tensor

    def __init__(self, module: Any, dimensions: int = 4) -> None:
        super().__init__()
        assert isinstance(module, CURVES)
        self.kind = type(module).__name__.lower()
        if self.kind == "gelu" and module.approximate == "tanh":
            self.kind = "gelu-tanh"
        if isinstance(module, nn.PReLU):
            slopes = module.weight.detach().float()
            self.register_buffer("slope", slopes.reshape(-1, *[1] * (dimensions - 2)))
        else:
            self.slope = float(np.float32(getattr(module, "negative_slope", 0.0)))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind in ("leakyrelu", "prelu"):
            return torch.where(x >= 0, x, x * self.slope)
        if self.kind == "sigmoid":
            return _sigmoid(x)
        if self.kind == "tanh":
            return _tanh(x)
        if self.kind == "silu":
            return x * _sigmoid(x)
        if self.kind == "hardsigmoid":
            return _hard_sigmoid(x)
        if self.kind == "hardswish":
            return x * _hard_sigmoid(x)
        if self.kind == "gelu":
            return x * (_erf(x * ROOT_HALF) + 1.0) * 0.5
        inner = (x * x * x * GELU_CUBE + x) * GELU_FACTOR
        return x * (_tanh(inner) + 1.0) * 0.5


def deployed_clamp(clamp: Clamp) -> Clamp:
    return Clamp(float(np.float32(clamp.low)), float(np.float32(clamp.high)))


class Interpolate(nn.Module):
    """Bilinear interpolation of codes: along rows, then along columns, then the input's scale."""

    scale: Tensor

    def __init__(self, bilinear: Bilinear, scale: Tensor) -> None:
        super().__init__()
        self.before, self.size, self.align_corners = bilinear.before, bilinear.size, bilinear.align_corners
        self.register_buffer("scale", scale.detach().float().reshape(()))

    def forward(self, x: Tensor) -> Tensor:
        values = (x / self.scale.double()).round_()
        for axis, size in zip((2, 3), self.size, strict=True):
            low, high, weight = lines(values.shape[axis], size, self.align_corners)
            weight = weight.reshape(-1, *[1] * (3 - axis))
            first, second = values.index_select(axis, low), values.index_select(axis, high)
            values = first * (1 - weight) + second * weight
        return values * self.scale.double()


def _hard_sigmoid(x: Tensor) -> Tensor:
    return (x * SIXTH + 0.5).clamp(0, 1)


def _sigmoid(x: Tensor) -> Tensor:
    return 1.0 / (1.0 + _exp(-x))


def _tanh(x: Tensor) -> Tensor:
    return 2.0 / (1.0 + _exp(-2.0 * x)) - 1.0


def _exp(x: Tensor) -> Tensor:
    x = x.clamp(-EXP_REACH, EXP_REACH)
    k = (x * LOG2_E).round()
    rest = (x - k * LN2_HIGH) - k * LN2_LOW
    value = torch.full_like(rest, EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        value.mul_(rest).add_(term)
    # 2^k from its exponent bits: torch.pow need not be exact.
    return value * ((k.long() + 1023) << 52).view(torch.float64)


def _erf(x: Tensor) -> Tensor:
    z = x.abs()
    t = 2.0 / (2.0 + z)
    u = 4.0 * t - 2.0
    one, two = torch.zeros_like(t), torch.zeros_like(t)
    for term in ERFC_TERMS[:0:-1]:
        one, two = u * one - two + term, one
    series = 0.5 * (u * one + ERFC_TERMS[0]) - two
    complement = t * _exp(series - z * z)
    return x.sign() * (1.0 - complement)
