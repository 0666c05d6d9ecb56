"""A student as one runtime gets it: its integers, their ONNX file, and what torch says that this holds and computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from torch import Tensor

from faqd.deploy.explain.tensorrt_rules import int8_layers
from faqd.deploy.export.torch_to_onnx import written_from_deployed
from faqd.deploy.verify.torch_values import torch_digests
from faqd.quant import Target
from faqd.quantize.convert import Deployed, convert
from faqd.quantize.student import Student


@dataclass(frozen=True)
class Lowered:
    """network: the integers, in torch. onnx: their file, FP32 outside of the integers. digests: what the file has to
    hold and to compute on the test vectors (`torch_digests`). runs_int8: by layer, whether TensorRT's rules let it run
    in INT8; empty for onnxruntime."""

    network: Deployed
    onnx: onnx.ModelProto
    digests: dict[str, Any]
    runs_int8: dict[str, bool]


def lower(
    student: Student,
    runtime: Target,
    output_scales: dict[str, float],
    test_vectors: Tensor,
    *,
    driven: int = 0,
    metadata: Mapping[str, str] | None = None,
) -> Lowered:
    """Lower a calibrated student for `runtime`.

    output_scales: of its outputs, by module path (`collect_output_scales`). test_vectors: (N >= 2, C, H, W) float32 on
    the CPU, network input, of which the last `driven` have every quantized value replaced by a random one. metadata:
    for the file. UserError where an operator cannot be lowered.
    """
    network = convert(student, runtime, output_scales)
    written = written_from_deployed(network, test_vectors[:2], dict(metadata or {}))
    runs_int8 = int8_layers(written.model) if runtime == "tensorrt" else {}
    digests = torch_digests(network, test_vectors, driven, written.tensors)
    return Lowered(network, written.model, digests, runs_int8)
