"""Averages, which are exact sums of codes and one division, and maxima."""

from __future__ import annotations

import numpy as np

from faqd.deploy.reference.values import Attributes, Operator, Value, on_one_scale
from faqd.reference import Array, moved, windowed


def _average(operands: list[Value], attributes: Attributes) -> Value:
    codes, scale = on_one_scale(operands[0])
    axes = tuple(range(2, codes.ndim))
    count = int(np.prod(codes.shape[2:]))
    return codes.sum(axes, keepdims=True) / count * scale


def _average_windows(operands: list[Value], attributes: Attributes) -> Value:
    codes, scale = on_one_scale(operands[0])
    windows, axes = _pool_windows(codes, attributes, 0.0, 0.0)
    counted, _ = _pool_windows(np.ones_like(codes), attributes, float(attributes.get("count_include_pad", 0)), 0.0)
    return windows.sum(axes) / counted.sum(axes) * scale


def _max_windows(operands: list[Value], attributes: Attributes) -> Value:
    def largest(values: Array) -> Array:
        lowest: float = -np.inf if values.dtype.kind == "f" else np.iinfo(np.dtype(values.dtype.name)).min
        windows, axes = _pool_windows(values, attributes, lowest, lowest)
        result: Array = windows.max(axes)
        return result

    return moved(operands[0], largest)


def _pool_windows(x: Array, attributes: Attributes, padding: float, beyond: float) -> tuple[Array, tuple[int, ...]]:
    """The windows of a pooling operator and their axes.

    padding: value of the padded pixels. beyond: of those outside the padding, which ceil_mode lets a window reach.
    """
    kernel = attributes["kernel_shape"]
    spatial = len(kernel)
    strides = attributes.get("strides", [1] * spatial)
    dilations = attributes.get("dilations", [1] * spatial)
    pads = attributes.get("pads", [0] * 2 * spatial)
    padded = np.pad(x, [(0, 0), (0, 0), *zip(pads[:spatial], pads[spatial:], strict=True)], constant_values=padding)
    more = [0] * spatial
    for axis in range(spatial if attributes.get("ceil_mode", 0) else 0):
        length = padded.shape[2 + axis]
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        missing = -(length - reach) % strides[axis]
        # A window that would start behind the values and their front padding does not exist.
        more[axis] = missing if length + missing - reach < x.shape[2 + axis] + pads[axis] else 0
    padded = np.pad(padded, [(0, 0), (0, 0), *((0, count) for count in more)], constant_values=beyond)
    windows = windowed(padded, kernel, strides, dilations)
    return windows, tuple(range(windows.ndim - spatial, windows.ndim))


def _largest(operands: list[Value], attributes: Attributes) -> Value:
    return moved(operands[0], lambda v: v.max(tuple(range(2, v.ndim)), keepdims=True))


def _mean(operands: list[Value], attributes: Attributes) -> Value:
    x = operands[0]
    axes = operands[1] if len(operands) > 1 and operands[1] is not None else attributes.get("axes")
    axis = tuple(int(a) for a in axes) if axes is not None and len(axes) else None
    codes, scale = on_one_scale(x)
    total = codes.sum(axis, keepdims=bool(attributes.get("keepdims", 1)))
    return total / (codes.size // total.size) * scale


OPERATORS: dict[str, Operator] = {
    "GlobalAveragePool": _average,
    "AveragePool": _average_windows,
    "MaxPool": _max_windows,
    "GlobalMaxPool": _largest,
    "ReduceMean": _mean,
}
