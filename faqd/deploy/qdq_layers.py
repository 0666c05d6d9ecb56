"""The convolutions and matrix products of any ONNX file, and where their inputs, weights and biases come from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx

from faqd.deploy.onnx_graph import Graph, attributes_of, operand
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
    *("Slice", "Split", "Gather", "Pad", "DepthToSpace", "SpaceToDepth", "Cast"),
)
"""Operators that TensorRT runs on codes: values move, or one of them is chosen."""
MOST_JOINED = 1000
"""Maps that are concatenated in front of one layer."""
MOST_MOVES = 100
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
        for node in self.nodes:
            found = self._paths_behind(node)
            stored = self._moves_stored(node)
            for name in node.output:
                self._paths[name], self._stored[name] = found, stored

    def paths(self, name: str) -> tuple[Path, ...]:
        """One path, or several where feature maps are concatenated on the way."""
        return (Path(None),) if self.element_type(name) else self._paths.get(name, (Path(None),))

    def is_stored(self, name: str) -> bool:
        """Whether a tensor is a constant, or its codes are, quantized and moved at most."""
        return self.element_type(name) is not None or self._stored.get(name, False)

    def _paths_behind(self, node: onnx.NodeProto) -> tuple[Path, ...]:
        if node.op_type == "DequantizeLinear":
            return (Path(node),)
        if self._moves(node):
            return self.paths(node.input[0])
        if node.op_type != "Concat":
            return (Path(None, node),)
        joined = [path for part in dict.fromkeys(node.input) for path in self.paths(part)]
        distinct = {(id(path.dequantize), id(path.blocked_by)): path for path in joined}
        if len(distinct) > MOST_JOINED:
            raise UserError(f"node {name_of(node)} joins more than {MOST_JOINED:,} maps; faqd takes no such network.")
        return tuple(distinct.values())

    def _moves(self, node: onnx.NodeProto) -> bool:
        if node.op_type == "Pad":  # with zeros, or with values of the map
            filled = self.constant(operand(node, 2)) if operand(node, 2) else np.zeros(1)
            return filled is not None and not filled.any()
        if node.op_type == "Mul":  # of weights with constants, which their scales take in
            return self._stored.get(node.input[0], False) and self.element_type(node.input[1]) is not None
        return node.op_type in MOVES and bool(node.input)

    def _moves_stored(self, node: onnx.NodeProto) -> bool:
        known = node.op_type in ("QuantizeLinear", "DequantizeLinear") or self._moves(node)
        return known and self.is_stored(node.input[0])


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
        return self.graph.paths(operand(self.node, self.weight_index))[0]

    @cached_property
    def bias(self) -> Path:
        name = operand(self.node, 2)
        return self.graph.paths(name)[0] if name else Path(None)

    @property
    def input_quantizers(self) -> list[onnx.NodeProto]:
        return [path.dequantize for path in self.inputs if path.dequantize is not None]

    @property
    def channel_axis(self) -> int | None:
        """The axis of the stored weight that is the layer's output channel; None where an equation says it."""
        if self.node.op_type == "Einsum":
            return None
        name = operand(self.node, self.weight_index)
        rank = len(self.graph.shape(name) or (0, 0))
        by_operator = {"Conv": 0, "ConvTranspose": 1, "DeformConv": 0, "MatMul": rank - 2 + self.weight_index}
        axis = by_operator.get(self.node.op_type, 0 if attributes_of(self.node).get("transB") else 1)
        for _ in range(MOST_MOVES):  # From the layer back to the weight.
            maker = self.graph.maker(name)
            if maker is None or maker.op_type not in MOVES:
                break
            if maker.op_type == "Transpose":
                axis = attributes_of(maker).get("perm", range(rank)[::-1])[axis]
            name = maker.input[0]
        return axis


def layers_of(graph: QdqGraph) -> list[Layer]:
    """The convolutions and the matrix products with weights, in graph order; products of two activations are none."""
    return [Layer(graph, node) for node in graph.nodes if _is_layer(graph, node)]


def _is_layer(graph: QdqGraph, node: onnx.NodeProto) -> bool:
    if node.op_type in (*INTEGER_OPERATORS, *FUSED_OPERATORS, *CONVOLUTIONS):
        return True
    return node.op_type in PRODUCTS and any(graph.is_stored(name) for name in list(node.input)[:2])


def code_type(graph: Graph, node: onnx.NodeProto) -> str:
    """The element type of the codes of a QuantizeLinear or DequantizeLinear; ONNX means UINT8 where none is said."""
    for name in (operand(node, 2), node.input[0]):
        found = graph.element_type(name) if name else None
        if found is not None and found not in _FLOATS:
            return found
    maker = graph.maker(node.input[0])
    return code_type(graph, maker) if maker is not None and maker.op_type == "QuantizeLinear" else "UINT8"


def name_of(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]
