"""Pieces of a tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.deploy.reference.values import Attributes, Operator, Value
from faqd.reference import Grid, moved


def _split(operands: list[Value], attributes: Attributes) -> Value:
    x, sizes = [*operands, None][:2]
    axis = attributes.get("axis", 0)
    length = (x.codes if isinstance(x, Grid) else x).shape[axis]
    if sizes is None:
        each = -(-length // attributes["num_outputs"])
        borders = list(range(each, length, each))
    else:
        borders = [int(border) for border in np.cumsum(sizes)[:-1]]
    starts = [0, *borders]
    ends = [*borders, length]

    def part(start: int, end: int) -> Value:
        return moved(x, lambda values: values.take(np.arange(start, end), axis))

    return tuple(part(start, end) for start, end in zip(starts, ends, strict=True))


def _slice(operands: list[Value], attributes: Attributes) -> Value:
    x, starts, ends, axes, steps = [*operands, None, None][:5]
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps

    def cut(values: NDArray[Any]) -> NDArray[Any]:
        index = [slice(None)] * values.ndim
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            index[int(axis)] = _places(int(start), int(end), int(step), values.shape[int(axis)])
        kept: NDArray[Any] = values[tuple(index)]
        return kept

    return moved(x, cut)


def _places(start: int, end: int, step: int, size: int) -> slice:
    """What ONNX means: backwards, an end before the first value is any number below -size, which Python counts from the
    last one."""
    if step > 0:
        return slice(start, end, step)
    end += size if end < 0 else 0
    return slice(start, end if end >= 0 else None, step)


def _gather(operands: list[Value], attributes: Attributes) -> Value:
    index = operands[1].astype(int)
    return moved(operands[0], lambda values: values.take(index, attributes.get("axis", 0)))


OPERATORS: dict[str, Operator] = {
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
}
