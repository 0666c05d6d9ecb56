"""Shape inference and checks of an ONNX model that do not copy its weights, of which neither reads more than sizes."""

from __future__ import annotations

import math

import onnx
from onnx import TensorProto, helper

_WEIGHTS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.UINT8)
_MANY = 2**10
"""Elements of a tensor that cannot be the scales of a Resize, or another operand that says how large a result is."""


def inferred(model: onnx.ModelProto, *, check: bool = False, values_too: bool = False) -> onnx.ModelProto:
    """The model with the shapes of its tensors, weights left out (they are inputs). check: everything onnx's checker
    knows as well. values_too: propagate the values of shapes. Raises what onnx raises where shapes do not fit."""
    skeleton = _without_weights(model)
    if check:
        for tensor in model.graph.initializer:
            onnx.checker.check_tensor(tensor)
        onnx.checker.check_model(skeleton, full_check=True)
    return onnx.shape_inference.infer_shapes(skeleton, check_type=check, strict_mode=True, data_prop=values_too)


def with_shapes(model: onnx.ModelProto, *, check: bool = False, values_too: bool = False) -> onnx.ModelProto:
    """The model itself, told what `inferred` finds."""
    known = inferred(model, check=check, values_too=values_too).graph
    for ours, found in ((model.graph.value_info, known.value_info), (model.graph.output, known.output)):
        del ours[:]
        ours.extend(found)
    return model


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = model.graph
    weights = [t for t in graph.initializer if t.data_type in _WEIGHTS and math.prod(t.dims) > _MANY]
    left_out, given = {tensor.name for tensor in weights}, {value.name for value in graph.input}
    skeleton = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    skeleton.graph.CopyFrom(
        onnx.GraphProto(
            name=graph.name,
            node=graph.node,
            input=graph.input,
            output=graph.output,
            value_info=graph.value_info,
            initializer=[tensor for tensor in graph.initializer if tensor.name not in left_out],
            sparse_initializer=graph.sparse_initializer,
            quantization_annotation=graph.quantization_annotation,
        )
    )
    skeleton.graph.input.extend(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in weights
        if tensor.name not in given
    )
    return skeleton
