"""Activations of the reference: what each ONNX operator computes on float64 values.

Attributes are float32 numbers, widened.
"""

from __future__ import annotations

import numpy as np

from faqd.deploy.reference.values import Attributes, Operator, Value
from faqd.exact_math import erf, exp, log1p, sigmoid, tanh
from faqd.reference import Array, real


def _leaky_relu(operands: list[Value], attributes: Attributes) -> Value:
    x = real(operands[0])
    return np.where(x >= 0, x, x * attributes.get("alpha", _float32(0.01)))


def _prelu(operands: list[Value], attributes: Attributes) -> Value:
    x, slope = map(real, operands)
    return np.where(x >= 0, x, x * slope)


def _elu(operands: list[Value], attributes: Attributes) -> Value:
    x = real(operands[0])
    return np.where(x >= 0, x, (exp(x) - 1.0) * attributes.get("alpha", 1.0))


def _softplus(operands: list[Value], attributes: Attributes) -> Value:
    x = real(operands[0])
    return np.maximum(x, 0.0) + log1p(exp(-np.abs(x)))


def _float32(number: float) -> float:
    return float(np.float32(number))


def _hard_sigmoid(operands: list[Value], attributes: Attributes) -> Value:
    return _hard(real(operands[0]), attributes.get("alpha", _float32(0.2)), attributes.get("beta", 0.5))


def _hard_swish(operands: list[Value], attributes: Attributes) -> Value:
    x = real(operands[0])
    return x * _hard(x, _float32(1 / 6), 0.5)


def _hard(x: Array, alpha: float, beta: float) -> Array:
    limited: Array = np.clip(x * alpha + beta, 0.0, 1.0)
    return limited


OPERATORS: dict[str, Operator] = {
    "Relu": lambda operands, _: np.maximum(real(operands[0]), 0),
    "LeakyRelu": _leaky_relu,
    "PRelu": _prelu,
    "Elu": _elu,
    "Softplus": _softplus,
    "Sigmoid": lambda operands, _: sigmoid(real(operands[0])),
    "Tanh": lambda operands, _: tanh(real(operands[0])),
    "Erf": lambda operands, _: erf(real(operands[0])),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
}
