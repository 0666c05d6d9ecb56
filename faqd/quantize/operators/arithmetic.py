"""Sums and products: of two tensors, or with numbers of the network's own."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from faqd.quantize.operators.emit import Emission, Value, two
from faqd.quantize.operators.norm import ChannelAffine
from faqd.quantize.operators.row import OWN, Call, ExactForm, Operator
from faqd.quantize.operators.treatment import Treatment


class Scaled(nn.Module):
    """Numbers of the network's own: x * factor + offset.

    A tensor meets x without changing its shape; a parameter is trained.
    """

    factor: float | Tensor
    offset: float | Tensor

    def __init__(self, factor: float | Tensor, offset: float | Tensor) -> None:
        super().__init__()
        for name, value in (("factor", factor), ("offset", offset)):
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                # Integers and truth values meet floats as floats.
                self.register_buffer(name, value if value.is_floating_point() else value.float())
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.offset

    def extra_repr(self) -> str:
        return ", ".join(f"{n:g}" if isinstance(n, float) else str(tuple(n.shape)) for n in (self.factor, self.offset))


class Offset(nn.Module):
    """x + offset, a float32 number."""

    offset: Tensor

    def __init__(self, offset: Tensor) -> None:
        super().__init__()
        self.register_buffer("offset", offset.float().reshape(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offset


def is_a_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def plus(call: Call, a: Any, b: Any) -> Any:
    if is_a_number(a) or is_a_number(b):
        x, number = (b, a) if is_a_number(a) else (a, b)
        return call.module(Scaled(1.0, float(number)), x)
    return call.function(operator.add, a, b)


def _minus(call: Call, a: Any, b: Any) -> Any:
    if is_a_number(b):
        return call.module(Scaled(1.0, -float(b)), a)
    if is_a_number(a):
        return call.module(Scaled(-1.0, float(a)), b)
    return call.function(operator.sub, a, b)


def times(call: Call, a: Any, b: Any) -> Any:
    if is_a_number(a) and is_a_number(b):
        return a * b
    if is_a_number(a) or is_a_number(b):
        x, number = (b, a) if is_a_number(a) else (a, b)
        return x if number == 1 else call.module(Scaled(float(number), 0.0), x)
    return call.function(operator.mul, a, b)


def _by(call: Call, a: Any, b: Any) -> Any:
    if is_a_number(b) and b != 0:
        return call.module(Scaled(1.0 / float(b), 0.0), a)
    return call.function(operator.truediv, a, b)


def _scaled_by_alpha(call: Call, value: Any) -> Any:
    alpha = call.get("alpha")
    return value if alpha is None else times(call, value, alpha)


def _add(call: Call) -> Any:
    return plus(call, call["self"], _scaled_by_alpha(call, call["other"]))


def _sub(call: Call) -> Any:
    return _minus(call, call["self"], _scaled_by_alpha(call, call["other"]))


def _rsub(call: Call) -> Any:
    return _minus(call, call["other"], _scaled_by_alpha(call, call["self"]))


def _lerp(call: Call) -> Any:
    a, b, weight = call["self"], call["end"], call["weight"]
    if not is_a_number(weight):
        return plus(call, a, times(call, weight, _minus(call, b, a)))
    if weight == 0.5:  # the mean of two is one sum and one multiple, whose codes are those of any other mean
        return times(call, plus(call, a, b), 0.5)
    return plus(call, times(call, a, 1 - weight), times(call, b, weight))


class Stacked(list[Any]):
    """Tensors on a new axis, of which nothing but the sum or the mean is taken."""

    def sum(self, call: Call) -> Any:
        first, *others = self
        for other in others:
            first = plus(call, first, other)
        return first


def _div(call: Call) -> Any:
    return None if call.get("rounding_mode") else _by(call, call["self"], call["other"])


def _of_two(module: Any, node: fx.Node) -> str | None:
    tensors = [argument for argument in node.args if isinstance(argument, fx.Node) and "tensor_meta" in argument.meta]
    if len(tensors) != 2:
        return (
            "only the sum or product of two tensors can be quantized yet; --exclude with a regular expression that "
            "fits this path keeps it float."
        )
    if any(tensor.meta[OWN] for tensor in tensors):
        return (
            "a parameter that makes the other operand larger, or that differs between images, cannot be quantized "
            "yet; --exclude with a regular expression that fits this path keeps the operator float."
        )
    return None


SUBTRACT = (operator.sub,)


def _exact(scaled: Any, dimensions: int) -> nn.Module:
    return ChannelAffine(torch.as_tensor(scaled.factor).detach(), torch.as_tensor(scaled.offset).detach())


def _emit_scaled(emission: Emission) -> Value:
    result, scaled = emission.x, emission.module
    if isinstance(scaled.factor, Tensor) or scaled.factor != 1:
        result = emission.op("Mul", result, emission.number("factor", scaled.factor))
    if isinstance(scaled.offset, Tensor) or scaled.offset != 0:
        result = emission.op("Add", result, emission.number("offset", scaled.offset))
    return result


def _emit_offset(emission: Emission) -> Value:
    return emission.op("Add", emission.x, emission.number("offset", emission.module.offset))


def _emit_sum(emission: Emission) -> Value:
    return two("Sub" if emission.node.target in SUBTRACT else "Add")(emission)


OPERATORS = (
    Operator(
        "add",
        (operator.add, operator.sub, Tensor.add_),
        {
            "add": _add,
            **dict.fromkeys(("sub", "subtract"), _sub),
            "rsub": _rsub,
            "addcmul": lambda call: plus(
                call, call["self"], times(call, call["value"], times(call, call["tensor1"], call["tensor2"]))
            ),
            "addcdiv": lambda call: plus(
                call, call["self"], times(call, call["value"], _by(call, call["tensor1"], call["tensor2"]))
            ),
            "lerp": _lerp,
        },
        problem=_of_two,
        emit=_emit_sum,
        stands_for="sum and difference of two tensors; also with `alpha=`, and in `torch.addcmul`, `addcdiv`, `lerp`, "
        "`rsub`",
        treatment=Treatment(
            "its own, if a layer reads it",
            "in the kernel of a layer before it: one operand may stay float",
            "integer where it was measured to be",
        ),
    ),
    Operator(
        "multiply",
        (operator.mul,),
        {
            **dict.fromkeys(("mul", "multiply"), lambda call: times(call, call["self"], call["other"])),
            **dict.fromkeys(("div", "divide", "true_divide"), _div),
            "square": lambda call: times(call, call.x, call.x),
            "pow": lambda call: times(call, call.x, call.x) if call.get("exponent") == 2 else None,
        },
        problem=_of_two,
        emit=two("Mul"),
        stands_for="product of two tensors (squeeze-and-excite), `square`, `x ** 2`",
        treatment=Treatment("its own; both sides are rounded", "float, between quantized tensors", "integer or float"),
    ),
    Operator(
        "curve",
        (Scaled,),
        dict.fromkeys(("neg", "negative"), lambda call: Scaled(-1.0, 0.0)),
        exact=_exact,
        emit=_emit_scaled,
        stands_for="sum and product with a number, a parameter or a buffer",
        treatment=Treatment("signed 8 bits", "float", "float"),
    ),
)
EXACT_FORMS = (ExactForm(Offset, _emit_offset, lambda made: {"offset": made.offset}),)
