"""The graph of an ONNX file as one looks things up in it: who makes a tensor, its constant value, its shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper


class Graph:
    """Of a model whose shapes were inferred, so that `shape` knows them."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.nodes: list[onnx.NodeProto] = list(graph.node)
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in self.nodes:  # Some tools keep constants in nodes, and share them through others.
            if node.op_type == "Constant" and "value" in (attributes := attributes_of(node)):
                self._constants[node.output[0]] = attributes["value"]
            elif node.op_type == "Identity" and node.input[0] in self._constants:
                self._constants[node.output[0]] = self._constants[node.input[0]]
        self._makers = {name: node for node in self.nodes for name in node.output}
        self._shapes = {
            value.name: tuple(size.dim_value for size in value.type.tensor_type.shape.dim)
            for value in (*graph.input, *graph.value_info, *graph.output)
            if value.type.tensor_type.HasField("shape")
        } | {name: tuple(tensor.dims) for name, tensor in self._constants.items()}

    def constant(self, name: str) -> NDArray[Any] | None:
        """The value of a constant tensor; None where it is computed, or is an input."""
        tensor = self._constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def element_type(self, name: str) -> str | None:
        """The element type of a constant, such as INT8 or INT4."""
        tensor = self._constants.get(name)
        return None if tensor is None else onnx.TensorProto.DataType.Name(tensor.data_type)

    def maker(self, name: str) -> onnx.NodeProto | None:
        """The node that computes a tensor; None for inputs and constants."""
        return None if name in self._constants else self._makers.get(name)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """0 where a size is free; None where nothing is known."""
        return self._shapes.get(name)


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def operand(node: onnx.NodeProto, index: int) -> str:
    """The name of an input, empty where the node has none there."""
    return node.input[index] if index < len(node.input) else ""


def scale_of(graph: Graph, node: onnx.NodeProto) -> NDArray[np.float64] | None:
    """The constant scale of a QuantizeLinear or DequantizeLinear; None where it is computed."""
    scale = graph.constant(operand(node, 1))
    return None if scale is None else scale.astype(np.float64)
