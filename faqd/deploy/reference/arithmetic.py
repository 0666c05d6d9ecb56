"""Sums, products and limits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.deploy.reference.values import Attributes, Operator, Value
from faqd.reference import Array, real


def _clip(operands: list[Value], attributes: Attributes) -> Value:
    x, low, high = [*operands, None, None][:3]
    clipped: Array = np.clip(real(x), low, high)
    return clipped


def _divide(x: NDArray[Any], by: NDArray[Any]) -> NDArray[Any]:
    if x.dtype.kind == "f":
        return np.asarray(x / by)
    quotient = np.asarray(np.abs(x) // np.abs(by)) * np.sign(x) * np.sign(by)  # of integers, towards zero
    found: NDArray[Any] = quotient.astype(x.dtype)
    return found


OPERATORS: dict[str, Operator] = {
    "Add": lambda operands, _: real(operands[0]) + real(operands[1]),
    "Mul": lambda operands, _: real(operands[0]) * real(operands[1]),
    "Sub": lambda operands, _: real(operands[0]) - real(operands[1]),
    "Div": lambda operands, _: _divide(real(operands[0]), real(operands[1])),
    "Sqrt": lambda operands, _: np.sqrt(real(operands[0])),
    "Clip": _clip,
}
