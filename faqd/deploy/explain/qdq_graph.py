"""The convolutions and matrix products of any ONNX file, and where their inputs, weights and biases come from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
from numpy.typing import NDArray

from faqd.deploy.onnx_model.graph import Graph, attributes_of, operand, scale_of
from faqd.errors import UserError

CONVOLUTIONS = ("Conv", "ConvTranspose", "DeformConv")
PRODUCTS = ("Gemm", "MatMul", "Einsum")
INTEGER_OPERATORS = (
    *("QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "QGemm", "MatMulIntegerToFloat"),
    *("DynamicQuantizeMatMul", "MatMulNBits", "MatMulBnb4", "QOrderedMatMul", "QLinearConvTranspose"),
)
FUSED_OPERATORS = ("FusedConv", "NhwcFusedConv", "FusedMatMul", "FusedGemm", "TransposeMatMul", "GemmFastGelu")
"""What onnxruntime's optimizer makes of a layer and its neighbours."""
MOVES = (
    *("MaxPool", "GlobalMaxPool", "Identity", "Dropout", "Transpose", "Flatten", "Reshape", "Squeeze", "Unsqueeze"),
    *("Slice", "Split", "Gather", "GatherElements", "Tile", "Expand", "ReduceMax"),
    *("Pad", "DepthToSpace", "SpaceToDepth", "Cast"),
)
"""Operators that TensorRT runs on codes: values move, or one of them is chosen."""
WEIGHT_MOVES = ("Identity", "Dropout", "Transpose", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Cast")
"""Those that it takes between weights and their layer."""
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
MOST_JOINED = 200
"""Maps that are concatenated in front of one layer."""
MOST_MOVES = 16
"""Operators between stored weights and their layer."""
_FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")


@dataclass(frozen=True)
class Path:
    """Where a tensor comes from, behind operators that only move values: the DequantizeLinear that it is, or the node
    in the way (None: an input or a constant)."""

    dequantize: onnx.NodeProto | None
    blocked_by: onnx.NodeProto | None = None


class QdqGraph(Graph):
    """A graph that knows where every tensor comes from, by one walk from its inputs to its outputs."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        self._paths: dict[str, tuple[Path, ...]] = {}
        self._stored: dict[str, bool] = {}
        self._scales: dict[str, NDArray[np.float64] | None] = {}
        for node in self.nodes:
            found = self._paths_behind(node)
            stored = self._is_computed_of_constants(node)
            for name in node.output:
                self._paths[name], self._stored[name] = found, stored

    def paths(self, name: str) -> tuple[Path, ...]:
        """One path, or several where feature maps are concatenated on the way."""
        return (Path(None),) if self.element_type(name) else self._paths.get(name, (Path(None),))

    def is_stored(self, name: str) -> bool:
        """Whether a tensor is a constant, or is computed of nothing else."""
        return self.element_type(name) is not None or self._stored.get(name, False)

    def _paths_behind(self, node: onnx.NodeProto) -> tuple[Path, ...]:
        if node.op_type == "DequantizeLinear":
            return (Path(node),)
        if (moved := self._moved(node)) is not None:
            return self.paths(moved)
        if node.op_type != "Concat" or self._is_computed_of_constants(node):
            return (Path(None, node),)
        joined = [path for part in dict.fromkeys(node.input) for path in self.paths(part)]
        distinct = {(id(path.dequantize), id(path.blocked_by)): path for path in joined}
        if len(distinct) > MOST_JOINED:
            raise UserError(f"node {name_of(node)} joins more than {MOST_JOINED:,} maps; faqd takes no such network.")
        return tuple(distinct.values())

    def _moved(self, node: onnx.NodeProto) -> str | None:
        """The tensor whose values an operator moves; None where it computes others."""
        if node.op_type in ("Mul", "Div"):
            return self._rescaled(node)
        kinds = WEIGHT_MOVES if self._is_computed_of_constants(node) else MOVES
        if node.op_type not in kinds or not node.input:
            return None
        if node.op_type == "Pad":  # with zeros, or with values of the map
            filled = self.constant(operand(node, 2)) if operand(node, 2) else np.zeros(1)
            return None if filled is None or filled.any() else str(node.input[0])
        if node.op_type == "Cast" and attributes_of(node)["to"] != onnx.TensorProto.FLOAT16:
            return None
        return str(node.input[0])

    def _rescaled(self, node: onnx.NodeProto) -> str | None:
        """The weights that a constant for each output channel, or one for all, multiplies or divides: their scales take
        it in."""
        for at in (0,) if node.op_type == "Div" else (0, 1):
            weight, factor = node.input[at], self.constant(node.input[1 - at])
            (path, *more) = self.paths(weight)
            if path.dequantize is None or more or factor is None or not self._stored.get(weight, False):
                continue
            axis = attributes_of(path.dequantize).get("axis", 1) % max(1, len(self.shape(weight) or (0,)))
            along = [i for i, size in enumerate(reversed(factor.shape)) if size > 1]
            if not along or along == [len(self.shape(weight) or ()) - 1 - axis]:
                return str(weight)
        return None

    def _is_computed_of_constants(self, node: onnx.NodeProto) -> bool:
        return all(self.is_stored(name) for name in node.input if name)

    def scale(self, node: onnx.NodeProto) -> NDArray[np.float64] | None:
        """The constant scale of a QuantizeLinear or DequantizeLinear; None where it is computed."""
        name = node.output[0]
        if name not in self._scales:
            self._scales[name] = scale_of(self, node)
        return self._scales[name]


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product with its weights."""

    graph: QdqGraph
    node: onnx.NodeProto

    @cached_property
    def weight_index(self) -> int:
        """Which operand the weights are."""
        last = len(self.node.input) - 1 if self.node.op_type in PRODUCTS else 1
        return next((i for i in range(min(last, 1), -1, -1) if self.graph.is_stored(operand(self.node, i))), 1)

    @cached_property
    def inputs(self) -> tuple[Path, ...]:
        """One path, or several where feature maps are concatenated on the way."""
        return self.graph.paths(operand(self.node, 1 - self.weight_index))

    @cached_property
    def weight(self) -> Path:
        name = operand(self.node, self.weight_index)
        path, *more = self.graph.paths(name)
        return Path(None, self.graph.maker(name)) if more else path

    @cached_property
    def bias(self) -> Path:
        name = operand(self.node, 2)
        return self.graph.paths(name)[0] if name else Path(None)

    @property
    def input_quantizers(self) -> list[onnx.NodeProto]:
        return [path.dequantize for path in self.inputs if path.dequantize is not None]

    @property
    def dequantizers(self) -> list[onnx.NodeProto]:
        """Of its inputs and its weights."""
        weight = self.weight.dequantize
        return self.input_quantizers if weight is None else [*self.input_quantizers, weight]

    @property
    def channel_axis(self) -> int | None:
        """The axis of the stored weight that is the layer's output channel; None where it cannot be told."""
        name, attributes = operand(self.node, self.weight_index), attributes_of(self.node)
        rank = len(self.graph.shape(name) or (0, 0))
        transposed = attributes.get("transA" if self.weight_index == 0 else "transB", 0)
        axis: int | None = {
            "Conv": 0,
            "ConvTranspose": 1,
            "DeformConv": 0,
            "MatMul": rank - 2 + self.weight_index,
            "Gemm": self.weight_index ^ bool(transposed),
            "Einsum": _channel_of(attributes.get("equation", b""), self.weight_index),
        }.get(self.node.op_type)
        for _ in range(MOST_MOVES):  # From the layer back to the weight.
            maker = self.graph.maker(name)
            if axis is None or maker is None or maker.op_type not in WEIGHT_MOVES:
                return axis
            if maker.op_type == "Transpose":
                axis = attributes_of(maker).get("perm", range(rank)[::-1])[axis]
            elif maker.op_type in ("Flatten", "Reshape", "Squeeze", "Unsqueeze"):
                return None
            name = maker.input[0]
        return None


def _channel_of(equation: bytes, weight: int) -> int | None:
    """The axis of an Einsum's weight that its output has and its other operand has not; None where that is not one."""
    left, arrow, right = equation.decode().replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != 2 or "." in equation.decode():
        return None
    found = [axis for axis, letter in enumerate(terms[weight]) if letter in right and letter not in terms[1 - weight]]
    return found[0] if len(found) == 1 else None


def layers_of(graph: QdqGraph) -> list[Layer]:
    """The convolutions and the matrix products with weights, in graph order; products of two activations are none."""
    return [Layer(graph, node) for node in graph.nodes if _is_layer(graph, node)]


def _is_layer(graph: QdqGraph, node: onnx.NodeProto) -> bool:
    if node.op_type in (*INTEGER_OPERATORS, *FUSED_OPERATORS, *CONVOLUTIONS):
        return True
    return node.op_type in PRODUCTS and any(graph.is_stored(name) for name in list(node.input)[:2])


def code_type(graph: Graph, node: onnx.NodeProto) -> str:
    """The element type of the codes of a QuantizeLinear or DequantizeLinear; ONNX means UINT8 where none is said."""
    for _ in range(MOST_MOVES):  # Back over what moves codes, to what made them.
        for stated in (operand(node, 2), node.input[0]) if node.op_type in QUANTIZERS else (node.input[0],):
            found = graph.element_type(stated) if stated else None
            if found is not None and found not in _FLOATS:
                return found
        if kind := attributes_of(node).get("output_dtype", 0):
            return str(onnx.TensorProto.DataType.Name(kind))
        maker = graph.maker(node.input[0])
        if maker is None or maker.op_type not in (*MOVES, "QuantizeLinear"):
            break
        node = maker
    return "UINT8"


def name_of(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]
