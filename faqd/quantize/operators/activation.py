"""Activations: curves on a signed 8-bit grid, exact in float64 in the order that the file states, and ReLU.

Numbers that stand in the file are float32 there, so they are rounded to float32 here. The referee has the same
functions in numpy (faqd/exact_math.py); the steps are the same IEEE operations, so results are equal to the last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from faqd.quantize.operators.exact_math import erf, sigmoid, tanh
from faqd.quantize.operators.row import Call, Operator, parameter

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
            return sigmoid(x)
        if self.kind == "tanh":
            return tanh(x)
        if self.kind == "silu":
            return x * sigmoid(x)
        if self.kind == "hardsigmoid":
            return _hard_sigmoid(x)
        if self.kind == "hardswish":
            return x * _hard_sigmoid(x)
        if self.kind == "gelu":
            return x * (erf(x * ROOT_HALF) + 1.0) * 0.5
        inner = (x * x * x * GELU_CUBE + x) * GELU_FACTOR
        return x * (tanh(inner) + 1.0) * 0.5


def _hard_sigmoid(x: Tensor) -> Tensor:
    return (x * SIXTH + 0.5).clamp(0, 1)


def _prelu(call: Call) -> Any:
    weight = call.tensor(call["weight"])
    if weight is None:
        return None
    module = nn.PReLU(weight.numel())
    module.weight = parameter(weight)
    return call.layer(module, [call["weight"]])


OPERATORS = (
    Operator("rectify", (nn.ReLU, torch.relu_), {"relu": lambda call: nn.ReLU()}),
    Operator("curve", (nn.LeakyReLU,), {"leaky_relu": lambda call: nn.LeakyReLU(float(call["negative_slope"]))}),
    Operator("curve", (nn.PReLU,), {"prelu": _prelu}),
    Operator("curve", (nn.SiLU,), {"silu": lambda call: nn.SiLU()}),
    Operator("curve", (nn.Hardswish,), {"hardswish": lambda call: nn.Hardswish()}),
    Operator(
        "curve",
        (nn.Sigmoid,),
        dict.fromkeys(("sigmoid", "special_expit"), lambda call: nn.Sigmoid()),
        never_negative=True,
    ),
    Operator("curve", (nn.Hardsigmoid,), {"hardsigmoid": lambda call: nn.Hardsigmoid()}, never_negative=True),
    Operator("curve", (nn.GELU,), {"gelu": lambda call: nn.GELU(call["approximate"])}),
    Operator("curve", (nn.Tanh,), {"tanh": lambda call: nn.Tanh()}),
)
CURVES: tuple[type[nn.Module], ...] = tuple(row.kinds[0] for row in OPERATORS if row.role == "curve")
"""Activations whose result has a signed 8-bit grid."""
