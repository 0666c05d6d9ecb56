"""Functions and reductions that have no integer form, and stay float."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch

from faqd.quantize.operators.emit import Emission, Emit, Value, one, settled, two
from faqd.quantize.operators.row import Operator
from faqd.quantize.operators.treatment import ISLAND

aten = torch.ops.aten


def _axes(emission: Emission) -> list[int]:
    given, rank = emission.given.get("dim"), len(emission.before)
    every = list(range(rank)) if given is None or given == [] else [given] if isinstance(given, int) else given
    return [axis % rank for axis in every]


def _reduced(operator_name: str) -> Emit:
    """A reduction, whose axes are a constant."""

    def emit(emission: Emission) -> Value:
        keep = int(bool(emission.given.get("keepdim")))
        return emission.op(operator_name, emission.x, emission.number("axes", _axes(emission)), keepdims=keep)

    return emit


def _emit_length(emission: Emission) -> Value | None:
    kind = {2: "ReduceL2", 1: "ReduceL1"}.get(emission.given["ord"])
    return None if kind is None else _reduced(kind)(emission)


def _emit_variance(emission: Emission) -> Value | None:
    """The mean of the squares around the mean, times n / (n - correction)."""
    axes, given = _axes(emission), emission.given
    sizes = settled([emission.before[axis] for axis in axes])
    correction = given.get("correction", given.get("unbiased"))
    correction = 1 if correction is None else int(correction)
    if sizes is None:
        return None
    count = math.prod(sizes)
    if count <= correction:
        return None
    over = emission.number("axes", axes)
    around = emission.op("Sub", emission.x, emission.op("ReduceMean", emission.x, over, keepdims=1))
    squares = emission.op("Mul", around, around)
    result = emission.op("ReduceMean", squares, over, keepdims=int(bool(given.get("keepdim"))))
    return result if correction == 0 else emission.op("Mul", result, emission.number("n", count / (count - correction)))


def _emit_power(emission: Emission) -> Value | None:
    exponent: Any = emission.given["exponent"]
    if exponent == 0.5:
        return emission.op("Sqrt", emission.x)
    return emission.op("Pow", emission.x, emission.number("exponent", float(exponent)))


def _emit_rsqrt(emission: Emission) -> Value:
    return emission.op("Reciprocal", emission.op("Sqrt", emission.x))


def _emit_limit(emission: Emission) -> Value | None:
    given = emission.given
    low, high = given.get("min"), given.get("max")
    if not all(limit is None or isinstance(limit, int | float) for limit in (low, high)):
        return None
    limits = [None if limit is None else emission.number(name, float(limit)) for name, limit in
              (("low", low), ("high", high))]  # fmt: skip
    return emission.op("Clip", emission.x, *limits)


def _emit_expanded(emission: Emission) -> Value | None:
    """Axes of one repeated; no axis of images, whose number is not known."""
    before, after = emission.before, emission.after
    before = (1,) * (len(after) - len(before)) + before
    wanted = [1 if a == b else b for a, b in zip(before, after, strict=True)]
    known = settled(wanted)
    return None if known is None else emission.op("Expand", emission.x, emission.number("sizes", known))


_FUNCTIONS = {
    "Exp": aten.exp.default,
    "Log": aten.log.default,
    "Sqrt": aten.sqrt.default,
    "Sin": aten.sin.default,
    "Cos": aten.cos.default,
    "Abs": aten.abs.default,
    "Reciprocal": aten.reciprocal.default,
    "Floor": aten.floor.default,
    "Erf": aten.erf.default,
}

OPERATORS = (
    *(
        Operator("other", (function,), emit=one(name), stands_for=f"`{name.lower()}`", treatment=ISLAND)
        for name, function in _FUNCTIONS.items()
    ),
    Operator("other", (aten.rsqrt.default,), emit=_emit_rsqrt, stands_for="`rsqrt`", treatment=ISLAND),
    Operator("other", (aten.pow.Tensor_Scalar,), emit=_emit_power, stands_for="powers", treatment=ISLAND),
    Operator(
        "other",
        (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default),
        emit=_emit_limit,
        stands_for="limits on one side, or whose lower one is above 0",
        treatment=ISLAND,
    ),
    Operator(
        "other",
        (operator.truediv, aten.div.Tensor),
        emit=two("Div"),
        stands_for="quotients of two tensors",
        treatment=ISLAND,
    ),
    Operator("other", (aten.maximum.default,), emit=two("Max"), stands_for="`maximum`", treatment=ISLAND),
    Operator("other", (aten.minimum.default,), emit=two("Min"), stands_for="`minimum`", treatment=ISLAND),
    Operator("other", (aten.amax.default,), emit=_reduced("ReduceMax"), stands_for="`amax`", treatment=ISLAND),
    Operator("other", (aten.amin.default,), emit=_reduced("ReduceMin"), stands_for="`amin`", treatment=ISLAND),
    Operator(
        "other", (aten.linalg_vector_norm.default,), emit=_emit_length, stands_for="vector norms", treatment=ISLAND
    ),
    Operator(
        "other", (aten.var.correction, aten.var.dim), emit=_emit_variance, stands_for="variances", treatment=ISLAND
    ),
    Operator(
        "other",
        (torch.Tensor.expand, torch.Tensor.expand_as),
        emit=_emit_expanded,
        stands_for="expansion of an axis",
        treatment=ISLAND,
    ),
)
