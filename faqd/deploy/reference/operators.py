"""Element-wise and moving operators of the referee: what each ONNX operator computes, on codes where it can.

An operator takes (operands, attributes) and returns a value: a float64 array, an integer array or a Grid; a tuple of
them where it has several outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.deploy.reference import activation
from faqd.reference import Array, Grid, moved, real

Value = Any
Attributes = dict[str, Any]
WHOLE = 1e-6
"""How far from a whole size, relative to it, a float32 scale may lead."""


# Resizing ---------------------------------------------------------------------------------------------------------


def _resize(operands: list[Value], attributes: Attributes) -> Value:
    x, _, scales, sizes = [*operands, None, None, None][:4]
    shape = (x.codes if isinstance(x, Grid) else x).shape
    axes = [int(a) % len(shape) for a in attributes.get("axes", range(len(shape)))]
    wanted = dict.fromkeys(range(len(shape)), 0) | dict(enumerate(shape))
    for index, axis in enumerate(axes):
        wanted[axis] = _resized(shape[axis], scales[index]) if scales is not None and scales.size else int(sizes[index])
    if attributes.get("antialias", 0) or attributes.get("keep_aspect_ratio_policy", b"stretch") != b"stretch":
        raise ValueError("known only without antialias and keep_aspect_ratio_policy")
    rule = attributes.get("coordinate_transformation_mode", b"half_pixel").decode()
    mode = attributes.get("mode", b"nearest").decode()
    nearest = attributes.get("nearest_mode", b"round_prefer_floor").decode()
    if mode == "nearest" and (rule, nearest) == ("asymmetric", "floor"):
        return moved(x, lambda values: _nearest(values, wanted))
    if mode == "linear" and rule in ("half_pixel", "pytorch_half_pixel", "align_corners") and len(shape) == 4:
        codes, scale = (x.codes, x.scale) if isinstance(x, Grid) and x.scale.ndim == 0 else (real(x), np.ones(()))
        for axis, size in wanted.items():
            if axis >= 2:
                codes = _along(codes, axis, size, rule)
        return codes * scale
    raise ValueError(f"no mode {mode} with {rule} and {nearest}")


def _resized(size: int, scale: Any) -> int:
    """The size that a scale leads to, which is a whole one: between others, backends place pixels by a scale that is
    not the ratio of the sizes."""
    exact = float(np.float32(size) * np.float32(scale))
    if abs(exact - round(exact)) > WHOLE * exact:
        raise ValueError(f"known only with scales that lead to whole sizes, not from {size} to {exact:g}")
    return round(exact)


def _nearest(values: NDArray[Any], wanted: dict[int, int]) -> NDArray[Any]:
    for axis, size in wanted.items():
        values = values.take(np.arange(size) * values.shape[axis] // size, axis)
    return values


def _along(values: Array, axis: int, size: int, rule: str) -> Array:
    """Linear interpolation of one axis, two pixels to each result."""
    inputs, index = values.shape[axis], np.arange(size, dtype=np.float64)
    if rule == "align_corners":
        position = index * (inputs - 1) / max(1, size - 1)
    elif rule == "pytorch_half_pixel" and size == 1:
        position = index
    else:
        position = np.maximum((index + 0.5) * inputs / size - 0.5, 0.0)
    low = np.minimum(np.floor(position), inputs - 1)
    second = (position - low).reshape(-1, *[1] * (values.ndim - 1 - axis))
    high = np.minimum(low + 1, inputs - 1)
    blended: Array = values.take(low.astype(int), axis) * (1 - second) + values.take(high.astype(int), axis) * second
    return blended


# Moving -----------------------------------------------------------------------------------------------------------


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
            if step < 1:
                raise ValueError("known only with steps above zero")
            index[int(axis)] = slice(int(start), int(end), int(step))
        kept: NDArray[Any] = values[tuple(index)]
        return kept

    return moved(x, cut)


def _pad(operands: list[Value], attributes: Attributes) -> Value:
    x, pads, value, axes = [*operands, None, None][:4]
    mode = attributes.get("mode", b"constant").decode()
    number = 0.0 if value is None else float(real(value).reshape(()))
    if mode == "constant" and number != 0 and isinstance(x, Grid):
        raise ValueError("known on dequantized codes only with zeros")
    if mode not in ("constant", "reflect", "edge", "wrap"):  # which numpy calls the same
        raise ValueError(f"no mode {mode}")
    numpy_mode: Any = mode
    filling: dict[str, Any] = {"constant_values": number} if mode == "constant" else {}

    def padded(values: NDArray[Any]) -> NDArray[Any]:
        at = range(values.ndim) if axes is None else [int(a) % values.ndim for a in axes]
        widths = [(0, 0)] * values.ndim
        for index, axis in enumerate(at):
            widths[axis] = (int(pads[index]), int(pads[index + len(at)]))
        result: NDArray[Any] = np.pad(values, widths, mode=numpy_mode, **filling)
        return result

    return moved(x, padded)


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


def _gather(operands: list[Value], attributes: Attributes) -> Value:
    index = operands[1].astype(int)
    return moved(operands[0], lambda values: values.take(index, attributes.get("axis", 0)))


def _cast(operands: list[Value], attributes: Attributes) -> Value:
    x = real(operands[0])
    if attributes["to"] not in _TYPES:
        raise ValueError("known only to bool, int32, int64, float and double")
    return x.astype(_TYPES[attributes["to"]])


_TYPES: dict[int, Any] = {1: np.float64, 6: np.int32, 7: np.int64, 9: np.bool_, 11: np.float64}


def _expand(operands: list[Value], attributes: Attributes) -> Value:
    shape = [int(n) for n in operands[1]]
    return moved(operands[0], lambda values: np.broadcast_to(values, np.broadcast_shapes(values.shape, shape)))


OPERATORS: dict[str, Callable[[list[Value], Attributes], Value]] = {
    **activation.OPERATORS,
    "Resize": _resize,
    "Split": _split,
    "Slice": _slice,
    "Pad": _pad,
    "DepthToSpace": _depth_to_space,
    "Gather": _gather,
    "Cast": _cast,
    "Expand": _expand,
}
