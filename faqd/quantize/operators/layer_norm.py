"""Norms over what one image has: layer norm, group norm, instance norm. They have no integer form, and stay float."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from faqd.quantize.operators.emit import Emission, Value, settled
from faqd.quantize.operators.row import Operator
from faqd.quantize.operators.treatment import ISLAND

aten = torch.ops.aten


def _emit_layer_norm(emission: Emission) -> Value:
    module = emission.module
    if module is None:
        given, sizes = emission.given, emission.given["normalized_shape"]
        weight, bias, eps = emission.value("weight"), emission.value("bias"), given["eps"]
    else:
        sizes, eps = module.normalized_shape, module.eps
        weight, bias = (_own(emission, name) for name in ("weight", "bias"))
    weight = emission.number("ones", torch.ones(tuple(sizes))) if weight is None else weight
    operands = (emission.x, weight) if bias is None else (emission.x, weight, bias)
    return emission.op("LayerNormalization", *operands, axis=-len(sizes), epsilon=eps)


def _emit_group_norm(emission: Emission) -> Value | None:
    """An instance norm of the groups, then the channels' own factors."""
    module, after = emission.module, settled(emission.after[1:])
    if after is None:
        return None
    if module is None:
        groups, eps = emission.given["num_groups"], emission.given["eps"]
        factors = {name: emission.value(name) for name in ("weight", "bias")}
    else:
        groups, eps = module.num_groups, module.eps
        factors = {name: _own(emission, name) for name in ("weight", "bias")}
    parts = [0, groups, math.prod(after) // groups]
    apart = emission.op("Reshape", emission.x, emission.number("groups", parts))
    neutral = emission.number("ones", torch.ones(groups)), emission.number("zeros", torch.zeros(groups))
    normed = emission.op("InstanceNormalization", apart, *neutral, epsilon=eps)
    result = emission.op("Reshape", normed, emission.number("sizes", [0, *after]))
    per_channel = emission.number("per_channel", [-1, *[1] * (len(after) - 1)])
    for operator, value in (("Mul", factors["weight"]), ("Add", factors["bias"])):
        if value is not None:
            result = emission.op(operator, result, emission.op("Reshape", value, per_channel))
    return result


def _own(emission: Emission, name: str) -> Value | None:
    """A parameter of the module, which may be left out."""
    value: Any = getattr(emission.module, name, None)
    return None if value is None else emission.number(name, value)


OPERATORS = (
    Operator(
        "other",
        (nn.LayerNorm, aten.layer_norm.default),
        emit=_emit_layer_norm,
        stands_for="layer norm",
        treatment=ISLAND,
    ),
    Operator(
        "other",
        (nn.GroupNorm, aten.group_norm.default),
        emit=_emit_group_norm,
        stands_for="group norm",
        treatment=ISLAND,
    ),
)
