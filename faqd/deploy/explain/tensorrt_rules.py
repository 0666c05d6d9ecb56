"""Why a convolution or linear layer of a Q/DQ file does not run in INT8 on TensorRT: a table of rules.

Each rule is a statement, what to do where it is broken, and a function of `violations`. They were read off
TensorRT-RTX 1.7, and a test builds each case with the one installed; another TensorRT may differ, so a verdict by rule
says that it is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import onnx

from faqd.deploy.explain import violations
from faqd.deploy.explain.qdq_graph import Layer, QdqGraph, layers_of, name_of

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
        (_ZERO_POINT, violations.nonzero),
        (_SCALE, violations.without_scale),
        (_INTEGER_BIAS, violations.of_int32),
        (_ACTIVATION_TYPE, violations.wide_codes),
    )
    return operators | {found: rule for node in quantizers for rule, finds in anywhere if (found := finds(graph, node))}


_OPERATOR = Rule(
    "operator",
    "refused",
    "TensorRT has no operators on integer tensors; it reads Q/DQ around float ones.",
    "Write the Q/DQ form (onnxruntime: quantize_static with quant_format=QuantFormat.QDQ).",
    violations.integer_operator,
)
_MISSING = Rule(
    "no such operator",
    "refused",
    "TensorRT has none of onnxruntime's own operators, and no deformable convolution.",
    "Write standard ONNX, without onnxruntime's optimizer behind it and without UseQDQContribOps; replace deformable "
    "convolutions by ordinary ones.",
    violations.no_operator,
)
_ZERO_POINT = Rule(
    "zero point",
    "refused",
    "Every zero point is 0.",
    "Quantize symmetrically (onnxruntime: QInt8 with ActivationSymmetric and WeightSymmetric).",
    violations.zero_point,
)
_SCALE = Rule(
    "scale",
    "refused",
    "Every scale is a constant.",
    "Quantize statically, with calibration (onnxruntime: quantize_static).",
    violations.computed_scale,
)
_ACTIVATION_TYPE = Rule(
    "activation type",
    "refused",
    "Activations are INT8.",
    "Quantize activations to INT8 (onnxruntime: activation_type=QuantType.QInt8).",
    violations.input_type,
)
_INTEGER_BIAS = Rule(
    "bias",
    "refused",
    "The bias is a float tensor.",
    "Keep the bias float (onnxruntime: extra_options QuantizeBias=False).",
    violations.integer_bias,
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
        "Store quantized weights as INT8, whatever their bits (onnxruntime: weight_type=QuantType.QInt8).",
        violations.weight_type,
    ),
    _ACTIVATION_TYPE,
    _INTEGER_BIAS,
    Rule(
        "transposed convolution",
        "float",
        "A transposed convolution runs in float.",
        "Replace it by Resize and Conv, or leave it without Q/DQ, which costs time and gains nothing.",
        violations.transposed,
    ),
    Rule(
        "weight quantized",
        "float",
        "The weights come out of a DequantizeLinear.",
        "Quantize them; if the layer was excluded from quantization, that is why.",
        violations.float_weight,
    ),
    Rule(
        "weight axis",
        "float",
        "Weight scales run along the output channel.",
        "Set axis to the output channel: 0 for Conv and Gemm with transB, 1 for Gemm without and MatMul.",
        violations.weight_axis,
    ),
    Rule(
        "float8",
        "float",
        "FP8 is no INT8.",
        "Quantize to INT8 for a GPU that is to run INT8.",
        violations.float8,
    ),
    Rule(
        "average",
        "float",
        "An average makes values between the quantized ones.",
        "Put Q/DQ after the average as well.",
        violations.averaged,
    ),
    Rule(
        "input quantized",
        "float",
        "The input comes out of a DequantizeLinear; only operators that move values may stand between.",
        "Put Q/DQ directly before the layer, behind that operator.",
        violations.float_input,
    ),
    Rule(
        "activation scale",
        "float",
        "An activation has one scale.",
        "Quantize the activation per tensor.",
        violations.per_channel_input,
    ),
    Rule(
        "concatenation",
        "float",
        "Concatenated maps share one scale, or are quantized again behind the Concat.",
        "Give all of them one scale, or put one Q/DQ after the Concat.",
        violations.unequal_scales,
    ),
    Rule(
        "unsigned activation",
        "inexact",
        "TensorRT reads UINT8 values as INT8, and those above 127 saturate.",
        "Quantize activations to INT8; values up to 127 keep their meaning.",
        violations.unsigned_input,
    ),
)
"""In the order in which they decide: what refuses the file first, then what makes the layer float."""
