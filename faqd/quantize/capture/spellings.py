"""Torch's other words for sums, products and moves, written out in those that the quantizer knows.

torch.multiply is torch.mul; torch.addcmul(a, b, c) is a + b * c; torch.lerp(a, b, 0.5) is half of a + b.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

SAME: dict[Any, Any] = {
    torch.multiply: torch.mul,
    torch.subtract: torch.sub,
    torch.divide: torch.div,
    torch.true_divide: torch.div,
    torch.negative: torch.neg,
    torch.concatenate: torch.cat,
    torch.swapaxes: torch.transpose,
    torch.swapdims: torch.transpose,
    torch.special.expit: torch.sigmoid,
    "multiply": "mul",
    "subtract": "sub",
    "divide": "div",
    "true_divide": "div",
    "negative": "neg",
    "swapaxes": "transpose",
    "swapdims": "transpose",
}
"""A function or a method -> the one of the same arguments that stands for it."""


def written_out(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """What makes the result of a call by other operators, on tensors or on what stands for them; None where it is one
    operator. target: a function, or the name of a method."""
    rule = _RULES.get(target)
    plain = rule in (_add, _sub, _mul, _div) and not kwargs
    if rule is None or plain or "rounding_mode" in kwargs or "out" in kwargs:
        return None
    return lambda: rule(*args, **kwargs)


def _add(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    return input + _times(alpha, other)


def _sub(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    return input - _times(alpha, other)


def _mul(input: Any, other: Any) -> Any:
    return input * other


def _div(input: Any, other: Any) -> Any:
    return input / other


def _rsub(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    return other - _times(alpha, input)


def _addcmul(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    return input + _times(value, tensor1 * tensor2)


def _addcdiv(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    return input + _times(value, tensor1 / tensor2)


def _lerp(input: Any, end: Any, weight: Any) -> Any:
    if not isinstance(weight, int | float):
        return input + weight * (end - input)
    # The mean of two is one sum and one multiple, whose codes are those of any other mean.
    return (input + end) * 0.5 if weight == 0.5 else input * (1 - weight) + end * weight


def _square(input: Any) -> Any:
    return input * input


def _positive(input: Any) -> Any:
    return input


def _times(number: Any, tensor: Any) -> Any:
    return tensor if number == 1 else tensor * number


_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.add, "add"), _add),
    **dict.fromkeys((torch.sub, "sub"), _sub),
    **dict.fromkeys((torch.mul, "mul"), _mul),
    **dict.fromkeys((torch.div, "div"), _div),
    torch.rsub: _rsub,
    **dict.fromkeys((torch.addcmul, "addcmul"), _addcmul),
    **dict.fromkeys((torch.addcdiv, "addcdiv"), _addcdiv),
    **dict.fromkeys((torch.lerp, "lerp"), _lerp),
    **dict.fromkeys((torch.square, "square"), _square),
    **dict.fromkeys((torch.positive, "positive"), _positive),
}
