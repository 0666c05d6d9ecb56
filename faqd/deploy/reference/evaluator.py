"""The referee: runs an exported Q/DQ file in exact integers, with the arithmetic of each operator stated here.

It reads only the file and shares no code with the exporter. Files of other tools it runs as well, where they keep to
standard operators of opset 13 to 20 that stand in the table below; anything else it refuses. Where two backends
disagree, it decides. A tensor is a float64 array, an integer array, or a Grid (codes and their scale, what
DequantizeLinear yields); an operator that can work on codes does, any other works on real values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from faqd.deploy.reference.onnx_fallback import FLOAT_OPERATORS, computed_in_float
from faqd.deploy.reference.operators import OPERATORS as MORE_OPERATORS
from faqd.errors import UserError, first_line
from faqd.reference import (
    Array,
    Grid,
    convolve,
    convolve_transposed,
    layer_sum,
    moved,
    real,
    transposed,
    windowed,
)

Value = Any
Attributes = dict[str, Any]

OPSETS = range(13, 21)
_NEUTRAL: Attributes = {
    "auto_pad": b"NOTSET",
    "noop_with_empty_axes": 0,
    "storage_order": 0,
    "training_mode": 0,
}
"""Attributes that are known only with this value, which changes nothing."""


class Referee:
    """One ONNX model, ready to run."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self._opsets = model.opset_import
        _refuse_unknown(model)
        self._constants: dict[str, Value] = {t.name: _value(numpy_helper.to_array(t)) for t in model.graph.initializer}

    def run(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, Value]:
        """Every tensor of the graph by name, for float32 inputs: float64 arrays, integer arrays and Grids."""
        values = self._constants | {name: _value(array) for name, array in inputs.items()}
        for node in self.graph.node:
            operands = [values[name] if name else None for name in node.input]
            try:
                values |= dict(zip(filter(None, node.output), self.results(node, operands), strict=True))
            except _CANNOT_COMPUTE as error:
                raise UserError(
                    f"{node.name}: the referee cannot run this {node.op_type}: {first_line(error)}."
                ) from error
        return values

    def results(self, node: onnx.NodeProto, operands: list[Value]) -> tuple[Value, ...]:
        """What one node makes of its operands."""
        if node.op_type in FLOAT_OPERATORS:
            return computed_in_float(node, operands, self._opsets)
        result = OPERATORS[node.op_type](operands, _attributes(node))
        return result if isinstance(result, tuple) else (result,)


_CANNOT_COMPUTE = (
    *(ValueError, IndexError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError),
    *(ArithmeticError, AssertionError, MemoryError),
)
"""What numpy, and ONNX's reference, raise where operands do not fit an operator."""


def code_tensors(graph: onnx.GraphProto) -> list[str]:
    """Names of the integer tensors that activations are dequantized from, in graph order."""
    constants = {t.name for t in graph.initializer}
    names = [n.input[0] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] not in constants]
    return list(dict.fromkeys(names))


def stored(value: Value) -> NDArray[Any]:
    """A referee value in the type the file declares: integers as they are, real values as float32."""
    array = real(value)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _refuse_unknown(model: onnx.ModelProto) -> None:
    versions = {entry.domain: entry.version for entry in model.opset_import}
    if versions.get("", 0) not in OPSETS:
        raise UserError(f"the referee knows opset {OPSETS[0]} to {OPSETS[-1]}, found {versions.get('', 'none')}.")
    standard = {node.op_type for node in model.graph.node if not node.domain}
    foreign = {f"{node.domain}.{node.op_type}" for node in model.graph.node if node.domain}
    unknown = sorted(foreign | standard - set(OPERATORS) - FLOAT_OPERATORS)
    if unknown:
        raise UserError(f"the referee knows no {', '.join(unknown)}; it cannot verify this file.")
    for node in model.graph.node:
        if node.op_type in FLOAT_OPERATORS:
            continue
        for name, value in _attributes(node).items():
            if value != _NEUTRAL.get(name, value):
                raise UserError(f"{node.name}: the referee knows {node.op_type} only without {name} = {value!r}.")
        if len(list(filter(None, node.output))) > 1 and node.op_type != "Split":
            raise UserError(f"{node.name}: the referee knows {node.op_type} only with one output.")


def _attributes(node: onnx.NodeProto) -> Attributes:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _value(array: NDArray[Any]) -> Value:
    if array.dtype.kind not in "fiub":
        raise UserError(f"the referee knows no {array.dtype} numbers.")
    return array.astype(np.float64) if array.dtype.kind == "f" else array


# Operators: (operands, attributes) -> value -----------------------------------------------------------------------


def _quantize(operands: list[Value], attributes: Attributes) -> Value:
    x, scale, zero_point = [*operands, np.zeros((), np.uint8)][:3]  # without a zero point ONNX means uint8 0
    if scale.size != 1 or not scale > 0:
        raise ValueError("an activation needs one scale above zero")
    limits = np.iinfo(zero_point.dtype)
    codes = np.rint(real(x) / float(scale.item())) + int(zero_point.item())
    return np.clip(codes, limits.min, limits.max).astype(zero_point.dtype)


def _dequantize(operands: list[Value], attributes: Attributes) -> Value:
    codes, scale, zero_point = [*operands, np.zeros((), np.int64)][:3]
    if not np.all(scale > 0):
        raise ValueError("every scale must be above zero")
    shape = [1] * codes.ndim
    if scale.size > 1:
        shape[attributes.get("axis", 1)] = -1
    else:
        scale, shape = scale.reshape(()), []
    return Grid(codes.astype(np.float64) - zero_point.astype(np.float64).reshape(shape), scale.reshape(shape))


def _conv(operands: list[Value], attributes: Attributes) -> Value:
    x, weight, bias = [*operands, None][:3]
    spatial = real(x).ndim - 2
    geometry = (
        attributes.get("strides", [1] * spatial),
        attributes.get("pads", [0] * 2 * spatial),
        attributes.get("dilations", [1] * spatial),
        attributes.get("group", 1),
    )
    return _weighted(lambda a, b: convolve(a, b, *geometry), x, weight, bias, 1)


def _conv_transpose(operands: list[Value], attributes: Attributes) -> Value:
    x, weight, bias = [*operands, None][:3]
    if "output_shape" in attributes:
        raise ValueError("known only without output_shape")
    spatial = real(x).ndim - 2
    groups = attributes.get("group", 1)
    geometry = (
        attributes.get("strides", [1] * spatial),
        attributes.get("pads", [0] * 2 * spatial),
        attributes.get("dilations", [1] * spatial),
        groups,
        attributes.get("output_padding", [0] * spatial),
    )
    return _weighted(lambda a, b: convolve_transposed(a, b, *geometry), x, weight, bias, 1, weight_axis=1)


def _gemm(operands: list[Value], attributes: Attributes) -> Value:
    x, weight, bias = [*operands, None][:3]
    if attributes.get("transA", 0) or attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
        raise ValueError("known only with transA = 0 and alpha = beta = 1")
    if bias is not None and real(bias).ndim == 2 and real(bias).shape[0] != 1:
        raise ValueError("known only with one bias for each column")
    if not attributes.get("transB", 0):
        weight = transposed(weight, None)
    return _weighted(lambda a, b: a @ b.T, x, weight, bias, 1)


def _weighted(
    product: Callable[[Array, Array], Array],
    x: Value,
    weight: Value,
    bias: Value,
    channel_axis: int,
    weight_axis: int = 0,
) -> Array:
    """Integer sums where input and weight are codes and each output channel has one scale; else sums of floats.

    weight_axis: where the weight has its output channels; with the second axis, groups cannot have scales per channel.
    """
    if isinstance(x, Grid) and isinstance(weight, Grid) and x.scale.ndim == 0:
        per_channel = weight.scale.ndim == 0 or weight.scale.size == weight.scale.shape[weight_axis]
        if per_channel:
            sums = product(x.codes, weight.codes)
            channels = sums.shape[channel_axis]
            real_bias = np.broadcast_to(0.0 if bias is None else real(bias).reshape(-1), channels)
            return layer_sum(sums, x.scale, weight.scale.reshape(-1), real_bias, channel_axis)
    sums = product(real(x), real(weight))
    real_bias = np.broadcast_to(0.0 if bias is None else real(bias).reshape(-1), sums.shape[channel_axis])
    return layer_sum(sums, np.ones(()), np.ones(()), real_bias, channel_axis)


def _clip(operands: list[Value], attributes: Attributes) -> Value:
    x, low, high = [*operands, None, None][:3]
    clipped: Array = np.clip(real(x), low, high)
    return clipped


def _on_one_scale(x: Value) -> tuple[Array, Array]:
    """Codes and their scale where they have one for all, else the real values and 1."""
    return (x.codes, x.scale) if isinstance(x, Grid) and x.scale.ndim == 0 else (real(x), np.ones(()))


def _average(operands: list[Value], attributes: Attributes) -> Value:
    codes, scale = _on_one_scale(operands[0])
    axes = tuple(range(2, codes.ndim))
    count = int(np.prod(codes.shape[2:]))
    return codes.sum(axes, keepdims=True) / count * scale


def _average_windows(operands: list[Value], attributes: Attributes) -> Value:
    codes, scale = _on_one_scale(operands[0])
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


def _divide(x: NDArray[Any], by: NDArray[Any]) -> NDArray[Any]:
    if x.dtype.kind == "f":
        return np.asarray(x / by)
    quotient = np.asarray(np.abs(x) // np.abs(by)) * np.sign(x) * np.sign(by)  # of integers, towards zero
    found: NDArray[Any] = quotient.astype(x.dtype)
    return found


def _largest(operands: list[Value], attributes: Attributes) -> Value:
    return moved(operands[0], lambda v: v.max(tuple(range(2, v.ndim)), keepdims=True))


def _mean(operands: list[Value], attributes: Attributes) -> Value:
    x = operands[0]
    axes = operands[1] if len(operands) > 1 and operands[1] is not None else attributes.get("axes")
    axis = tuple(int(a) for a in axes) if axes is not None and len(axes) else None
    codes, scale = _on_one_scale(x)
    total = codes.sum(axis, keepdims=bool(attributes.get("keepdims", 1)))
    return total / (codes.size // total.size) * scale


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


def _batch_norm(operands: list[Value], attributes: Attributes) -> Value:
    x = real(operands[0])
    per_channel = (-1, *[1] * (x.ndim - 2))
    gamma, beta, mean, variance = (real(v).reshape(per_channel) for v in operands[1:])
    return (x - mean) / np.sqrt(variance + attributes.get("epsilon", 1e-5)) * gamma + beta


def _constant(attributes: Attributes) -> Value:
    """A Constant has one attribute: value as a tensor, or a number or numbers under another name."""
    (value,) = attributes.values()
    return _value(numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value))


OPERATORS: dict[str, Callable[[list[Value], Attributes], Value]] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "Conv": _conv,
    "Gemm": _gemm,
    "Add": lambda operands, _: real(operands[0]) + real(operands[1]),
    "Mul": lambda operands, _: real(operands[0]) * real(operands[1]),
    "Sub": lambda operands, _: real(operands[0]) - real(operands[1]),
    "Div": lambda operands, _: _divide(real(operands[0]), real(operands[1])),
    "Sqrt": lambda operands, _: np.sqrt(real(operands[0])),
    "Relu": lambda operands, _: np.maximum(real(operands[0]), 0),
    "Clip": _clip,
    "GlobalAveragePool": _average,
    "AveragePool": _average_windows,
    "MaxPool": _max_windows,
    "GlobalMaxPool": _largest,
    "ReduceMean": _mean,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": lambda operands, a: transposed(operands[0], a.get("perm")),
    "Concat": _concat,
    "Shape": lambda operands, a: np.array(real(operands[0]).shape[a.get("start", 0) : a.get("end")], np.int64),
    "Identity": lambda operands, _: operands[0],
    "Constant": lambda operands, a: _constant(a),
    "BatchNormalization": _batch_norm,
    "ConvTranspose": _conv_transpose,
    **MORE_OPERATORS,
}
