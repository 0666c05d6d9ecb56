"""Padding."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.deploy.reference.values import Attributes, Operator, Value
from faqd.reference import moved, real


def _pad(operands: list[Value], attributes: Attributes) -> Value:
    x, pads, value, axes = [*operands, None, None][:4]
    mode = attributes.get("mode", b"constant").decode()
    number = 0.0 if value is None else float(real(value).reshape(()))
    if mode not in ("constant", "reflect", "edge", "wrap"):  # which numpy calls the same
        raise ValueError(f"no mode {mode}")
    numpy_mode: Any = mode
    filling: dict[str, Any] = {"constant_values": number} if mode == "constant" else {}

    def padded(values: NDArray[Any]) -> NDArray[Any]:
        at = range(values.ndim) if axes is None else [int(a) % values.ndim for a in axes]
        widths = [(0, 0)] * values.ndim
        for index, axis in enumerate(at):
            widths[axis] = (int(pads[index]), int(pads[index + len(at)]))
        result: NDArray[Any] = np.pad(values, widths, mode=numpy_mode, **filling)
        return result

    return moved(x, padded) if mode != "constant" or number == 0 else padded(real(x))


OPERATORS: dict[str, Operator] = {
    "Pad": _pad,
}
