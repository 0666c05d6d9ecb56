"""The convolutions and matrix products of any ONNX file, and where their inputs, weights and biases come from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import onnx

from faqd.deploy.onnx_graph import Graph, attributes_of, operand

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
INTEGER_OPERATORS = ("QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger")
MOVES = (
    *("MaxPool", "GlobalMaxPool", "Identity", "Dropout", "Transpose", "Flatten", "Reshape", "Squeeze", "Unsqueeze"),
    *("Slice", "Split", "Pad", "DepthToSpace", "SpaceToDepth", "Cast"),
)
"""Operators that TensorRT runs on codes: values move, or one of them is chosen."""
_FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")


@dataclass(frozen=True)
class Path:
    """Where a tensor comes from: the DequantizeLinear that it is, behind operators that only move values, or the node
    in the way (None: an input or a constant)."""

    dequantize: onnx.NodeProto | None
    blocked_by: onnx.NodeProto | None = None
    moves: tuple[onnx.NodeProto, ...] = ()


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product with its weights."""

    graph: Graph
    node: onnx.NodeProto

    @cached_property
    def inputs(self) -> tuple[Path, ...]:
        """One path, or several where feature maps are concatenated on the way."""
        return tuple(_paths(self.graph, operand(self.node, 0)))

    @cached_property
    def weight(self) -> Path:
        return next(iter(_paths(self.graph, operand(self.node, 1))))

    @cached_property
    def bias(self) -> Path:
        name = operand(self.node, 2)
        return next(iter(_paths(self.graph, name))) if name else Path(None)

    @property
    def input_quantizers(self) -> list[onnx.NodeProto]:
        return [path.dequantize for path in self.inputs if path.dequantize is not None]

    @property
    def channel_axis(self) -> int:
        """The axis of the stored weight that is the layer's output channel."""
        rank = len(self.graph.shape(operand(self.node, 1)) or (0, 0))
        by_operator = {"Conv": 0, "ConvTranspose": 1, "MatMul": rank - 1}
        axis = by_operator.get(self.node.op_type, 0 if attributes_of(self.node).get("transB") else 1)
        for move in self.weight.moves:  # From the layer back to the weight.
            if move.op_type == "Transpose":
                axis = attributes_of(move).get("perm", range(rank)[::-1])[axis]
        return axis


def layers_of(graph: Graph) -> list[Layer]:
    """The convolutions and the matrix products with weights, in graph order; products of two activations are none."""
    return [Layer(graph, node) for node in graph.nodes if _is_layer(graph, node)]


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


# Looking back from a layer ---------------------------------------------------------------------------------------


def _is_layer(graph: Graph, node: onnx.NodeProto) -> bool:
    if node.op_type in INTEGER_OPERATORS or node.op_type in ("Conv", "ConvTranspose"):
        return True
    if node.op_type not in PRODUCTS:
        return False
    source = Layer(graph, node).weight
    at = source.dequantize.input[0] if source.dequantize is not None else operand(node, 1)
    return all(maker.op_type in (*MOVES, "QuantizeLinear") for maker in _makers(graph, at))


def _makers(graph: Graph, name: str) -> list[onnx.NodeProto]:
    """The nodes behind a tensor, along their first inputs, until a constant; an input of the network ends in it too."""
    found = []
    while (maker := graph.maker(name)) is not None:
        found.append(maker)
        name = maker.input[0] if maker.input else ""
    return found if graph.element_type(name) is not None else [onnx.NodeProto(op_type="input")]


def _paths(graph: Graph, name: str) -> list[Path]:
    moves: list[onnx.NodeProto] = []
    while (maker := graph.maker(name)) is not None and maker.op_type in MOVES:
        moves.append(maker)
        name = maker.input[0]
    if maker is not None and maker.op_type == "DequantizeLinear":
        return [Path(maker, None, tuple(moves))]
    if maker is not None and maker.op_type == "Concat":
        return [path for part in maker.input for path in _paths(graph, part)]
    return [Path(None, maker, tuple(moves))]
