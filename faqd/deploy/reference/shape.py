"""Other axes, another order, several tensors as one: codes pass through."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.deploy.reference.values import Attributes, Operator, Value
from faqd.reference import Array, moved, real, transposed


def _reshape(operands: list[Value], attributes: Attributes) -> Value:
    zero_keeps = not attributes.get("allowzero", 0)

    def reshaped(values: Array) -> Array:
        wanted = [values.shape[i] if int(n) == 0 and zero_keeps else int(n) for i, n in enumerate(operands[1])]
        return values.reshape(wanted)

    return moved(operands[0], reshaped)


def _flatten(operands: list[Value], attributes: Attributes) -> Value:
    axis = attributes.get("axis", 1)
    return moved(operands[0], lambda v: v.reshape(int(np.prod(v.shape[:axis], dtype=int)), -1))


def _concat(operands: list[Value], attributes: Attributes) -> Value:
    return np.concatenate([real(x) for x in operands], attributes["axis"])


def _squeeze(operands: list[Value], attributes: Attributes) -> Value:
    axes = tuple(int(a) for a in operands[1]) if len(operands) > 1 else None
    return moved(operands[0], lambda v: np.squeeze(v, axes))


def _unsqueeze(operands: list[Value], attributes: Attributes) -> Value:
    return moved(operands[0], lambda v: np.expand_dims(v, tuple(int(a) for a in operands[1])))


def _depth_to_space(operands: list[Value], attributes: Attributes) -> Value:
    block, columns_first = attributes["blocksize"], attributes.get("mode", b"DCR") == b"CRD"

    def spread(values: NDArray[Any]) -> NDArray[Any]:
        n, c, h, w = values.shape
        if columns_first:
            parts = values.reshape(n, c // block**2, block, block, h, w).transpose(0, 1, 4, 2, 5, 3)
        else:
            parts = values.reshape(n, block, block, c // block**2, h, w).transpose(0, 3, 4, 1, 5, 2)
        result: NDArray[Any] = parts.reshape(n, c // block**2, h * block, w * block)
        return result

    return moved(operands[0], spread)


def _cast(operands: list[Value], attributes: Attributes) -> Value:
    x = real(operands[0])
    if attributes["to"] not in _TYPES:
        raise ValueError("known only to bool, int32, int64, float and double")
    return x.astype(_TYPES[attributes["to"]])


_TYPES: dict[int, Any] = {1: np.float64, 6: np.int32, 7: np.int64, 9: np.bool_, 11: np.float64}


def _expand(operands: list[Value], attributes: Attributes) -> Value:
    shape = [int(n) for n in operands[1]]
    return moved(operands[0], lambda values: np.broadcast_to(values, np.broadcast_shapes(values.shape, shape)))


OPERATORS: dict[str, Operator] = {
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": lambda operands, a: transposed(operands[0], a.get("perm")),
    "Concat": _concat,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Cast": _cast,
    "Shape": lambda operands, a: np.array(real(operands[0]).shape[a.get("start", 0) : a.get("end")], np.int64),
    "Identity": lambda operands, _: operands[0],
}
