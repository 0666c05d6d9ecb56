"""A run of a file in which every FP16 tensor really is FP16.

onnxruntime's CPU computes an FP16 graph in float32 from end to end, and so neither rounds nor overflows between its
operators as a GPU does. Run operator by operator, each result is stored in the type that the file gives it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from faqd.deploy.onnx_model.inference import inferred
from faqd.deploy.onnx_model.session import OnnxSession
from faqd.errors import UserError

Array = NDArray[Any]


@dataclass(frozen=True)
class _Operator:
    """One node, ready to run. reads: what is computed of its inputs. finite: whether all its constants are."""

    node: onnx.NodeProto
    session: OnnxSession
    reads: tuple[str, ...]
    finite: bool


class StoredRun:
    """A network, ready to run operator by operator."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph, found = model.graph, inferred(model).graph
        known = {value.name: value for value in [*found.value_info, *found.input, *found.output]}
        constants = {tensor.name: tensor for tensor in graph.initializer}
        self.outputs = [value.name for value in graph.output]
        self._operators: list[_Operator] = []
        for node in graph.node:
            read = [name for name in dict.fromkeys(node.input) if name]
            computed = tuple(name for name in read if name not in constants)
            held = [constants[name] for name in read if name in constants]
            results = [known[name] for name in node.output if name]
            part = helper.make_graph([node], "operator", [known[name] for name in computed], results, held)
            cut = helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
            session = OnnxSession(cut.SerializeToString(), optimise=False)
            self._operators.append(
                _Operator(node, session, computed, all(_finite(numpy_helper.to_array(tensor)) for tensor in held))
            )

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name. UserError naming the operator where finite numbers become infinite or none."""
        readers = Counter([*(name for each in self._operators for name in each.node.input), *self.outputs])
        values = dict(inputs)
        for each in self._operators:
            feeds = {name: values[name] for name in each.reads}
            results = each.session.run(feeds)
            if each.finite and all(map(_finite, feeds.values())) and not all(map(_finite, results.values())):
                raise UserError(
                    f"operator {each.node.name} ({each.node.op_type}) gives values beyond FP16's 65504", exit_code=1
                )
            values |= results
            for name in each.node.input:
                readers[name] -= 1
                if not readers[name]:
                    values.pop(name, None)
        return {name: values[name] for name in self.outputs}


def _finite(values: Array) -> bool:
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())
