"""What in a file breaks a rule of TensorRT's, naming the place; None where the rule holds.

Most are asked of a layer. Those of a graph and a node hold anywhere in the file, also where no layer has a part in it.
"""

from __future__ import annotations

import onnx

from faqd.deploy.explain.qdq_graph import INTEGER_OPERATORS, Layer, QdqGraph, code_type, name_of
from faqd.deploy.onnx_model.graph import Graph, attributes_of, operand

_AVERAGES = ("AveragePool", "GlobalAveragePool", "ReduceMean")


def integer_operator(layer: Layer) -> str | None:
    node = layer.node
    if node.op_type in INTEGER_OPERATORS:
        return f"{name_of(node)} is a {node.op_type}"
    return None


def no_operator(layer: Layer) -> str | None:
    node = layer.node
    foreign = node.domain == "com.microsoft" and node.op_type not in INTEGER_OPERATORS
    return f"{name_of(node)} is a {node.op_type}" if foreign or node.op_type == "DeformConv" else None


def zero_point(layer: Layer) -> str | None:
    return next((text for node in layer.dequantizers if (text := nonzero(layer.graph, node))), None)


def nonzero(graph: Graph, node: onnx.NodeProto) -> str | None:
    zero = graph.constant(operand(node, 2)) if operand(node, 2) else None
    if zero is None or zero.dtype.kind not in "iu" or not zero.any():
        return None
    return f"{name_of(node)} has the zero point {zero.reshape(-1)[zero.reshape(-1).nonzero()[0][0]]}"


def weight_type(layer: Layer) -> str | None:
    node = layer.weight.dequantize
    if node is None or layer.graph.element_type(node.input[0]) is None:  # Quantized in place: TensorRT does it again.
        return None
    found = code_type(layer.graph, node)
    return None if found == "INT8" or found.startswith("FLOAT8") else f"{name_of(node)} has {found} weights"


def input_type(layer: Layer) -> str | None:
    for node in layer.input_quantizers:
        if (found := code_type(layer.graph, node)) not in ("INT8", "UINT8") and not found.startswith("FLOAT8"):
            return f"{name_of(node)} has {found} codes"
    return None


def integer_bias(layer: Layer) -> str | None:
    node = layer.bias.dequantize
    return None if node is None else of_int32(layer.graph, node)


def of_int32(graph: QdqGraph, node: onnx.NodeProto) -> str | None:
    return f"{name_of(node)} makes floats of INT32" if code_type(graph, node) == "INT32" else None


def computed_scale(layer: Layer) -> str | None:
    return next((text for node in layer.dequantizers if (text := without_scale(layer.graph, node))), None)


def without_scale(graph: QdqGraph, node: onnx.NodeProto) -> str | None:
    return None if graph.is_stored(operand(node, 1)) else f"{name_of(node)} computes its scale from the input"


def wide_codes(graph: QdqGraph, node: onnx.NodeProto) -> str | None:
    found = code_type(graph, node)
    return f"{name_of(node)} has {found} codes" if found in ("INT16", "UINT16") else None


def float8(layer: Layer) -> str | None:
    for node in layer.dequantizers:
        if (found := code_type(layer.graph, node)).startswith("FLOAT8"):
            return f"{name_of(node)} has {found} codes"
    return None


def transposed(layer: Layer) -> str | None:
    return f"{name_of(layer.node)} is a ConvTranspose" if layer.node.op_type == "ConvTranspose" else None


def float_weight(layer: Layer) -> str | None:
    if layer.weight.dequantize is not None:
        return None
    blocker = layer.weight.blocked_by
    return "its weights are float" if blocker is None else f"{_between(blocker)} the weights' Q/DQ and the layer"


def weight_axis(layer: Layer) -> str | None:
    node = layer.weight.dequantize
    scale = layer.graph.scale(node) if node is not None else None
    wanted = layer.channel_axis
    if node is None or scale is None or scale.size == 1 or scale.ndim > 1 or wanted is None:
        return None  # Scales of two axes are for blocks of the weights, which TensorRT takes.
    rank = len(layer.graph.shape(node.input[0]) or ()) or 1
    axis = attributes_of(node).get("axis", 1) % rank
    return None if axis == wanted else f"{name_of(node)} has scales along axis {axis}, the output channel is {wanted}"


def averaged(layer: Layer) -> str | None:
    for path in layer.inputs:
        if path.blocked_by is not None and path.blocked_by.op_type in _AVERAGES:
            return f"{_between(path.blocked_by)} Q/DQ and the layer"
    return None


def float_input(layer: Layer) -> str | None:
    for path in layer.inputs:
        if path.dequantize is None and path.blocked_by is None:
            return "nothing quantizes its input"
        if path.blocked_by is not None:
            return f"its input is float: {name_of(path.blocked_by)} ({path.blocked_by.op_type}) makes it"
    return None


def per_channel_input(layer: Layer) -> str | None:
    for node in layer.input_quantizers:
        scale = layer.graph.scale(node)
        if scale is not None and scale.size > 1:
            return f"{name_of(node)} has {scale.size} scales"
    return None


def unequal_scales(layer: Layer) -> str | None:
    scales = [layer.graph.scale(node) for node in layer.input_quantizers]
    values = {float(scale.reshape(-1)[0]) for scale in scales if scale is not None}
    return (
        f"the concatenated maps have the scales {', '.join(f'{v:g}' for v in sorted(values))}"
        if len(values) > 1
        else None
    )


def unsigned_input(layer: Layer) -> str | None:
    for node in layer.input_quantizers:
        if code_type(layer.graph, node) == "UINT8":
            return f"{name_of(node)} puts out UINT8" + ("" if operand(node, 2) else " (no zero point means UINT8)")
    return None


def _between(node: onnx.NodeProto) -> str:
    return f"{name_of(node)} ({node.op_type}) stands between"
