"""An ONNX file that is being written: nodes and tensors called after the places of the network they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from faqd import __version__
from faqd.deploy.export.tensor_facts import BATCH, TensorFacts
from faqd.quantize.nodes import unused
from faqd.quantize.operators.emit import OPSET

_WORDS = {"Clip": "clip", "Relu": "rectified", "QuantizeLinear": "codes", "DequantizeLinear": "real"}
_TYPES = {
    torch.float32: ir.DataType.FLOAT, torch.float64: ir.DataType.FLOAT, torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32, torch.bool: ir.DataType.BOOL,
}  # fmt: skip
"""Types of a network's tensors -> of the file's: what a converted network computes in float64 is float32 there."""


class OnnxFile:
    """What rows of operators write into (`emit.File`). name: of the input, the image. outputs: the names that its
    outputs will have."""

    def __init__(self, name: str, image: TensorFacts, outputs: Sequence[str]) -> None:
        self.input = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=_shape(image))
        self.graph = ir.Graph([self.input], [], nodes=[], opset_imports={"": OPSET}, name="faqd")
        self._taken = {name, *outputs}
        self._numbers: dict[str, ir.Value] = {}

    def operator(
        self, name: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any], place: str
    ) -> ir.Value:
        node = ir.node(name, inputs, attributes)
        self.graph.append(node)
        self.call(node, place)
        result: ir.Value = node.outputs[0]
        return result

    def number(self, name: str, tensor: Tensor) -> ir.Value:
        if name not in self._numbers:
            tensor = tensor.detach().cpu()
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            value = ir.Value(name=unused(name, self._taken))
            value.const_value = ir.tensor(tensor.contiguous().numpy(), name=value.name)
            value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(tensor.shape)
            self.graph.register_initializer(value)
            self._numbers[name] = value
        return self._numbers[name]

    def adopt(self, value: ir.Value, place: str) -> None:
        """Take in an initializer of another graph."""
        value.name = unused(f"{place}.{value.name}", self._taken)
        assert value.const_value is not None
        value.const_value.name = value.name
        self.graph.register_initializer(value)

    def call(self, node: ir.Node, place: str) -> None:
        """Give a node, and what it makes, names of its place."""
        word = _WORDS.get(node.op_type, node.op_type.lower())
        read = node.inputs[0] if node.inputs else None
        if node.op_type == "DequantizeLinear" and read is not None and read.is_initializer():
            word = "real_weight" if "codes" in str(read.name) else "real_bias"
        node.name = unused(f"{place.removesuffix('_quant')}.{word}", self._taken)
        for output in node.outputs:
            output.name = node.name if len(node.outputs) == 1 else unused(str(node.name), self._taken)

    def describe(self, value: ir.Value, facts: TensorFacts) -> None:
        """State the type and the sizes of a tensor."""
        if not value.is_initializer():
            value.type, value.shape = ir.TensorType(_TYPES[facts.dtype]), _shape(facts)

    def model(self, outputs: Mapping[str, ir.Value]) -> ir.Model:
        """The file, whose outputs these are."""
        for name, value in outputs.items():
            if value.is_graph_input() or value.is_initializer() or value.is_graph_output():
                # What a network returns twice, or as it came in, has a tensor of its own.
                again = ir.node("Identity", [value])
                self.graph.append(again)
                self.call(again, name)
                again.outputs[0].type, again.outputs[0].shape = value.type, value.shape
                value = again.outputs[0]
            value.name = name
            self.graph.outputs.append(value)
        return ir.Model(self.graph, ir_version=9, producer_name="faqd", producer_version=__version__)


def _shape(facts: TensorFacts) -> ir.Shape:
    return ir.Shape([size if isinstance(size, int) else "batch" if size == BATCH else None for size in facts.sizes])
