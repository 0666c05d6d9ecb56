"""Batch norm."""

from __future__ import annotations

import numpy as np

from faqd.deploy.reference.values import Attributes, Operator, Value
from faqd.reference import real


def _batch_norm(operands: list[Value], attributes: Attributes) -> Value:
    x = real(operands[0])
    per_channel = (-1, *[1] * (x.ndim - 2))
    gamma, beta, mean, variance = (real(v).reshape(per_channel) for v in operands[1:])
    return (x - mean) / np.sqrt(variance + attributes.get("epsilon", 1e-5)) * gamma + beta


OPERATORS: dict[str, Operator] = {
    "BatchNormalization": _batch_norm,
}
