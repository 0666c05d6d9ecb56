"""Why a convolution or linear layer of a Q/DQ file does not run in INT8 on TensorRT: a table of rules.

Each rule is a statement, what to do where it is broken, and a function that says what it found. They were read off
TensorRT-RTX 1.7, and a test builds each case with the one installed; another TensorRT may differ, so a verdict by rule
says that it is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import onnx

from faqd.deploy.explain.qdq_graph import INTEGER_OPERATORS, Layer, QdqGraph, code_type, layers_of, name_of
from faqd.deploy.onnx_model.graph import Graph, attributes_of, operand

_AVERAGES = ("AveragePool", "GlobalAveragePool", "ReduceMean")

Effect = Literal["refused", "float", "inexact"]
"""refused: TensorRT does not take the file; float: it builds, this layer runs in float; inexact: it runs in INT8 and
computes something else than the file says."""


@dataclass(frozen=True)
class Rule:
    name: str
    effect: Effect
    says: str
    cure: str
    found: Callable[[Layer], str | None]
    """What breaks the rule in a layer, naming the place; None where the rule holds."""


Broken = tuple[Rule, str]
"""A rule, and what was found that breaks it."""


def first_broken(layer: Layer) -> Broken | None:
    """The first rule of the table that the layer breaks."""
    for rule in RULES:
        found = rule.found(layer)
        if found is not None:
            return rule, found
    return None


def int8_layers(model: onnx.ModelProto) -> dict[str, bool]:
    """Whether each layer of a file that faqd wrote runs in INT8 by the rules, by its place in the torch network."""
    layers = layers_of(QdqGraph(onnx.shape_inference.infer_shapes(model)))
    return {name_of(layer.node).rpartition(".")[0]: first_broken(layer) is None for layer in layers}


def refusals(graph: QdqGraph) -> dict[str, Rule]:
    """What makes TensorRT refuse the whole file, also where no layer has a part in it: by what was found."""
    quantizers = [node for node in graph.nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    operators = {
        found: rule
        for node in graph.nodes
        for rule in (_OPERATOR, _MISSING)
        if (found := rule.found(Layer(graph, node)))
    }
    anywhere = (
        (_ZERO_POINT, _nonzero),
        (_SCALE, _without_scale),
        (_INTEGER_BIAS, _of_int32),
        (_ACTIVATION_TYPE, _wide_codes),
    )
    return operators | {found: rule for node in quantizers for rule, finds in anywhere if (found := finds(graph, node))}


# What breaks each rule -------------------------------------------------------------------------------------------


def _integer_operator(layer: Layer) -> str | None:
    node = layer.node
    if node.op_type in INTEGER_OPERATORS:
        return f"{name_of(node)} is a {node.op_type}"
    return None


def _no_operator(layer: Layer) -> str | None:
    node = layer.node
    foreign = node.domain == "com.microsoft" and node.op_type not in INTEGER_OPERATORS
    return f"{name_of(node)} is a {node.op_type}" if foreign or node.op_type == "DeformConv" else None


def _zero_point(layer: Layer) -> str | None:
    return next((text for node in layer.dequantizers if (text := _nonzero(layer.graph, node))), None)


def _nonzero(graph: Graph, node: onnx.NodeProto) -> str | None:
    zero = graph.constant(operand(node, 2)) if operand(node, 2) else None
    if zero is None or zero.dtype.kind not in "iu" or not zero.any():
        return None
    return f"{name_of(node)} has the zero point {zero.reshape(-1)[zero.reshape(-1).nonzero()[0][0]]}"


def _weight_type(layer: Layer) -> str | None:
    node = layer.weight.dequantize
    if node is None or layer.graph.element_type(node.input[0]) is None:  # Quantized in place: TensorRT does it again.
        return None
    found = code_type(layer.graph, node)
    return None if found == "INT8" or found.startswith("FLOAT8") else f"{name_of(node)} has {found} weights"


def _input_type(layer: Layer) -> str | None:
    for node in layer.input_quantizers:
        if (found := code_type(layer.graph, node)) not in ("INT8", "UINT8") and not found.startswith("FLOAT8"):
            return f"{name_of(node)} has {found} codes"
    return None


def _integer_bias(layer: Layer) -> str | None:
    node = layer.bias.dequantize
    return None if node is None else _of_int32(layer.graph, node)


def _of_int32(graph: QdqGraph, node: onnx.NodeProto) -> str | None:
    return f"{name_of(node)} makes floats of INT32" if code_type(graph, node) == "INT32" else None


def _computed_scale(layer: Layer) -> str | None:
    return next((text for node in layer.dequantizers if (text := _without_scale(layer.graph, node))), None)


def _without_scale(graph: QdqGraph, node: onnx.NodeProto) -> str | None:
    return None if graph.is_stored(operand(node, 1)) else f"{name_of(node)} computes its scale from the input"


def _wide_codes(graph: QdqGraph, node: onnx.NodeProto) -> str | None:
    found = code_type(graph, node)
    return f"{name_of(node)} has {found} codes" if found in ("INT16", "UINT16") else None


def _float8(layer: Layer) -> str | None:
    for node in layer.dequantizers:
        if (found := code_type(layer.graph, node)).startswith("FLOAT8"):
            return f"{name_of(node)} has {found} codes"
    return None


def _transposed(layer: Layer) -> str | None:
    return f"{name_of(layer.node)} is a ConvTranspose" if layer.node.op_type == "ConvTranspose" else None


def _float_weight(layer: Layer) -> str | None:
    if layer.weight.dequantize is not None:
        return None
    blocker = layer.weight.blocked_by
    return "its weights are float" if blocker is None else f"{_between(blocker)} the weights' Q/DQ and the layer"


def _weight_axis(layer: Layer) -> str | None:
    node = layer.weight.dequantize
    scale = layer.graph.scale(node) if node is not None else None
    wanted = layer.channel_axis
    if node is None or scale is None or scale.size == 1 or scale.ndim > 1 or wanted is None:
        return None  # Scales of two axes are for blocks of the weights, which TensorRT takes.
    rank = len(layer.graph.shape(node.input[0]) or ()) or 1
    axis = attributes_of(node).get("axis", 1) % rank
    return None if axis == wanted else f"{name_of(node)} has scales along axis {axis}, the output channel is {wanted}"


def _averaged(layer: Layer) -> str | None:
    for path in layer.inputs:
        if path.blocked_by is not None and path.blocked_by.op_type in _AVERAGES:
            return f"{_between(path.blocked_by)} Q/DQ and the layer"
    return None


def _float_input(layer: Layer) -> str | None:
    for path in layer.inputs:
        if path.dequantize is None and path.blocked_by is None:
            return "nothing quantizes its input"
        if path.blocked_by is not None:
            return f"its input is float: {name_of(path.blocked_by)} ({path.blocked_by.op_type}) makes it"
    return None


def _per_channel_input(layer: Layer) -> str | None:
    for node in layer.input_quantizers:
        scale = layer.graph.scale(node)
        if scale is not None and scale.size > 1:
            return f"{name_of(node)} has {scale.size} scales"
    return None


def _unequal_scales(layer: Layer) -> str | None:
    scales = [layer.graph.scale(node) for node in layer.input_quantizers]
    values = {float(scale.reshape(-1)[0]) for scale in scales if scale is not None}
    return (
        f"the concatenated maps have the scales {', '.join(f'{v:g}' for v in sorted(values))}"
        if len(values) > 1
        else None
    )


def _unsigned_input(layer: Layer) -> str | None:
    for node in layer.input_quantizers:
        if code_type(layer.graph, node) == "UINT8":
            return f"{name_of(node)} has UINT8 codes" + ("" if operand(node, 2) else " (no zero point means UINT8)")
    return None


def _between(node: onnx.NodeProto) -> str:
    return f"{name_of(node)} ({node.op_type}) stands between"


_OPERATOR = Rule(
    "operator",
    "refused",
    "TensorRT has no operators on integer tensors; it reads Q/DQ around float ones.",
    "Write the Q/DQ form (onnxruntime: quantize_static with quant_format=QuantFormat.QDQ).",
    _integer_operator,
)
_MISSING = Rule(
    "no such operator",
    "refused",
    "TensorRT has none of onnxruntime's own operators, and no deformable convolution.",
    "Write standard ONNX, without onnxruntime's optimizer behind it and without UseQDQContribOps; replace deformable "
    "convolutions by ordinary ones.",
    _no_operator,
)
_ZERO_POINT = Rule(
    "zero point",
    "refused",
    "Every zero point is 0.",
    "Quantize symmetrically (onnxruntime: QInt8 with ActivationSymmetric and WeightSymmetric).",
    _zero_point,
)
_SCALE = Rule(
    "scale",
    "refused",
    "Every scale is a constant.",
    "Quantize statically, with calibration (onnxruntime: quantize_static).",
    _computed_scale,
)
_ACTIVATION_TYPE = Rule(
    "activation type",
    "refused",
    "Activations are INT8.",
    "Quantize activations to INT8 (onnxruntime: activation_type=QuantType.QInt8).",
    _input_type,
)
_INTEGER_BIAS = Rule(
    "bias",
    "refused",
    "The bias is a float tensor.",
    "Keep the bias float (onnxruntime: extra_options QuantizeBias=False).",
    _integer_bias,
)
RULES: tuple[Rule, ...] = (
    _OPERATOR,
    _MISSING,
    _ZERO_POINT,
    _SCALE,
    Rule(
        "weight type",
        "refused",
        "Weights are INT8: UINT8 is refused, and with 4 bits or fewer no convolution builds.",
        "Store the codes as INT8, whatever their bits (onnxruntime: weight_type=QuantType.QInt8).",
        _weight_type,
    ),
    _ACTIVATION_TYPE,
    _INTEGER_BIAS,
    Rule(
        "transposed convolution",
        "float",
        "A transposed convolution runs in float.",
        "Replace it by Resize and Conv, or leave it without Q/DQ, which costs time and gains nothing.",
        _transposed,
    ),
    Rule(
        "weight quantized",
        "float",
        "The weights come out of a DequantizeLinear.",
        "Quantize them; if the layer was excluded from quantization, that is why.",
        _float_weight,
    ),
    Rule(
        "weight axis",
        "float",
        "Weight scales run along the output channel.",
        "Set axis to the output channel: 0 for Conv and Gemm with transB, 1 for Gemm without and MatMul.",
        _weight_axis,
    ),
    Rule(
        "float8",
        "float",
        "FP8 is no INT8.",
        "Quantize to INT8 for a GPU that is to run INT8.",
        _float8,
    ),
    Rule(
        "average",
        "float",
        "An average makes values that are no codes.",
        "Put Q/DQ after the average as well.",
        _averaged,
    ),
    Rule(
        "input quantized",
        "float",
        "The input comes out of a DequantizeLinear; only operators that move values may stand between.",
        "Put Q/DQ directly before the layer, behind that operator.",
        _float_input,
    ),
    Rule(
        "activation scale",
        "float",
        "An activation has one scale.",
        "Quantize the activation per tensor.",
        _per_channel_input,
    ),
    Rule(
        "concatenation",
        "float",
        "Concatenated maps share one scale, or are quantized again behind the Concat.",
        "Give all of them one scale, or put one Q/DQ after the Concat.",
        _unequal_scales,
    ),
    Rule(
        "unsigned activation",
        "inexact",
        "TensorRT reads UINT8 codes as INT8, and those above 127 saturate.",
        "Quantize activations to INT8; codes up to 127 keep their meaning.",
        _unsigned_input,
    ),
)
"""In the order in which they decide: what refuses the file first, then what makes the layer float."""
