"""The referee: runs an exported Q/DQ file in exact integers, with the arithmetic of each operator stated here.

It reads only the file, shares no code with the exporter, and raises on an operator it does not know. Where two
backends disagree, it decides. A tensor is a float64 array, an integer array, or a Grid (codes and their scale, what
DequantizeLinear yields); an operator that can work on codes does, any other works on real values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from faqd.errors import UserError
from faqd.reference import Array, Grid, convolve, layer_sum, windowed

Value = Any
Attributes = dict[str, Any]


class Referee:
    """One ONNX model, ready to run."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        unknown = sorted({node.op_type for node in model.graph.node} - set(_OPERATORS))
        if unknown:
            raise UserError(f"the referee knows no {', '.join(unknown)}; it cannot verify this file.")
        self._constants: dict[str, Value] = {t.name: _value(numpy_helper.to_array(t)) for t in model.graph.initializer}

    def run(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, Value]:
        """Every tensor of the graph by name, for float32 inputs: float64 arrays, integer arrays and Grids."""
        values = self._constants | {name: _value(array) for name, array in inputs.items()}
        for node in self.graph.node:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            operands = [values[name] if name else None for name in node.input]
            values[node.output[0]] = _OPERATORS[node.op_type](operands, attributes)
        return values

    def codes(self, values: dict[str, Value]) -> dict[str, NDArray[Any]]:
        """Of the tensors of a run: the stored integers behind every activation, by tensor name, in graph order."""
        return {name: values[name] for name in code_tensors(self.graph)}


def code_tensors(graph: onnx.GraphProto) -> list[str]:
    """Names of the integer tensors that activations are dequantized from, in graph order."""
    constants = {t.name for t in graph.initializer}
    names = [n.input[0] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] not in constants]
    return list(dict.fromkeys(names))


def real(value: Value) -> Array:
    """The real values of a tensor."""
    return value.real if isinstance(value, Grid) else value


def _value(array: NDArray[Any]) -> Value:
    return array.astype(np.float64) if array.dtype.kind == "f" else array


# Operators: (operands, attributes) -> value -----------------------------------------------------------------------


def _quantize(operands: list[Value], attributes: Attributes) -> Value:
    x, scale, zero_point = operands
    limits = np.iinfo(zero_point.dtype)
    codes = np.rint(real(x) / scale) + zero_point.astype(np.float64)
    return np.clip(codes, limits.min, limits.max).astype(zero_point.dtype)


def _dequantize(operands: list[Value], attributes: Attributes) -> Value:
    codes, scale, zero_point = operands
    if scale.ndim == 0:
        return Grid(codes.astype(np.float64) - float(zero_point), scale)
    axis = attributes.get("axis", 1) % codes.ndim
    shape = [1] * codes.ndim
    shape[axis] = -1
    return Grid(codes.astype(np.float64) - zero_point.astype(np.float64).reshape(shape), scale.reshape(shape))


def _conv(operands: list[Value], attributes: Attributes) -> Value:
    x, weight, bias = [*operands, None][:3]
    spatial = real(x).ndim - 2
    if attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise UserError("the referee reads explicit pads only, found auto_pad.")
    geometry = (
        attributes.get("strides", [1] * spatial),
        attributes.get("pads", [0] * 2 * spatial),
        attributes.get("dilations", [1] * spatial),
        attributes.get("group", 1),
    )
    return _weighted(lambda a, b: convolve(a, b, *geometry), x, weight, bias, 1)


def _gemm(operands: list[Value], attributes: Attributes) -> Value:
    x, weight, bias = [*operands, None][:3]
    if attributes.get("transA", 0) or attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
        raise UserError("the referee knows Gemm only with transA = 0 and alpha = beta = 1.")
    if not attributes.get("transB", 0):
        weight = _moved(weight, np.transpose)
    return _weighted(lambda a, b: a @ b.T, x, weight, bias, 1)


def _weighted(
    product: Callable[[Array, Array], Array], x: Value, weight: Value, bias: Value, channel_axis: int
) -> Array:
    channels = real(weight).shape[0]
    real_bias = np.zeros(channels) if bias is None else real(bias).reshape(-1)
    if isinstance(x, Grid) and isinstance(weight, Grid) and x.scale.ndim == 0:
        per_channel = weight.scale.ndim == 0 or weight.scale.size == weight.scale.shape[0]
        if per_channel:
            sums = product(x.codes, weight.codes)
            return layer_sum(sums, x.scale, weight.scale.reshape(-1), real_bias, channel_axis)
    return layer_sum(product(real(x), real(weight)), np.ones(()), np.ones(()), real_bias, channel_axis)


def _clip(operands: list[Value], attributes: Attributes) -> Value:
    x, low, high = [*operands, None, None][:3]
    return np.clip(real(x), low, high)


def _average(operands: list[Value], attributes: Attributes) -> Value:
    x = operands[0]
    codes, scale = (x.codes, x.scale) if isinstance(x, Grid) else (x, np.ones(()))
    axes = tuple(range(2, codes.ndim))
    count = int(np.prod(codes.shape[2:]))
    return codes.sum(axes, keepdims=True) / count * scale


def _average_windows(operands: list[Value], attributes: Attributes) -> Value:
    x = operands[0]
    codes, scale = (x.codes, x.scale) if isinstance(x, Grid) else (x, np.ones(()))
    windows, axes = _pool_windows(codes, attributes, 0.0)
    total = windows.sum(axes)
    if attributes.get("count_include_pad", 0):
        return total / int(np.prod(attributes["kernel_shape"])) * scale
    counted, _ = _pool_windows(np.ones_like(codes), attributes, 0.0)
    return total / counted.sum(axes) * scale


def _max_windows(operands: list[Value], attributes: Attributes) -> Value:
    def largest(values: Array) -> Array:
        windows, axes = _pool_windows(values, attributes, -np.inf)
        return windows.max(axes)

    return _moved(operands[0], largest)


def _pool_windows(x: Array, attributes: Attributes, fill: float) -> tuple[Array, tuple[int, ...]]:
    kernel = attributes["kernel_shape"]
    spatial = len(kernel)
    strides = attributes.get("strides", [1] * spatial)
    dilations = attributes.get("dilations", [1] * spatial)
    pads = list(attributes.get("pads", [0] * 2 * spatial))
    if attributes.get("ceil_mode", 0):
        for axis in range(spatial):
            length = x.shape[2 + axis] + pads[axis] + pads[spatial + axis]
            reach = (kernel[axis] - 1) * dilations[axis] + 1
            pads[spatial + axis] += -(length - reach) % strides[axis]
    padding = [(0, 0), (0, 0), *zip(pads[:spatial], pads[spatial:], strict=True)]
    windows = windowed(np.pad(x, padding, constant_values=fill), kernel, strides, dilations)
    return windows, tuple(range(windows.ndim - spatial, windows.ndim))


def _mean(operands: list[Value], attributes: Attributes) -> Value:
    x = operands[0]
    axes = operands[1] if len(operands) > 1 and operands[1] is not None else attributes.get("axes")
    axis = tuple(int(a) for a in axes) if axes is not None else None
    codes, scale = (x.codes, x.scale) if isinstance(x, Grid) and x.scale.ndim == 0 else (real(x), np.ones(()))
    total = codes.sum(axis, keepdims=bool(attributes.get("keepdims", 1)))
    return total / (codes.size // total.size) * scale


def _reshape(operands: list[Value], attributes: Attributes) -> Value:
    def reshaped(values: Array) -> Array:
        wanted = [values.shape[i] if int(n) == 0 else int(n) for i, n in enumerate(operands[1])]
        return values.reshape(wanted)

    return _moved(operands[0], reshaped)


def _flatten(operands: list[Value], attributes: Attributes) -> Value:
    axis = attributes.get("axis", 1)
    return _moved(operands[0], lambda v: v.reshape(int(np.prod(v.shape[:axis], dtype=int)), -1))


def _concat(operands: list[Value], attributes: Attributes) -> Value:
    return np.concatenate([real(x) for x in operands], attributes["axis"])


def _moved(value: Value, move: Callable[[Any], Any]) -> Value:
    """Apply an operator that only moves values to codes where there are codes."""
    if isinstance(value, Grid):
        return Grid(move(value.codes), value.scale if value.scale.ndim == 0 else move(value.scale))
    return move(value)


def _squeeze(operands: list[Value], attributes: Attributes) -> Value:
    axes = tuple(int(a) for a in operands[1]) if len(operands) > 1 else None
    return _moved(operands[0], lambda v: np.squeeze(v, axes))


def _unsqueeze(operands: list[Value], attributes: Attributes) -> Value:
    return _moved(operands[0], lambda v: np.expand_dims(v, tuple(int(a) for a in operands[1])))


_OPERATORS: dict[str, Callable[[list[Value], Attributes], Value]] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "Conv": _conv,
    "Gemm": _gemm,
    "Add": lambda operands, _: real(operands[0]) + real(operands[1]),
    "Mul": lambda operands, _: real(operands[0]) * real(operands[1]),
    "Sub": lambda operands, _: real(operands[0]) - real(operands[1]),
    "Div": lambda operands, _: real(operands[0]) / real(operands[1]),
    "Sqrt": lambda operands, _: np.sqrt(real(operands[0])),
    "Relu": lambda operands, _: np.maximum(real(operands[0]), 0.0),
    "Clip": _clip,
    "GlobalAveragePool": _average,
    "AveragePool": _average_windows,
    "MaxPool": _max_windows,
    "ReduceMean": _mean,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": lambda operands, a: _moved(operands[0], lambda v: np.transpose(v, a.get("perm"))),
    "Concat": _concat,
    "Shape": lambda operands, a: np.array(real(operands[0]).shape[a.get("start", 0) : a.get("end")], np.int64),
    "Identity": lambda operands, _: operands[0],
    "Constant": lambda operands, a: _value(numpy_helper.to_array(a["value"])),
}
