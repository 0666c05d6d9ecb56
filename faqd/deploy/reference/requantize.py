"""Rounding to codes, and back."""

from __future__ import annotations

import numpy as np

from faqd.deploy.reference.values import Attributes, Operator, Value
from faqd.reference import Grid, real


def _quantize(operands: list[Value], attributes: Attributes) -> Value:
    x, scale, zero_point = [*operands, np.zeros((), np.uint8)][:3]  # without a zero point ONNX means uint8 0
    if scale.size != 1 or not scale > 0:
        raise ValueError("an activation needs one scale above zero")
    limits = np.iinfo(zero_point.dtype)
    codes = np.rint(real(x) / float(scale.item())) + int(zero_point.item())
    return np.clip(codes, limits.min, limits.max).astype(zero_point.dtype)


def _dequantize(operands: list[Value], attributes: Attributes) -> Value:
    codes, scale, zero_point = [*operands, np.zeros((), np.int64)][:3]
    if not np.all(scale > 0):
        raise ValueError("every scale must be above zero")
    shape = [1] * codes.ndim
    if scale.size > 1:
        shape[attributes.get("axis", 1)] = -1
    else:
        scale, shape = scale.reshape(()), []
    return Grid(codes.astype(np.float64) - zero_point.astype(np.float64).reshape(shape), scale.reshape(shape))


OPERATORS: dict[str, Operator] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
}
