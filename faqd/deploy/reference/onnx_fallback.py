"""Operators that faqd never quantizes, for the reference: what float islands do, ONNX's own reference computes.

The arithmetic of the quantized part is stated by the families beside this file; of these nothing is rounded to codes,
and what they mean is ONNX's to say. They run in float64, so that torch in float64 has the same value but for its last
bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from faqd.deploy.reference import registry
from faqd.reference import real

_NAMES = """
    Softmax LogSoftmax LayerNormalization InstanceNormalization GroupNormalization
    Abs Neg Exp Log Pow Reciprocal Sin Cos Floor Ceil Round Sign Max Min Mod MatMul CumSum Tile CastLike Range
    Softplus Softsign Elu Selu Celu Mish ThresholdedRelu
    ReduceMax ReduceMin ReduceSum ReduceL1 ReduceL2 ReduceProd
    Equal Greater GreaterOrEqual Less LessOrEqual And Or Xor Not Where IsNaN IsInf GridSample
    TopK ArgMax ArgMin Hardmax GatherElements GatherND ScatterElements ScatterND Trilu Einsum OneHot
    ConstantOfShape EyeLike Size SpaceToDepth ReverseSequence Sum Mean
    ReduceSumSquare ReduceLogSum ReduceLogSumExp LpNormalization MeanVarianceNormalization LRN
    Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh LSTM GRU RNN Col2Im Shrink LpPool GlobalLpPool
"""
FLOAT_OPERATORS = frozenset(_NAMES.split()) - registry.OPERATORS.keys()
"""Without what has an arithmetic of its own."""


_RENAMED = {("GridSample", b"bilinear"): (b"linear", 20)}
"""Operators, and modes of theirs, that ONNX's reference knows by the name of a later opset alone."""


def _as_it_is_called_now(node: onnx.NodeProto, opsets: Any) -> tuple[onnx.NodeProto, Any]:
    mode = next((attribute.s for attribute in node.attribute if attribute.name == "mode"), b"")
    if (node.op_type, mode) not in _RENAMED:
        return node, opsets
    name, opset = _RENAMED[node.op_type, mode]
    renamed = onnx.NodeProto()
    renamed.CopyFrom(node)
    next(attribute for attribute in renamed.attribute if attribute.name == "mode").s = name
    return renamed, [onnx.helper.make_opsetid("", opset)]


def computed_in_float(node: onnx.NodeProto, operands: list[Any], opsets: Any) -> tuple[Any, ...]:
    """The results of `node` for `operands` (arrays, Grids, None where an input is left out), in float64."""
    if any(a.name == "mode" and a.s in (b"cubic", b"bicubic") for a in node.attribute):
        raise ValueError("known only without cubic interpolation")
    feeds = {name: real(value) for name, value in zip(node.input, operands, strict=True) if name}
    node, opsets = _as_it_is_called_now(node, opsets)
    inputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, None) for name in feeds]
    outputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, None) for name in node.output if name]
    graph = onnx.helper.make_graph([node], "one", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=opsets)
    results: Any = ReferenceEvaluator(model).run(None, feeds)
    return tuple(value.astype(np.float64) if value.dtype.kind == "f" else value for value in map(np.asarray, results))
