"""What FP16 does to the teacher: a run of its FP16 file in which every tensor really is FP16.

onnxruntime's CPU computes an FP16 graph in float32 from end to end, and so neither rounds nor overflows between its
operators as a GPU does. Run operator by operator, each result is stored in the type that the file gives it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from faqd.deploy.export.float16 import float16_from_float32
from faqd.deploy.onnx_model.inference import inferred
from faqd.deploy.onnx_model.session import OnnxSession
from faqd.errors import UserError, first_line

Array = NDArray[Any]
TEACHER_IMAGES = 128
"""Images on which the FP16 teacher must stay finite and is compared."""
BATCH = 32


def teacher_float16(model: onnx.ModelProto, images: Array) -> tuple[onnx.ModelProto | None, str]:
    """The teacher's FP16 form, or None and why it has none. images: (N, C, H, W), on which it must stay finite."""
    try:
        half = float16_from_float32(model)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return None, f"an operator of it has no FP16 form ({first_line(error)})"
    try:
        run_stored(half, images)
    except UserError as reason:
        return None, str(reason)
    return half, ""


def run_stored(model: onnx.ModelProto, inputs: Array) -> dict[str, Array]:
    """The outputs of a network with one input, every tensor in between stored in its own type.

    UserError naming the operator where finite numbers become infinite or none.
    """
    parts = [_run(model, inputs[start : start + BATCH]) for start in range(0, len(inputs), BATCH)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _run(model: onnx.ModelProto, inputs: Array) -> dict[str, Array]:
    graph, found = model.graph, inferred(model).graph
    known = {value.name: value for value in [*found.value_info, *found.input, *found.output]}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    outputs = [value.name for value in graph.output]
    readers = Counter([*(name for node in graph.node for name in node.input), *outputs])
    (source,) = graph.input
    values: dict[str, Array] = {source.name: inputs}
    for node in graph.node:
        read = [name for name in dict.fromkeys(node.input) if name]
        feeds = {name: values[name] for name in read if name not in constants}
        part = helper.make_graph(
            [node],
            "operator",
            [known[name] for name in feeds],
            [known[name] for name in node.output if name],
            [constants[name] for name in read if name in constants],
        )
        cut = helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
        results = OnnxSession(cut.SerializeToString(), optimise=False).run(feeds)
        operands = [*feeds.values(), *(numpy_helper.to_array(constants[name]) for name in read if name in constants)]
        if all(map(_finite, operands)) and not all(map(_finite, results.values())):
            raise UserError(f"operator {node.name} ({node.op_type}) gives values beyond FP16's 65504", exit_code=1)
        values |= results
        for name in node.input:
            readers[name] -= 1
            if not readers[name]:
                values.pop(name, None)
    return {name: values[name] for name in outputs}


def _finite(values: Array) -> bool:
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())
