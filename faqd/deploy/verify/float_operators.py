"""What onnxruntime computes inside float islands against the reference, operator by operator.

Each operator is given what onnxruntime itself gave to it, so that errors do not add up and a step, such as of a Floor,
falls the same way on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from faqd.deploy.onnx_model.session import OnnxSession
from faqd.deploy.reference.evaluator import Evaluator
from faqd.deploy.reference.onnx_fallback import FLOAT_OPERATORS
from faqd.deploy.verify.numbers import WEIGHTED
from faqd.deploy.verify.segments import Segment, place_of
from faqd.reference import real

_SAME = (
    24,
    (
        *("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Concat", "Gather", "Expand"),
        *("Identity", "Pad", "Tile", "GatherElements", "GatherND", "TopK", "Where", "Neg", "Abs", "Max", "Min", "Relu"),
        *("Floor", "Ceil", "Round", "Sign", "Trilu", "ReduceMax", "ReduceMin", "DequantizeLinear", "MaxPool"),
    ),
)
_ROUNDED_ONCE = 22, ("Add", "Sub", "Mul", "Div", "Sqrt", "Reciprocal", "Clip", "LeakyRelu", "PRelu")
_FUNCTIONS = (
    18,
    (*("Exp", "Log", "Sin", "Cos", "Erf", "Tanh", "Sigmoid", "Softplus", "Pow", "HardSigmoid", "HardSwish", "Elu"),),
)
_SUMS = (
    16,
    (
        *("MatMul", "Gemm", "Conv", "ConvTranspose", "Softmax", "LogSoftmax", "LayerNormalization", "CumSum", "Einsum"),
        *("GroupNormalization", "InstanceNormalization", "ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare"),
        *("AveragePool", "GlobalAveragePool"),
    ),
)
OTHERS = 12
MOST = 53.0
SMALLEST = float(np.finfo(np.float32).tiny)
BITS = {operator: bits for bits, operators in (_SAME, _ROUNDED_ONCE, _FUNCTIONS, _SUMS) for operator in operators}
"""By operator, the significant bits of each image's largest result that onnxruntime's float32 has to have right: all
where values only move; less one or two where one operation rounds; 18 for functions, which it approximates by
polynomials; 16 for sums, whose order is its own; OTHERS for whatever is made of several of these."""


class FloatOperators:
    """A segment with float operators, run by onnxruntime as written so that it shows what is inside."""

    def __init__(self, segment: Segment) -> None:
        graph = segment.model.graph
        self._evaluator = Evaluator(segment.model)
        self._constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self._nodes = _float_nodes(graph)
        inside = dict.fromkeys(name for node in self._nodes for name in (*node.input, *node.output))
        known = {value.name: value for value in graph.value_info}
        whole = onnx.ModelProto()
        whole.CopyFrom(segment.model)
        whole.graph.output.extend(known[name] for name in inside if name in known)
        self._session = OnnxSession(whole.SerializeToString(), optimise=False)

    def run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """What onnxruntime is fed, and what it computes, by name."""
        return feeds | self._session.run(feeds)

    def failures(self, values: dict[str, NDArray[Any]]) -> Iterator[str]:
        """What `run` gave and the reference does not, operator by operator."""
        for node in self._nodes:
            operands = [values.get(name, self._constants.get(name)) for name in node.input]
            results = self._evaluator.results(node, [None if x is None else _wide(x) for x in operands])
            for name, result in zip(node.output, results, strict=True):
                bits, least = _right_bits(values[name], real(result)) if name else MOST, BITS.get(node.op_type, OTHERS)
                if bits < least:
                    yield (
                        f"{place_of(node)}: {node.op_type} is right to {bits:.0f} bits in onnxruntime, at least "
                        f"{least} are needed"
                    )


def has_float_operators(segment: Segment) -> bool:
    return any(node.op_type in FLOAT_OPERATORS for node in segment.model.graph.node)


def _float_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """All but the roundings and layers of integers, which codes prove."""
    dequantized = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    return [
        node
        for node in graph.node
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear")
        and not (node.op_type in WEIGHTED and node.input[1] in dequantized)
    ]


def _wide(values: NDArray[Any]) -> NDArray[Any]:
    return values.astype(np.float64) if values.dtype.kind == "f" else values


def _right_bits(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Of the largest value of each image, or of each row of the first axis: the fewest."""
    if wanted.dtype.kind != "f":
        return MOST if np.array_equal(found, wanted) else 0.0
    rows = len(wanted) if wanted.ndim else 1
    with np.errstate(invalid="ignore"):
        apart = np.abs(found.astype(np.float64) - wanted)
    apart = np.where((found == wanted) | (np.isnan(found) & np.isnan(wanted)), 0.0, apart).reshape(rows, -1)
    if not np.isfinite(apart).all():
        return 0.0
    size = np.where(np.isfinite(wanted), np.abs(wanted), 0.0).reshape(rows, -1).max(1, initial=SMALLEST)
    worst = float((apart.max(1, initial=0.0) / size).max(initial=0.0))
    return min(MOST, -math.log2(worst)) if worst else MOST
