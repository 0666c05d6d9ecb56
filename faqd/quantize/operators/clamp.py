"""Limits, as ReLU6 and hardtanh have them."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

from faqd.quantize.operators.emit import Emission, Value
from faqd.quantize.operators.row import Call, Operator
from faqd.quantize.operators.treatment import Treatment


class Clamp(nn.Module):
    """Limits, as ReLU6 and hardtanh have them: min(max(x, low), high)."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(self.low, self.high)

    def extra_repr(self) -> str:
        return f"{self.low:g}, {self.high:g}"


def _exact(clamp: Any, dimensions: int) -> nn.Module:
    return Clamp(float(np.float32(clamp.low)), float(np.float32(clamp.high)))


def _clamp(call: Call) -> nn.Module | None:
    low, high = call.get("min"), call.get("max")
    if low == 0 and high is None:
        return nn.ReLU()
    limits = isinstance(low, int | float) and isinstance(high, int | float)
    return Clamp(float(low), float(high)) if limits else None


def _emit(emission: Emission) -> Value:
    low, high = (emission.number(name, getattr(emission.module, name)) for name in ("low", "high"))
    return emission.op("Clip", emission.x, low, high)


OPERATORS = (
    Operator(
        "clamp",
        (Clamp,),
        {
            "relu6": lambda call: Clamp(0.0, 6.0),
            "hardtanh": lambda call: Clamp(float(call["min_val"]), float(call["max_val"])),
            **dict.fromkeys(("clamp", "clip", "clamp_min"), _clamp),
        },
        exact=_exact,
        emit=_emit,
        stands_for="ReLU6, hardtanh, `clamp(a, b)` with a ≤ 0 < b",
        treatment=Treatment(
            "unsigned, the chosen bits, or signed 8 bits where a < 0; limits become limits of the quantized values",
            "a Clip before the rounding",
            "an integer Clip",
        ),
    ),
)
