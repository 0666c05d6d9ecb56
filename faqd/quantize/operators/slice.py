"""Pieces of a tensor: chunks, slices, single places of an axis. Codes pass through them unchanged."""

from __future__ import annotations

import operator
import sys
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from faqd.quantize.operators.emit import Emission, Value
from faqd.quantize.operators.row import Call, Operator, Pieces, is_number, sizes
from faqd.quantize.operators.treatment import PASSED


class Part(nn.Module):
    """One piece of what chunk or split returns: `start` up to `end` of `axis`."""

    def __init__(self, axis: int, start: int, end: int) -> None:
        super().__init__()
        self.axis, self.start, self.end = axis, start, end

    def forward(self, x: Tensor) -> Tensor:
        return x.narrow(self.axis, self.start, self.end - self.start)


def _chunk(call: Call) -> Any:
    pieces = [tuple(value.shape) for value in call.node.meta["val"]]
    axis = int(call.get("dim") or 0) % len(call.before)
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + piece[axis])
    if not all(map(is_number, ends)):
        return None
    return Pieces([partial(call.module, Part(axis, start, end)) for start, end in pairwise(ends)])


def _unbind(call: Call) -> Any:
    axis = int(call["dim"]) % len(call.before)
    count = call.before[axis]
    if not is_number(count):
        return None
    return Pieces([partial(_index, call, axis, index) for index in range(count)])


def _index(call: Call, axis: int, index: Any) -> fx.Node:
    return call.function(operator.getitem, call.x, (*[slice(None)] * axis, index))


def _slice(call: Call) -> Any:
    axis = int(call["dim"]) % len(call.before)
    start, end, step = call.get("start") or 0, call.get("end"), call.get("step") or 1
    if isinstance(start, fx.Node) or isinstance(end, fx.Node) or isinstance(step, fx.Node):
        return None if call.before[axis] != call.after[axis] else call.x
    if (start == 0 and step == 1 and (end is None or end == sys.maxsize)) or (
        is_number(call.before[axis]) and call.before[axis] == call.after[axis]
    ):
        return call.x
    return _index(call, axis, slice(start or None, None if end == sys.maxsize else end, None if step == 1 else step))


def _select(call: Call) -> Any:
    axis, index = int(call["dim"]) % len(call.before), call["index"]
    return _index(call, axis, index) if is_number(index) else None


def _narrow(call: Call) -> Any:
    axis, start, length = int(call["dim"]) % len(call.before), call["start"], call["length"]
    return _index(call, axis, slice(start, start + length)) if is_number(start) and is_number(length) else None


def _slice_scatter(call: Call) -> Any:
    """x with another tensor in the place of a slice."""
    axis, between = int(call["dim"]) % len(call.before), call["src"]
    if sizes(between) == call.before:
        return between
    start, end = call.get("start") or 0, call.get("end")
    if axis == 0 or call["step"] != 1 or not (is_number(start) and is_number(call.before[axis])):
        return None
    length = call.before[axis]
    start, end, _ = slice(start, end).indices(length)
    parts = [
        *([call.module(Part(axis, 0, start), word="getitem")] if start else []),
        between,
        *([call.module(Part(axis, end, length), word="getitem")] if end < length else []),
    ]
    return call.function(torch.cat, parts, axis)


def _emit_part(emission: Emission) -> Value:
    part = emission.module
    borders = (emission.number(name, [getattr(part, name)]) for name in ("start", "end", "axis"))
    return emission.op("Slice", emission.x, *borders)


def _emit_index(emission: Emission) -> Value | None:
    """Slices at once, then the places of single numbers, whose axes go."""
    given: Any = emission.node.args[1]
    index = given if isinstance(given, tuple) else (given,)
    if not all(isinstance(each, int) or _is_settled(each) for each in index):
        return None
    slices = {axis: each for axis, each in enumerate(index) if isinstance(each, slice) and each != slice(None)}
    result = emission.x
    if slices:
        borders = {
            "starts": [each.start or 0 for each in slices.values()],
            "ends": [sys.maxsize if each.stop is None else each.stop for each in slices.values()],
            "axes": list(slices),
            "steps": [each.step or 1 for each in slices.values()],
        }
        result = emission.op("Slice", result, *(emission.number(*each) for each in borders.items()))
    for axis in reversed(range(len(index))):
        if not isinstance(index[axis], slice):
            result = emission.op("Gather", result, emission.number(f"index_{axis}", index[axis]), axis=axis)
    return result


def _is_settled(index: Any) -> bool:
    borders = (index.start, index.stop, index.step) if isinstance(index, slice) else (index,)
    return isinstance(index, slice) and all(border is None or isinstance(border, int) for border in borders)


OPERATORS = (
    Operator(
        "reshape",
        (Part,),
        {
            **dict.fromkeys(
                ("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"), _chunk
            ),
        },
        emit=_emit_part,
        stands_for="chunk, split",
        treatment=PASSED,
    ),
    Operator(
        "reshape",
        (operator.getitem,),
        {"unbind": _unbind, "slice": _slice, "select": _select, "narrow": _narrow, "slice_scatter": _slice_scatter},
        emit=_emit_index,
        stands_for="slice, select, narrow, unbind, writing into a slice",
        treatment=PASSED,
    ),
)
