"""Resizing: pixels repeated, or two weighed along each axis."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.deploy.reference.values import Attributes, Operator, Value
from faqd.reference import Array, Grid, moved, real

WHOLE = 1e-6
"""How far from a whole size, relative to it, a float32 scale may lead."""


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


OPERATORS: dict[str, Operator] = {
    "Resize": _resize,
}
