"""The reference: runs an exported Q/DQ file in exact integers, with the arithmetic that the families beside it state.

It reads only the file and shares no code with the exporter. Files of other tools it runs as well, where they keep to
standard operators of opset 13 to 20 that it knows; anything else it refuses. Where two backends disagree, it decides.
A tensor is a float64 array, an integer array, or a Grid (codes and their scale, what DequantizeLinear yields); an
operator that can work on codes does, any other works on real values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from faqd.deploy.reference import registry
from faqd.deploy.reference.layer import product_of_codes
from faqd.deploy.reference.onnx_fallback import FLOAT_OPERATORS, computed_in_float
from faqd.deploy.reference.values import Attributes, Operator, Value
from faqd.errors import UserError, first_line
from faqd.reference import real

OPSETS = range(13, 21)
_NEUTRAL: Attributes = {
    "auto_pad": b"NOTSET",
    "noop_with_empty_axes": 0,
    "storage_order": 0,
    "training_mode": 0,
}
"""Attributes that are known only with this value, which changes nothing."""


class Evaluator:
    """One ONNX model, ready to run."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self._opsets = model.opset_import
        _refuse_unknown(model)
        self._constants: dict[str, Value] = {t.name: _value(numpy_helper.to_array(t)) for t in model.graph.initializer}

    def run(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, Value]:
        """Every tensor of the graph by name, for float32 inputs: float64 arrays, integer arrays and Grids."""
        values = self._constants | {name: _value(array) for name, array in inputs.items()}
        for node in self.graph.node:
            operands = [values[name] if name else None for name in node.input]
            try:
                values |= dict(zip(filter(None, node.output), self.results(node, operands), strict=True))
            except _CANNOT_COMPUTE as error:
                raise UserError(
                    f"{node.name}: the integer reference cannot run this {node.op_type}: {first_line(error)}."
                ) from error
        return values

    def results(self, node: onnx.NodeProto, operands: list[Value]) -> tuple[Value, ...]:
        """What one node makes of its operands."""
        if node.op_type == "MatMul" and (product := product_of_codes(*operands)) is not None:
            return (product,)
        if node.op_type in FLOAT_OPERATORS:
            return computed_in_float(node, operands, self._opsets)
        result = OPERATORS[node.op_type](operands, _attributes(node))
        return result if isinstance(result, tuple) else (result,)


_CANNOT_COMPUTE = (
    *(ValueError, IndexError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError),
    *(ArithmeticError, AssertionError, MemoryError),
)
"""What numpy, and ONNX's reference, raise where operands do not fit an operator."""


def code_tensors(graph: onnx.GraphProto) -> list[str]:
    """Names of the integer tensors that activations are dequantized from, in graph order."""
    constants = {t.name for t in graph.initializer}
    names = [n.input[0] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] not in constants]
    return list(dict.fromkeys(names))


def stored(value: Value) -> NDArray[Any]:
    """A value of the reference in the type the file declares: integers as they are, real values as float32."""
    array = real(value)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _refuse_unknown(model: onnx.ModelProto) -> None:
    versions = {entry.domain: entry.version for entry in model.opset_import}
    if versions.get("", 0) not in OPSETS:
        known = f"{OPSETS[0]} to {OPSETS[-1]}"
        raise UserError(f"the integer reference knows opset {known}, found {versions.get('', 'none')}.")
    standard = {node.op_type for node in model.graph.node if not node.domain}
    foreign = {f"{node.domain}.{node.op_type}" for node in model.graph.node if node.domain}
    unknown = sorted(foreign | standard - set(OPERATORS) - FLOAT_OPERATORS)
    if unknown:
        raise UserError(f"the integer reference knows no {', '.join(unknown)}; it cannot verify this file.")
    for node in model.graph.node:
        if node.op_type in FLOAT_OPERATORS:
            continue
        for name, value in _attributes(node).items():
            if value != _NEUTRAL.get(name, value):
                operator = f"{node.op_type} only without {name} = {value!r}"
                raise UserError(f"{node.name}: the integer reference knows {operator}.")
        if len(list(filter(None, node.output))) > 1 and node.op_type != "Split":
            raise UserError(f"{node.name}: the integer reference knows {node.op_type} only with one output.")


def _attributes(node: onnx.NodeProto) -> Attributes:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _value(array: NDArray[Any]) -> Value:
    if array.dtype.kind not in "fiub":
        raise UserError(f"the integer reference knows no {array.dtype} numbers.")
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _constant(attributes: Attributes) -> Value:
    """A Constant has one attribute: value as a tensor, or a number or numbers under another name."""
    (value,) = attributes.values()
    return _value(numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value))


OPERATORS: dict[str, Operator] = {**registry.OPERATORS, "Constant": lambda operands, a: _constant(a)}
