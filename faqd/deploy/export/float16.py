"""The unquantized rest of a Q/DQ file, or a whole float network, to FP16, with every scale kept in FP32.

At opset 19 an FP16 graph may have FP32 scales only through Casts: one to FP32 before each QuantizeLinear, one to FP16
after each DequantizeLinear, weights included. TensorRT-RTX keeps convolutions and Gemm in INT8 so; with FP16 weight
scales it refuses the Gemm. Types that the graph states itself, in constants and casts, follow; a constant beyond FP16
becomes its largest value: a mask of -1e9 must not become an infinity.

Operators for which FP16 is too coarse (`float16_islands`) compute in FP32, between Casts of their own.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from faqd.deploy.onnx_model.inference import inferred

_FLOAT32_INPUTS = {"QuantizeLinear", "DequantizeLinear", "Resize"}
"""Operators whose scales stay FP32; Resize knows no others."""
STATED = {"Cast", "Constant", "ConstantOfShape"}
"""Operators that state the type of their output."""
LARGEST = float(np.finfo(np.float16).max)


def float16_from_float32(model: onnx.ModelProto, stay: Collection[str] = ()) -> onnx.ModelProto:
    """A copy of a float32 Q/DQ model whose inputs and outputs stay float32 and whose rest computes in FP16.

    stay: names of nodes that compute in float32 as well, with float32 constants.
    """
    half = onnx.ModelProto()
    half.CopyFrom(model)
    graph = half.graph
    outputs = {value.name for value in graph.output}
    scales = {name for node in graph.node if node.op_type in _FLOAT32_INPUTS for name in node.input[1:]}
    own = {name for node in graph.node if node.name in stay for name in node.input}
    own &= {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    _convert_constants(graph, scales | own, stay)
    widened = {value.name for value in graph.input if value.type.tensor_type.elem_type == TensorProto.FLOAT} | own
    floats = _floats(model) if stay else set()
    wide: dict[str, str] = {}
    """The float32 form of tensors that are FP16 here."""
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            if node.input[0] not in widened:
                node.input[0] = _cast(nodes, node.input[0], f"{node.name}.wide", TensorProto.FLOAT)
            nodes.append(node)
        elif node.op_type == "DequantizeLinear" and node.output[0] in outputs:
            nodes.append(node)
            widened.add(node.output[0])
        elif node.op_type == "DequantizeLinear":
            name = node.output[0]
            node.output[0] = wide[name] = f"{name}.wide"
            nodes.append(node)
            _cast(nodes, node.output[0], name, TensorProto.FLOAT16)
        elif node.name in stay:
            for index, name in enumerate(node.input):
                if name in floats - widened:
                    wide[name] = wide.get(name) or _cast(nodes, name, f"{name}.wide", TensorProto.FLOAT)
                    node.input[index] = wide[name]
            nodes.append(node)
            widened |= floats.intersection(node.output)
        else:
            for index, name in enumerate(node.input):
                if name in widened:
                    node.input[index] = _cast(nodes, name, f"{node.name}.narrow_{index}", TensorProto.FLOAT16)
            for index, name in enumerate(node.output):
                if name in outputs:
                    node.output[index] = f"{name}.narrow"
            nodes.append(node)
            for name in outputs & {name.removesuffix(".narrow") for name in node.output}:
                widened.add(_cast(nodes, f"{name}.narrow", name, TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(_without_unread_casts(nodes, outputs))
    del graph.value_info[:]
    inferred(half, check=True)
    return half


def _floats(model: onnx.ModelProto) -> set[str]:
    """The float32 tensors that are computed."""
    found = inferred(model).graph
    values = (*found.value_info, *found.output)
    return {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}


def _without_unread_casts(nodes: list[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    read = {name for node in nodes for name in node.input} | outputs
    return [node for node in nodes if node.op_type != "Cast" or node.output[0] in read]


def _convert_constants(graph: onnx.GraphProto, wide: set[str], stay: Collection[str]) -> None:
    """wide: tensors that stay float32."""
    for tensor in graph.initializer:
        if tensor.name not in wide:
            _narrow(tensor)
    for node in graph.node:
        if node.op_type not in STATED or node.output[0] in wide or node.name in stay:
            continue
        for attribute in node.attribute:
            if attribute.name == "value":
                _narrow(attribute.t)
            elif attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
            elif attribute.name in ("value_float", "value_floats"):
                value = attribute.f if attribute.name == "value_float" else list(attribute.floats)
                attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(narrowed(np.asarray(value)))))


def _narrow(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        tensor.CopyFrom(numpy_helper.from_array(narrowed(numpy_helper.to_array(tensor)), tensor.name))


def narrowed(values: NDArray[Any]) -> NDArray[np.float16]:
    """What a float32 constant is in the FP16 file."""
    return np.asarray(np.clip(values, -LARGEST, LARGEST), np.float16)


def _cast(nodes: list[onnx.NodeProto], source: str, target: str, to: int) -> str:
    nodes.append(helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=to))
    return target
