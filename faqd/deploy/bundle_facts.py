"""What a bundle is made from, and what its manifest and its ONNX files say of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from faqd.bundle import Evaluation
from faqd.deploy.export.float16_islands import Float32Part
from faqd.deploy.export.server_configs import Server
from faqd.deploy.lower import Lowered
from faqd.preprocess import Preprocess
from faqd.quant import Target
from faqd.quantize.branches import branches_of
from faqd.quantize.convert import Deployed
from faqd.quantize.int8_share import floats_of
from faqd.quantize.operators.layer import IntegerLayer
from faqd.quantize.outputs import called_input, returned_at
from faqd.quantize.sensitivity import Trial
from faqd.quantize.student import Student, student_table
from faqd.quantize.without_training import Untrained

FloatType = Literal["fp16", "fp32"]
InputForm = Literal["float32-nchw", "uint8-nhwc"]


@dataclass(frozen=True)
class BundleOptions:
    """What is asked of a bundle. eval_samples: how many images it keeps, None for all of the eval split. float_type: of
    TensorRT's file outside of the integers. licence: of the network, for the metadata of its files."""

    eval_samples: int | None = None
    float_type: FloatType = "fp16"
    input_form: InputForm = "float32-nchw"
    servers: tuple[Server, ...] = ()
    licence: str | None = None


@dataclass(frozen=True)
class Parts:
    """All that a bundle is made from.

    name, made_from: of the student's network, and the SHA-256 of its weights. evaluation: still without what the
    teacher makes of it. calibration: network input on which is seen what FP16 does. teacher_graph: the teacher as it
    was captured, where that was done already. untrained: how the student of a bundle of kind `ptq` was made; trials:
    what was tried for it to have few places float.
    """

    kind: Literal["distilled", "ptq"]
    student: Student
    name: str
    made_from: str
    output_scales: dict[str, float]
    teacher: torch.nn.Module
    teacher_name: str
    teacher_sha256: str
    preprocess: Preprocess
    evaluation: Evaluation
    calibration: torch.Tensor
    classes: tuple[str, ...] | None
    teacher_graph: torch.fx.GraphModule | None = None
    untrained: Untrained | None = None
    trials: tuple[Trial, ...] = ()


def manifest_facts(
    parts: Parts,
    options: BundleOptions,
    lowered: Mapping[Target, Lowered],
    float32: list[Float32Part],
    teacher: dict[str, NDArray[np.float32]],
) -> dict[str, Any]:
    """The manifest but for its files. float32: of the FP16 file. teacher: its outputs for the evaluation images."""
    bits = parts.student.config
    first = next(iter(lowered.values()))
    changes = {runtime: each.network.changes for runtime, each in lowered.items()}
    return {
        "name": f"{parts.name} {bits.label}",
        "kind": parts.kind,
        "architecture": parts.name,
        "weight_bits": bits.weights,
        "act_bits": bits.activations,
        "rounding": bits.rounding,
        "attention": bits.attention,
        **_without_training(parts),
        "target": bits.target,
        "preprocess": parts.preprocess.to_json(),
        "classes": list(parts.classes) if parts.classes else None,
        "outputs": _outputs(parts, teacher),
        "layers": [
            {**row, "runs_int8": first.runs_int8.get(row["name"], False)} for row in student_table(parts.student)
        ],
        **floats_of(parts.student),
        "size": deployed_size(parts.student, first.network),
        "teacher": {"name": parts.teacher_name, "sha256": parts.teacher_sha256},
        "torch_digests": {runtime: each.digests for runtime, each in lowered.items()},
        "zeroed_channels": {runtime: each.zeroed for runtime, each in changes.items() if each.zeroed},
        "coarser_channels": {runtime: each.coarser for runtime, each in changes.items() if each.coarser},
        "float_layers": {runtime: each.floats for runtime, each in changes.items() if each.floats},
        "unrounded_layers": {runtime: each.unrounded for runtime, each in changes.items() if each.unrounded},
        "float_type": options.float_type,
        "float32_parts": [{"nodes": list(part.nodes), "reason": part.reason} for part in float32],
        "input": {"name": called_input(parts.student.network), **_input(parts.preprocess, options.input_form)},
    }


def _without_training(parts: Parts) -> dict[str, Any]:
    if parts.untrained is None:
        return {}
    made = parts.untrained.equalized
    counts = {"tensors": len(made.tensors) if made else 0, "products": len(made.products) if made else 0}
    untrained = parts.untrained
    found: dict[str, Any] = {
        "calibration": untrained.method,
        "equalized": counts,
        "asymmetric": untrained.asymmetric,
    }
    if parts.trials:
        exclude = list(parts.student.config.exclude)
        found["kept_float"] = {"exclude": exclude, "trials": list(map(vars, parts.trials))}
    return found


def _outputs(parts: Parts, teacher: dict[str, NDArray[np.float32]]) -> list[dict[str, Any]]:
    shape = (2, len(parts.preprocess.mean), parts.preprocess.height, parts.preprocess.width)
    with torch.no_grad():
        places = returned_at(parts.teacher(torch.zeros(shape)))
    assert parts.teacher_graph is not None
    branches = branches_of(parts.teacher_graph)
    return [
        {
            "name": name,
            "shape": ["batch", *values.shape[1:]],
            "returned_at": places[name],
            "branches": [branch.to_json() for branch in branches[name]],
        }
        for name, values in teacher.items()
    ]


def _input(preprocess: Preprocess, form: InputForm) -> dict[str, Any]:
    """What the networks of the bundle take: already normalised, or RGB (or grey) pixels that they normalise."""
    channels, pixels = len(preprocess.mean), [preprocess.height, preprocess.width]
    if form == "uint8-nhwc":
        order = "grey" if preprocess.channels == "grey" else "rgb"
        return {"shape": ["batch", *pixels, channels], "dtype": "uint8", "channels": order}
    return {
        "shape": ["batch", channels, *pixels],
        "dtype": "float32",
        "channels": preprocess.channels,
    }


def deployed_size(student: Student, deployed: Deployed) -> dict[str, int]:
    """Bytes of weights, biases and weight scales: float32, as stored int8, and codes packed at their own width."""
    layers = {n: m for n, m in deployed.network.named_modules() if isinstance(m, IntegerLayer)}
    widths = {row["name"]: row["weight_bits"] for row in student_table(student)}
    weights = sum(layer.codes.numel() for layer in layers.values())
    channels = sum(layer.bias.numel() for layer in layers.values())
    packed = sum(-(-layer.codes.numel() * widths[name] // 8) for name, layer in layers.items())
    return {
        "parameters": weights + channels,
        "float32_bytes": 4 * (weights + channels),
        "int8_bytes": weights + 8 * channels,
        "packed_bytes": packed + 8 * channels,
    }


def student_metadata(parts: Parts, options: BundleOptions) -> dict[str, str]:
    """What the ONNX files of the student say of it."""
    bits = parts.student.config
    return {
        "faqd.student": f"{parts.name} {bits.label}",
        "faqd.kind": parts.kind,
        "faqd.bits": "; ".join(f"{r['name']}: {r['weights']} x {r['inputs']}" for r in student_table(parts.student)),
        "faqd.weights_sha256": parts.made_from,
        "faqd.preprocess": json.dumps(parts.preprocess.to_json()),
        "faqd.classes": ",".join(parts.classes or ()),
        **licence_metadata(options),
    }


def licence_metadata(options: BundleOptions) -> dict[str, str]:
    """The licence under the key that ONNX has for it; nothing where nobody said."""
    return {} if options.licence is None else {"model_license": options.licence}
