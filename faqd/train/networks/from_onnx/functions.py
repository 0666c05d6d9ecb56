"""Nodes without weights that compute: activations, arithmetic, reductions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from faqd.train.networks.from_onnx.builder import Node, Ref, Rule

_TYPES = {1: torch.float32, 11: torch.float64, 6: torch.int32, 7: torch.int64, 9: torch.bool}
"""By their number in ONNX."""


def _activation(make: Callable[[Node], nn.Module]) -> Rule:
    return lambda node: node.module(make(node), node.ref())


def _of_x(function: Callable[..., Any]) -> Rule:
    return lambda node: node.function(function, node.ref())


def _alpha(node: Node, default: float) -> float:
    return float(node.setting("alpha", default=default))


def _decimal(value: Any) -> float:
    """A number as it was written before it was a float32: 0.1 and not 0.10000000149."""
    return float(str(np.float32(value)))


def _hard_sigmoid(node: Node) -> Any:
    slope, offset = _alpha(node, 0.2), float(node.setting("beta", default=0.5))
    if math.isclose(slope, 1 / 6, rel_tol=1e-6) and offset == 0.5:
        return node.module(nn.Hardsigmoid(), node.ref())
    return node.function(_limited_line, node.ref(), _decimal(slope), _decimal(offset))


def _limited_line(x: Tensor, slope: float, offset: float) -> Tensor:
    return (x * slope + offset).clamp(0.0, 1.0)


def _clip(node: Node) -> Any:
    low, high = node.setting("min", 1), node.setting("max", 2)
    low, high = (each[0] if isinstance(each, list) else each for each in (low, high))
    low = None if low is None or low < -3e38 else _decimal(low)
    high = None if high is None or high > 3e38 else _decimal(high)
    if low is None and high is None:
        return node.ref()
    if low == 0 and high is None:
        return node.module(nn.ReLU(), node.ref())
    if low is not None and high is not None:
        return node.module(nn.ReLU6() if (low, high) == (0, 6) else nn.Hardtanh(low, high), node.ref())
    return node.function(torch.clamp, node.ref(), min=low, max=high)


def _gelu(node: Node) -> nn.Module:
    return nn.GELU(node.setting("approximate", default="none"))


def _softmax(kind: Callable[[int], nn.Module]) -> Rule:
    def rule(node: Node) -> Any:
        shape = node.ref().shape
        axis = int(node.setting("axis", default=1 if node.opset < 13 else -1)) % len(shape)
        if node.opset < 13 and math.prod(shape[axis + 1 :]) != 1:
            raise node.refusal("is a softmax over several axes, as before opset 13; convert the file to opset 13")
        return node.module(kind(axis), node.ref())

    return rule


# Arithmetic -------------------------------------------------------------------------------------------------------


def _two(function: Callable[..., Any], idle: float | None = None) -> Rule:
    """idle: the constant second operand that changes nothing."""

    def rule(node: Node) -> Any:
        first, second = (_operand(node, index) for index in (0, 1))
        if idle is not None and isinstance(first, Ref) and isinstance(second, float) and second == idle:
            return first
        return node.function(function, first, second)

    return rule


def _operand(node: Node, index: int) -> Any:
    """A constant of one element is a number, as torch's rules for numbers know it."""
    value, other = node.at(index), node.at(1 - index)
    if isinstance(value, np.ndarray) and value.size == 1 and isinstance(other, Ref) and value.ndim <= len(other.shape):
        number = value.reshape(()).item()
        return _decimal(number) if value.dtype == np.float32 else number
    return value


def _all(function: Callable[..., Any], limit: Callable[..., Any] | None = None) -> Rule:
    """Of any number of operands, two by two. limit: the function for a number as the second."""

    def rule(node: Node) -> Any:
        result: Any = node.inputs[0]
        for index in range(1, len(node.inputs)):
            value = _operand(node, index) if len(node.inputs) == 2 else node.inputs[index]
            if isinstance(result, np.ndarray):
                result, value = value, result
            if limit is not None and isinstance(value, np.ndarray) and value.size == 1:
                value = _decimal(value.reshape(()).item())
            use = limit if limit is not None and isinstance(value, float) else function
            result = node.function(use, result, value, beside="" if index == 1 else f"{index}")
        return result

    return rule


def _mean_of_all(node: Node) -> Any:
    total = _all(operator.add)(node)
    return node.function(operator.mul, total, 1 / len(node.inputs), beside="mean")


def _power(node: Node) -> Any:
    exponent = _operand(node, 1)
    return node.function(torch.pow, node.ref(), exponent)


def _modulo(node: Node) -> Any:
    return node.function(torch.fmod if node.setting("fmod") else torch.remainder, *node.inputs)


def _cast(node: Node) -> Any:
    wanted = _TYPES.get(int(node.setting("to")))
    if wanted is None:
        raise node.refusal("changes the type of numbers in the middle of the network; save it in float32 throughout")
    return node.ref() if node.ref().fake.dtype == wanted else node.function(_as_type, node.ref(), wanted)


def _as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


# Reductions -------------------------------------------------------------------------------------------------------


def _reduction(function: Callable[..., Any]) -> Rule:
    def rule(node: Node) -> Any:
        axes = node.setting("axes", 1)
        if not axes:
            if node.setting("noop_with_empty_axes"):
                return node.ref()
            axes = list(range(len(node.ref().shape)))
        axes = tuple(sorted(axis % len(node.ref().shape) for axis in axes))
        return node.function(function, node.ref(), axes, bool(node.setting("keepdims", default=1)))

    return rule


def _length(x: Tensor, axes: tuple[int, ...], keep: bool, order: float) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, order, axes, keep)
    return length


def _sum_of_squares(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return (x * x).sum(axes, keep)


def _argument(function: Callable[..., Any]) -> Rule:
    def rule(node: Node) -> Any:
        axis, keep = int(node.setting("axis", default=0)), bool(node.setting("keepdims", default=1))
        return node.function(function, node.ref(), axis, keep)

    return rule


def _top_k(node: Node) -> Any:
    count = node.setting("k", 1)
    count = count[0] if isinstance(count, list) else count
    axis = int(node.setting("axis", default=-1))
    return node.function(torch.topk, node.ref(), int(count), axis, bool(node.setting("largest", default=1)))


def _einsum(node: Node) -> Any:
    return node.function(_summed, node.setting("equation"), list(node.inputs))


def _summed(equation: str, operands: list[Tensor]) -> Tensor:
    return torch.einsum(equation, operands)


def _swish(node: Node) -> Any:
    alpha = _alpha(node, 1.0)
    return node.module(nn.SiLU(), node.ref()) if alpha == 1 else node.function(_swish_of, node.ref(), alpha)


def _swish_of(x: Tensor, alpha: float) -> Tensor:
    return x * torch.sigmoid(x * alpha)


RULES: dict[str, Rule] = {
    "Relu": _activation(lambda node: nn.ReLU()),
    "Sigmoid": _activation(lambda node: nn.Sigmoid()),
    "Tanh": _activation(lambda node: nn.Tanh()),
    "LeakyRelu": _activation(lambda node: nn.LeakyReLU(_decimal(_alpha(node, 0.01)))),
    "Elu": _activation(lambda node: nn.ELU(_decimal(_alpha(node, 1.0)))),
    "Celu": _activation(lambda node: nn.CELU(_decimal(_alpha(node, 1.0)))),
    "Selu": _activation(lambda node: nn.SELU()),
    "HardSwish": _activation(lambda node: nn.Hardswish()),
    "Softplus": _activation(lambda node: nn.Softplus()),
    "Softsign": _activation(lambda node: nn.Softsign()),
    "Mish": _activation(lambda node: nn.Mish()),
    "Gelu": _activation(_gelu),
    "Swish": _swish,
    "HardSigmoid": _hard_sigmoid,
    "Clip": _clip,
    "Softmax": _softmax(lambda axis: nn.Softmax(axis)),
    "LogSoftmax": _softmax(lambda axis: nn.LogSoftmax(axis)),
    "Erf": _of_x(torch.erf),
    "Exp": _of_x(torch.exp),
    "Log": _of_x(torch.log),
    "Sqrt": _of_x(torch.sqrt),
    "Abs": _of_x(torch.abs),
    "Neg": _of_x(torch.neg),
    "Reciprocal": _of_x(torch.reciprocal),
    "Floor": _of_x(torch.floor),
    "Ceil": _of_x(torch.ceil),
    "Round": _of_x(torch.round),
    "Sign": _of_x(torch.sign),
    "Sin": _of_x(torch.sin),
    "Cos": _of_x(torch.cos),
    "Not": _of_x(torch.logical_not),
    "Cast": _cast,
    "Add": _two(operator.add, 0),
    "Sub": _two(operator.sub, 0),
    "Mul": _two(operator.mul, 1),
    "Div": _two(operator.truediv, 1),
    "Pow": _power,
    "Mod": _modulo,
    "Greater": _two(torch.gt),
    "GreaterOrEqual": _two(torch.ge),
    "Less": _two(torch.lt),
    "LessOrEqual": _two(torch.le),
    "Equal": _two(torch.eq),
    "And": _two(torch.logical_and),
    "Or": _two(torch.logical_or),
    "Where": lambda node: node.function(torch.where, *node.inputs),
    "Sum": _all(operator.add),
    "Mean": _mean_of_all,
    "Max": _all(torch.maximum, torch.clamp_min),
    "Min": _all(torch.minimum, torch.clamp_max),
    "ReduceMean": _reduction(torch.mean),
    "ReduceSum": _reduction(torch.sum),
    "ReduceMax": _reduction(torch.amax),
    "ReduceMin": _reduction(torch.amin),
    "ReduceL1": _reduction(partial(_length, order=1)),
    "ReduceL2": _reduction(partial(_length, order=2)),
    "ReduceSumSquare": _reduction(_sum_of_squares),
    "ArgMax": _argument(torch.argmax),
    "ArgMin": _argument(torch.argmin),
    "TopK": _top_k,
    "Einsum": _einsum,
}
