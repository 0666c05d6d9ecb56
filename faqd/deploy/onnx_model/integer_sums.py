"""The layers of an ONNX file that onnxruntime sums in integers, and whether those sums can saturate on some CPU.

faqd/saturation.py has the rule. It needs the highest code that a layer can read, which is found by one walk through the
graph that knows of every tensor between which numbers it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from faqd.deploy.onnx_model.graph import Graph, attributes_of, operand
from faqd.saturation import HIGHEST, in_kernel_order, largest_pairs

Interval = tuple[float, float]
ANY: Interval = (-inf, inf)
_HIGHEST_CODE = 255

_MOVES = (
    *("MaxPool", "GlobalMaxPool", "ReduceMax", "Identity", "Dropout", "Transpose", "Flatten", "Reshape", "Squeeze"),
    *("Unsqueeze", "Slice", "Split", "Gather", "Tile", "Expand", "DepthToSpace", "SpaceToDepth", "Concat"),
)
_MEANS = ("AveragePool", "GlobalAveragePool", "ReduceMean")
_SHARES = ("Sigmoid", "HardSigmoid", "Softmax")
_FUSED_INTO_A_LAYER = ("Relu", "Clip")
_INTEGER_PRODUCTS = {
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QGemm"), (0, 3)),
    **dict.fromkeys(("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"), (0, 1)),
}
"""Operators on codes -> which inputs are the codes and the weights."""


@dataclass(frozen=True)
class IntegerSum:
    """A layer that adds products of unsigned codes and signed weights.

    highest_code: that it can read, zero point included. largest_pair: of two neighbouring weights of one sign.
    """

    node: onnx.NodeProto
    highest_code: int
    largest_pair: int

    @property
    def largest_sum(self) -> int:
        """Of two neighbouring products."""
        return self.highest_code * self.largest_pair

    @property
    def saturates(self) -> bool:
        """Whether two products can pass int16: on a CPU that adds them there, the layer gives other codes then."""
        return self.largest_sum > HIGHEST


def integer_sums(model: onnx.ModelProto) -> list[IntegerSum]:
    """The layers whose sums depend on how a CPU adds, in graph order. Not among them: those that stay float, those with
    unsigned weights or signed activations, and kernels of one channel each."""
    graph = Graph(model)
    known = intervals(graph)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for node in graph.nodes:
        operands = _codes_and_weights(graph, node, readers)
        if operands is None:
            continue
        codes, weight = operands
        rows = _rows(node, weight)
        if rows is not None and weight.dtype == np.int8:
            low, high = known.get(codes, (0.0, _HIGHEST_CODE))
            if low >= 0:  # signed codes have other kernels
                found.append(IntegerSum(node, int(min(high, _HIGHEST_CODE)), int(largest_pairs(rows).max(initial=0))))
    return found


def _codes_and_weights(
    graph: Graph, node: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]]
) -> tuple[str, NDArray[Any]] | None:
    """The tensor of codes that a layer multiplies by constant weights; None where it is no such layer."""
    if node.op_type in _INTEGER_PRODUCTS:
        codes, weights = (operand(node, index) for index in _INTEGER_PRODUCTS[node.op_type])
        stored = graph.constant(weights)
        return None if stored is None else (codes, stored)
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return None
    if node.op_type == "Conv" and not any(_rounds(reader, readers) for reader in readers.get(node.output[0], [])):
        return None  # it stays float
    read, weight = (graph.maker(operand(node, index)) for index in (0, 1))
    if read is None or weight is None or {read.op_type, weight.op_type} != {"DequantizeLinear"}:
        return None
    stored = graph.constant(weight.input[0])
    return None if stored is None else (read.input[0], stored)


def _rounds(node: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]]) -> bool:
    if node.op_type in _FUSED_INTO_A_LAYER:
        return any(reader.op_type == "QuantizeLinear" for reader in readers.get(node.output[0], []))
    return bool(node.op_type == "QuantizeLinear")


def _rows(node: onnx.NodeProto, weight: NDArray[Any]) -> NDArray[Any] | None:
    """Weights by output channel, neighbours next to each other; None for kernels of one channel each."""
    if node.op_type in ("Conv", "QLinearConv", "ConvInteger"):
        alone = weight.shape[1] == 1 and attributes_of(node).get("group", 1) == len(weight)
        return None if alone or weight.ndim < 3 else in_kernel_order(weight)
    transposed = attributes_of(node).get("transB", 0)
    if weight.ndim < 2:
        return None
    rows: NDArray[Any] = (weight if transposed else np.swapaxes(weight, -1, -2)).reshape(
        -1, weight.shape[-1 if transposed else -2]
    )
    return rows


# Between which numbers a tensor lies -------------------------------------------------------------------------------


def intervals(graph: Graph) -> dict[str, Interval]:
    """Of every tensor that an operator makes: no value of it lies outside, whatever the network is fed."""
    found: dict[str, Interval] = {}
    for node in graph.nodes:
        interval = _interval(graph, node, [_of(graph, found, name) for name in node.input])
        found |= dict.fromkeys(node.output, interval)
    return found


def _of(graph: Graph, found: dict[str, Interval], name: str) -> Interval:
    if name in found:
        return found[name]
    constant = graph.constant(name) if name else None
    if constant is None or not constant.size or constant.dtype.kind not in "fiu" or not np.isfinite(constant).all():
        return ANY
    return float(constant.min()), float(constant.max())


def _interval(graph: Graph, node: onnx.NodeProto, read: Sequence[Interval]) -> Interval:
    kind = node.op_type
    if kind in ("QuantizeLinear", "DequantizeLinear"):
        return _on_grid(graph, node, read[0])
    if kind in _MOVES:
        joined = read if kind == "Concat" else read[:1]
        return min(low for low, _ in joined), max(high for _, high in joined)
    if kind == "Pad":
        low, high = read[2] if len(read) > 2 and node.input[2] else (0.0, 0.0)
        return min(low, read[0][0]), max(high, read[0][1])
    if kind in _MEANS:
        return min(0.0, read[0][0]), max(0.0, read[0][1])  # padded pixels are zero
    return _OTHERS[kind](read) if kind in _OTHERS else ANY


def _clipped(read: Sequence[Interval]) -> Interval:
    (low, high), *limits = read
    bottom = limits[0][0] if limits else -inf
    top = limits[1][1] if len(limits) > 1 else inf
    return min(max(low, bottom), top), max(min(high, top), bottom)


_OTHERS: dict[str, Callable[[Sequence[Interval]], Interval]] = {
    "Relu": lambda read: (max(0.0, read[0][0]), max(0.0, read[0][1])),
    "Clip": _clipped,
    "Add": lambda read: (read[0][0] + read[1][0], read[0][1] + read[1][1]),
    **dict.fromkeys(_SHARES, lambda read: (0.0, 1.0)),
}


def _on_grid(graph: Graph, node: onnx.NodeProto, read: Interval) -> Interval:
    """Codes of real values, or real values of codes; of a scale for each channel nothing is known."""
    scale = graph.constant(operand(node, 1))
    zero = graph.constant(operand(node, 2)) if operand(node, 2) else np.zeros((), np.uint8)
    quantizes = node.op_type == "QuantizeLinear"
    reach = np.iinfo(zero.dtype) if zero is not None and zero.dtype.kind in "iu" else None
    ends = (float(reach.min), float(reach.max)) if reach is not None else ANY
    if scale is None or zero is None or scale.size != 1 or zero.size != 1 or not scale.item() > 0:
        return ends if quantizes else ANY
    factor, offset = float(scale.item()), float(zero.item())
    if not quantizes:
        low, high = ((max(min(code, ends[1]), ends[0]) - offset) * factor for code in read)
        return low, high
    low, high = (min(max(np.rint(value / factor) + offset, ends[0]), ends[1]) for value in read)
    return float(low), float(high)
