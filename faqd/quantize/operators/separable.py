"""What weighs pixels of rows and of columns by numbers that no ONNX operator has: products with two constant matrices.

Resizing by cubic splines, or by a factor that is not the ratio of the sizes, and averages over windows of several
sizes. They have no integer form, and stay float.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from faqd.quantize.operators.emit import Emission, Value
from faqd.quantize.operators.row import Call, Operator, is_number
from faqd.quantize.operators.treatment import ISLAND


class Separable(nn.Module):
    """rows @ x @ columns^T, of maps x (N, C, H, W). rows: (H', H), columns: (W', W), float32."""

    rows: Tensor
    columns: Tensor

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows.float())
        self.register_buffer("columns", columns.float())

    def forward(self, x: Tensor) -> Tensor:
        return self.rows @ x @ self.columns.mT

    def extra_repr(self) -> str:
        return f"{tuple(self.rows.shape)}, {tuple(self.columns.shape)}"


def separable(sizes: Sequence[int], along: Callable[[Tensor, int], Tensor]) -> Separable:
    """Of an operator that works along each axis by itself. sizes: (H, W). along: of maps (1, C, H, 1) or (1, C, 1, W)
    and the axis, what the operator makes of them."""
    height, width = sizes
    rows = along(torch.eye(height, dtype=torch.float64).reshape(1, height, height, 1), 2)
    columns = along(torch.eye(width, dtype=torch.float64).reshape(1, width, 1, width), 3)
    return Separable(rows[0, :, :, 0].mT, columns[0, :, 0, :].mT)


def resized(call: Call) -> nn.Module | None:
    """A resize of maps, by what torch itself makes of single pixels."""
    sizes = call.before[2:]
    if len(sizes) != 2 or not all(map(is_number, sizes)):
        return None
    target: Any = call.node.target
    wanted, factors = call.get("output_size"), call.get("scale_factors")
    rest = {"align_corners": call["align_corners"]} if call.get("align_corners") is not None else {}

    def along(x: Tensor, axis: int) -> Tensor:
        def alone(values: Any, other: Any) -> Any:
            return None if values is None else [value if 2 + i == axis else other for i, value in enumerate(values)]

        found: Tensor = target(x, alone(wanted, 1), **rest, scale_factors=alone(factors, 1.0))
        return found

    return separable(sizes, along)


def _emit(emission: Emission) -> Value:
    rows = emission.number("rows", emission.module.rows)
    columns = emission.number("columns", emission.module.columns.mT.contiguous())
    return emission.op("MatMul", emission.op("MatMul", rows, emission.x), columns)


OPERATORS = (
    Operator(
        "other",
        (Separable,),
        {"upsample_bicubic2d": resized},
        emit=_emit,
        stands_for="cubic resizing, resizing by a fraction, averages over windows of several sizes (products with two "
        "constant matrices)",
        treatment=ISLAND,
    ),
)
