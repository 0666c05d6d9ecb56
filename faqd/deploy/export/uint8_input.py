"""Preprocessing inside the network: uint8 pixels (N, H, W, C) in, the float32 (N, C, H, W) of the preprocessing record;
or pixels as floats (N, C, H, W), which is what DeepStream feeds.

Cast, Mul, Add and Transpose stand before the first quantizer, in float32, operation for operation what
`Preprocess.normalise` does, so that the input codes are the same. RGB comes in, whatever order the network wants, from
images that were fitted (resized) before. An engine may multiply and add with one rounding: a value may then differ by
one float32 step, and its code by one where it lay that close to a rounding tie.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from faqd.deploy.onnx_model.inference import inferred
from faqd.deploy.onnx_model.session import OnnxSession
from faqd.errors import UserError
from faqd.preprocess import Preprocess

_PREFIX = "preprocess/"  # No torch module is called so.
_INSIDE = f"{_PREFIX}input"
"""The float32 tensor that was the network's input."""


def with_preprocessing(model: onnx.ModelProto, preprocess: Preprocess) -> onnx.ModelProto:
    """A copy of a network with one float32 input that takes uint8 pixels under the same name."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    (value,) = graph.input
    name, (batch, channels, height, width) = value.name, value.type.tensor_type.shape.dim
    for node in graph.node:
        node.input[:] = [_INSIDE if operand == name else operand for operand in node.input]
    order = {"bgr": [2, 1, 0]}.get(preprocess.channels)
    # In the order of the pixels as they come in.
    scale, offset = (values if order is None else values[order] for values in preprocess.affine())
    constants = {"scale": scale, "offset": offset}
    nodes = [
        _node("Cast", [name], "real", to=TensorProto.FLOAT),
        _node("Mul", [f"{_PREFIX}real", f"{_PREFIX}scale"], "scaled"),
        _node("Add", [f"{_PREFIX}scaled", f"{_PREFIX}offset"], "normalised"),
    ]
    if order is not None:
        constants["order"] = np.array(order)
        nodes.append(_node("Gather", [f"{_PREFIX}normalised", f"{_PREFIX}order"], "ordered", axis=3))
    nodes.append(_node("Transpose", [nodes[-1].output[0]], "input", perm=[0, 3, 1, 2]))
    for node in reversed(nodes):
        graph.node.insert(0, node)
    graph.initializer.extend(numpy_helper.from_array(array, f"{_PREFIX}{key}") for key, array in constants.items())
    shape = [batch.dim_param or batch.dim_value, height.dim_value, width.dim_value, channels.dim_value]
    value.CopyFrom(helper.make_tensor_value_info(name, TensorProto.UINT8, shape))
    inferred(result, check=True)
    return result


def with_normalisation(model: onnx.ModelProto, preprocess: Preprocess) -> onnx.ModelProto:
    """A copy of a network with one float32 input (N, C, H, W) that takes pixels 0..255 there, in its own order of
    channels."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    (value,) = graph.input
    for node in graph.node:
        node.input[:] = [_INSIDE if operand == value.name else operand for operand in node.input]
    constants = dict(zip(("scale", "offset"), (each.reshape(1, -1, 1, 1) for each in preprocess.affine()), strict=True))
    graph.node.insert(0, _node("Mul", [value.name, f"{_PREFIX}scale"], "scaled"))
    graph.node.insert(1, _node("Add", [f"{_PREFIX}scaled", f"{_PREFIX}offset"], "input"))
    graph.initializer.extend(numpy_helper.from_array(array, f"{_PREFIX}{key}") for key, array in constants.items())
    inferred(result, check=True)
    return result


def without_preprocessing(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network behind its preprocessing, with the float32 input that it had: what the exact gates run on.

    UserError where there is no preprocessing inside.
    """
    return _part(model, inside=False)


def compare_preprocessing(model: onnx.ModelProto, pixels: NDArray[Any], wanted: NDArray[np.float32]) -> dict[str, Any]:
    """What the network's own preprocessing makes of `pixels`, as it takes them, in onnxruntime, against `wanted`
    (N, C, H, W)."""
    part = _part(model, inside=True)
    session = OnnxSession(part.SerializeToString(), optimise=False)
    (found,) = session.run({session.inputs[0]: pixels}).values()
    return {
        "images": len(pixels),
        "equal": bool(np.array_equal(found, wanted)),
        "largest_difference": float(np.abs(found - wanted).max()) if found.shape == wanted.shape else None,
    }


def _node(operator: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    name = f"{_PREFIX}{output}"
    return helper.make_node(operator, inputs, [name], f"{name}.{operator.lower()}", **attributes)


def _part(model: onnx.ModelProto, *, inside: bool) -> onnx.ModelProto:
    """The preprocessing, which is all that `preprocess/input` is computed from, or all but it.

    UserError where the network has none, or reads the pixels past it.
    """
    part = onnx.ModelProto()
    part.CopyFrom(model)
    graph = part.graph
    (pixels,) = graph.input
    before = _nodes_of(graph, _INSIDE)
    if not before:
        raise UserError("a network of this bundle takes no uint8 pixels, as its manifest says; export it again.")
    hidden = {pixels.name, *(name for index in before for name in graph.node[index].output)} - {_INSIDE}
    for index, node in enumerate(graph.node):
        if index not in before and not hidden.isdisjoint(node.input):
            raise UserError(f"node {node.name} reads the pixels past their preprocessing; export the run again.")
    batch, *sizes = pixels.type.tensor_type.shape.dim
    as_floats = pixels.type.tensor_type.elem_type == TensorProto.FLOAT
    channels, height, width = sizes if as_floats else (sizes[2], *sizes[:2])
    shape = [batch.dim_param or batch.dim_value, channels.dim_value, height.dim_value, width.dim_value]
    real = helper.make_tensor_value_info(_INSIDE if inside else pixels.name, TensorProto.FLOAT, shape)
    nodes = [node for index, node in enumerate(graph.node) if (index in before) == inside]
    read = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in graph.initializer if tensor.name in read]
    for field, kept in ((graph.node, nodes), (graph.initializer, constants)):
        copies = [type(entry).FromString(entry.SerializeToString()) for entry in kept]
        del field[:]
        field.extend(copies)
    for node in graph.node if not inside else ():
        node.input[:] = [pixels.name if operand == _INSIDE else operand for operand in node.input]
    target = graph.output if inside else graph.input
    del target[:], graph.value_info[:]
    target.append(real)
    return part


def _nodes_of(graph: onnx.GraphProto, tensor: str) -> set[int]:
    """Which nodes a tensor is computed by, itself and all in front of it."""
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output}
    found: set[int] = set()
    stack = [tensor]
    while stack:
        index = makers.get(stack.pop())
        if index is not None and index not in found:
            found.add(index)
            stack.extend(graph.node[index].input)
    return found
