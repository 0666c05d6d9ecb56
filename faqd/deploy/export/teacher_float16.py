"""What FP16 does to the teacher, every tensor stored in its own type."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from faqd.at_once import images_at_once
from faqd.deploy.export.float16 import float16_from_float32
from faqd.deploy.export.stored_run import StoredRun
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
    """The outputs of a network with one input, as `StoredRun` has them."""
    run, (source,) = StoredRun(model), model.graph.input
    step = images_at_once(inputs.shape[2:], BATCH)
    parts = [run({source.name: inputs[start : start + step]}) for start in range(0, len(inputs), step)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
