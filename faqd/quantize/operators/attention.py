"""Attention, and what it is made of: products of two activations, and softmax. They stay float, but for the products
where the user wants them of codes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from faqd.quantize.operators.emit import Emission, Size, Value, two
from faqd.quantize.operators.row import ExactForm, Operator
from faqd.quantize.operators.treatment import ISLAND

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default)
ATTENTION = aten.scaled_dot_product_attention.default


class IntegerProduct(nn.Module):
    """The product of two matrices of codes: exact integer sums, times both scales (float32 scalars)."""

    left_scale: Tensor
    right_scale: Tensor

    def __init__(self, left_scale: Tensor, right_scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("left_scale", left_scale.detach().float().reshape(()))
        self.register_buffer("right_scale", right_scale.detach().float().reshape(()))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        scales = self.left_scale.double(), self.right_scale.double()
        codes = ((x / scale).round_() for x, scale in zip((left, right), scales, strict=True))
        return torch.matmul(*codes) * (scales[0] * scales[1])


def _emit_softmax(emission: Emission) -> Value | None:
    module, operator = emission.module, "Softmax"
    axis = emission.given["dim"] if module is None else module.dim
    if axis is None:
        return None
    if isinstance(module, nn.LogSoftmax) or (module is None and "log" in str(emission.node.target)):
        operator = "LogSoftmax"
    return emission.op(operator, emission.x, axis=axis % len(emission.before))


def _emit_attention(emission: Emission) -> Value | None:
    """softmax(q k^T scale + mask) v, as F.scaled_dot_product_attention computes it."""
    given = emission.given
    queries, keys = emission.sizes("query"), emission.sizes("key")
    mask = _mask(emission, queries[-2], keys[-2])
    if given.get("enable_gqa") or given.get("dropout_p") or not isinstance(queries[-1], int) or mask is False:
        return None
    scale: Any = given.get("scale")
    scale = 1 / math.sqrt(queries[-1]) if scale is None else scale
    order = [*range(len(keys) - 2), len(keys) - 1, len(keys) - 2]
    scaled = emission.op("Mul", emission.value("query"), emission.number("scale", float(scale)))
    scores = emission.op("MatMul", scaled, emission.op("Transpose", emission.value("key"), perm=order))
    if mask is not None:
        scores = emission.op("Add", scores, mask)
    return emission.op("MatMul", emission.op("Softmax", scores, axis=len(order) - 1), emission.value("value"))


def _mask(emission: Emission, rows: Size, columns: Size) -> Value | bool | None:
    """What is added to the scores; None for nothing, False for what no constant can be."""
    if not emission.given.get("is_causal"):
        return emission.value("attn_mask")
    if not (isinstance(rows, int) and isinstance(columns, int)):
        return False
    later = torch.ones(rows, columns).triu(1).bool()
    return emission.number("causal", torch.zeros(rows, columns).masked_fill(later, -torch.inf))


OPERATORS = (
    Operator(
        "other",
        (nn.Softmax, nn.LogSoftmax, aten.softmax.int, aten._softmax.default, aten.log_softmax.int),
        emit=_emit_softmax,
        stands_for="softmax, log softmax",
        treatment=ISLAND,
    ),
    Operator(
        "other",
        PRODUCTS,
        emit=two("MatMul"),
        stands_for="products of two activations (of codes with `--attention int8`)",
        treatment=ISLAND,
    ),
    Operator(
        "other",
        (ATTENTION,),
        emit=_emit_attention,
        stands_for="scaled dot-product attention",
        treatment=ISLAND,
    ),
)
EXACT_FORMS = (ExactForm(IntegerProduct, two("MatMul")),)
