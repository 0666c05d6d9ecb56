"""From a finished run, or a float network, to a verified bundle. The one place where lowering meets torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from faqd import bundle as names
from faqd.bundle import Bundle, Evaluation, write_manifest
from faqd.calib.ranges import Method
from faqd.deploy.explain.tensorrt_rules import int8_layers
from faqd.deploy.export.float16 import float16_from_float32
from faqd.deploy.export.server_configs import Server, check_servers, serving_files
from faqd.deploy.export.teacher_float16 import TEACHER_IMAGES, teacher_float16
from faqd.deploy.export.torch_to_onnx import onnx_from_deployed, onnx_from_network, save
from faqd.deploy.export.uint8_input import with_preprocessing
from faqd.deploy.verify.bundle_networks import flavours
from faqd.deploy.verify.test_vectors import probe_inputs
from faqd.deploy.verify.torch_values import as_trained, float_outputs_in_torch, stored_outputs, torch_digests
from faqd.deploy.verify.verify import CEIL_NOTE, agreement_images, verify_bundle
from faqd.errors import UserError
from faqd.files import sha256, written_beside
from faqd.preprocess import Preprocess
from faqd.quantize.capture.capture import capture
from faqd.quantize.capture.fuse_batch_norm import fused
from faqd.quantize.convert import Deployed, collect_output_scales, convert
from faqd.quantize.operators.deployed import IntegerLayer
from faqd.quantize.outputs import INPUT, returned_at
from faqd.quantize.placement import Bits
from faqd.quantize.prepare import Student, calibrate, prepare, student_table
from faqd.train.data.datasets import load_dataset
from faqd.train.networks.source import NetworkSource
from faqd.train.run.folder import WEIGHTS, data_options, finished, load_teacher, network_input, run_preprocess
from faqd.train.run.lesson import lesson_from
from faqd.train.run.student import load_student

FloatType = Literal["fp16", "fp32"]
InputForm = Literal["float32-nchw", "uint8-nhwc"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class _Parts:
    """All that a bundle is made from."""

    kind: Literal["distilled", "ptq"]
    student: Student
    source: NetworkSource
    made_from: str
    output_scales: dict[str, float]
    teacher: torch.nn.Module
    teacher_source: NetworkSource
    teacher_sha256: str
    preprocess: Preprocess
    evaluation: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...] | None
    licence: str | None


def export_run(
    run: Path,
    out: Path,
    data_root: Path | None,
    eval_samples: int | None,
    float_type: FloatType,
    say: Say,
    input_form: InputForm = "float32-nchw",
    servers: Sequence[Server] = (),
    licence: str | None = None,
) -> Bundle:
    """Lower the student of a finished distillation run into the bundle `out`, and verify it.

    licence: of the network, for the metadata of its files.
    """
    _refuse_taken(out)
    check_servers(servers, input_form)
    record = finished(run)
    student = load_student(run)
    teacher, teacher_source, teacher_sha256 = load_teacher(run)
    if "output_scales" not in record:
        raise UserError(f"{run}: a student with 32-bit activations cannot be exported; use --act-bits 1 to 8.")
    dataset = load_dataset(data_options(record, data_root), with_labels=True, say=say)
    parts = _Parts(
        "distilled",
        student,
        NetworkSource.from_json(record["network"]),
        sha256(run / WEIGHTS),
        record["output_scales"],
        teacher,
        teacher_source,
        teacher_sha256,
        run_preprocess(record),
        dataset.eval.images[:eval_samples],
        None if dataset.eval.labels is None else dataset.eval.labels[:eval_samples],
        dataset.classes,
        licence,
    )
    return _write_bundle(parts, out, float_type, say, input_form, servers)


def quantize_after_training(
    teacher: str,
    teacher_weights: Path | None,
    data: dict[str, Any],
    bits: Bits,
    method: Method,
    calibration_images: int,
    out: Path,
    eval_samples: int | None,
    float_type: FloatType,
    say: Say,
    input_form: InputForm = "float32-nchw",
    servers: Sequence[Server] = (),
    licence: str | None = None,
) -> Bundle:
    """Post-training quantization: the float network itself, scales from unlabelled images, the same lowering.

    data: fields of DataOptions, None where the command line is silent and the teacher's run knows.
    """
    _refuse_taken(out)
    check_servers(servers, input_form)
    lesson = lesson_from(teacher, teacher_weights, data, with_labels=True, say=say)
    network, source, weights_sha256 = lesson.teacher.network, lesson.teacher.source, lesson.teacher.sha256
    dataset = lesson.dataset
    example = network_input(dataset.train.images[:2], dataset.preprocess)
    student = prepare(capture(network, example), bits, example)
    student.network.eval()
    batches = list(network_input(dataset.train.images[:calibration_images], dataset.preprocess).split(128))
    calibrate(student, batches, method)
    parts = _Parts(
        "ptq",
        student,
        source,
        weights_sha256,
        collect_output_scales(student, batches),
        network,
        source,
        weights_sha256,
        dataset.preprocess,
        dataset.eval.images[:eval_samples],
        None if dataset.eval.labels is None else dataset.eval.labels[:eval_samples],
        dataset.classes,
        licence,
    )
    return _write_bundle(parts, out, float_type, say, input_form, servers)


def _refuse_taken(out: Path) -> None:
    """Before any work: a bundle is written into a folder that is new or empty."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give another --out, the folder of the bundle.")
    if (out / names.MANIFEST).is_file():
        raise UserError(f"{out}: already holds a bundle; give another --out, or remove it first.")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: is not empty and is no bundle; give another --out.")


def _write_bundle(
    parts: _Parts, out: Path, float_type: FloatType, say: Say, input_form: InputForm, servers: Sequence[Server]
) -> Bundle:
    inputs = network_input(parts.evaluation, parts.preprocess)
    example = inputs[:2] if len(inputs) > 1 else inputs.repeat(2, 1, 1, 1)
    metadata = _metadata(parts)
    with written_beside(out) as folder:
        folder.mkdir()
        made_from: dict[str, str] = {}

        def put(name: str, proto: Any, source: str) -> None:
            save(with_preprocessing(proto, parts.preprocess) if input_form == "uint8-nhwc" else proto, folder / name)
            made_from[name] = source
            say(f"wrote {name}")

        probes, driven = probe_inputs(parts.evaluation, parts.preprocess.normalise)
        digests: dict[str, dict[str, Any]] = {}
        students: dict[str, Deployed] = {}
        int8: dict[str, bool] = {}
        bits = parts.student.bits
        for flavour in flavours(bits.target, bits.activations):
            deployed = convert(parts.student, flavour, parts.output_scales)
            students[flavour] = deployed
            for text in deployed.changes.sentences():
                say(f"{flavour}: {text}")
            digests[flavour] = torch_digests(deployed, torch.from_numpy(probes), driven)
            proto = onnx_from_deployed(deployed, example, metadata)
            if flavour == "onnxruntime":
                put(names.STUDENT_ONNXRUNTIME, proto, parts.made_from)
                continue
            int8 = int8_layers(proto)
            put(names.STUDENT_TENSORRT_FP32, proto, parts.made_from)
            put(names.STUDENT_TENSORRT, float16_from_float32(proto) if float_type == "fp16" else proto, parts.made_from)
        if "tensorrt" not in students:
            say("no TensorRT file: this student has 8-bit activations 0..255, which TensorRT has no grid for.")
        float_student = onnx_from_deployed(convert(parts.student, "float"), example, metadata)
        put(names.FLOAT_STUDENT, float_student, parts.made_from)
        put(names.FLOAT_STUDENT_FP16, float16_from_float32(float_student), parts.made_from)
        teacher_graph = fused(capture(parts.teacher, example))
        teacher = onnx_from_network(teacher_graph, example, _licence(parts))
        put(names.TEACHER, teacher, parts.teacher_sha256)
        half, why_not = teacher_float16(teacher, inputs.numpy()[:TEACHER_IMAGES])
        if half is None:
            say(f"no {names.TEACHER_FP16}: {why_not}. The teacher's engine will be FP32.")
        else:
            put(names.TEACHER_FP16, half, parts.teacher_sha256)
        wanted = stored_outputs(parts.teacher, inputs)
        Evaluation(parts.evaluation, parts.labels, wanted).save(folder / names.EVAL)
        undriven = torch.from_numpy(probes[: len(probes) - driven])
        unrounded = float_outputs_in_torch(parts.student, undriven)
        names.save_probe_outputs(folder, {"student": unrounded, "teacher": stored_outputs(parts.teacher, undriven)})
        made_from[names.PROBE_OUTPUTS] = parts.made_from
        made_from[names.EVAL] = parts.teacher_sha256
        first = next(iter(students.values()))
        facts = {
            **_facts(parts, first, wanted, int8),
            "torch_digests": digests,
            "as_trained": as_trained(parts.student, first, inputs[: agreement_images(wanted)]),
            "zeroed_channels": {
                f: deployed.changes.zeroed for f, deployed in students.items() if deployed.changes.zeroed
            },
            "coarser_channels": {
                f: deployed.changes.coarser for f, deployed in students.items() if deployed.changes.coarser
            },
            "float_layers": {f: deployed.changes.floats for f, deployed in students.items() if deployed.changes.floats},
            "unrounded_layers": {
                f: deployed.changes.unrounded for f, deployed in students.items() if deployed.changes.unrounded
            },
            "float_type": float_type,
            "input": _input(parts, input_form),
        }
        bundle = write_manifest(folder, facts, made_from)
        say("verifying")
        if beyond := verify_bundle(bundle).get("float16", {}).get("failures"):
            say(f"{names.STUDENT_TENSORRT} stays FP32 outside of its integers: {beyond[0].partition(';')[0]}")
            shutil.copyfile(folder / names.STUDENT_TENSORRT_FP32, folder / names.STUDENT_TENSORRT)
            bundle = write_manifest(folder, {**facts, "float_type": "fp32"}, made_from)
            verify_bundle(bundle)
        for name, text in serving_files(bundle, servers).items():
            (folder / name).write_text(text, encoding="utf-8")
            say(f"wrote {name}, untried")
        if bits.rounding == "ceil":
            say(CEIL_NOTE)
    return Bundle(out, bundle.manifest)


def _facts(
    parts: _Parts, deployed: Deployed, teacher: dict[str, NDArray[np.float32]], int8: dict[str, bool]
) -> dict[str, Any]:
    bits = parts.student.bits
    with torch.no_grad():
        places = returned_at(parts.teacher(parts.teacher_source.example()))
    return {
        "name": f"{parts.source.name} {bits.label}",
        "kind": parts.kind,
        "architecture": parts.source.name,
        "weight_bits": bits.weights,
        "act_bits": bits.activations,
        "rounding": bits.rounding,
        "target": bits.target,
        "preprocess": parts.preprocess.to_json(),
        "classes": list(parts.classes) if parts.classes else None,
        "outputs": [
            {"name": name, "shape": ["batch", *values.shape[1:]], "returned_at": places[name]}
            for name, values in teacher.items()
        ],
        "layers": [{**row, "runs_int8": int8.get(row["name"], False)} for row in student_table(parts.student)],
        "size": _size(parts.student, deployed),
        "teacher": {"name": parts.teacher_source.name, "sha256": parts.teacher_sha256},
    }


def _input(parts: _Parts, form: InputForm) -> dict[str, Any]:
    """What the networks of the bundle take: already normalised, or RGB (or grey) pixels that they normalise."""
    channels, pixels = parts.source.channels, list(parts.source.pixels)
    if form == "uint8-nhwc":
        order = "grey" if parts.preprocess.channels == "grey" else "rgb"
        return {"name": INPUT, "shape": ["batch", *pixels, channels], "dtype": "uint8", "channels": order}
    order = parts.preprocess.channels
    return {"name": INPUT, "shape": ["batch", channels, *pixels], "dtype": "float32", "channels": order}


def _size(student: Student, deployed: Deployed) -> dict[str, int]:
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


def _metadata(parts: _Parts) -> dict[str, str]:
    bits = parts.student.bits
    return {
        "faqd.student": f"{parts.source.name} {bits.label}",
        "faqd.kind": parts.kind,
        "faqd.bits": "; ".join(f"{r['name']}: {r['weights']} x {r['inputs']}" for r in student_table(parts.student)),
        "faqd.weights_sha256": parts.made_from,
        "faqd.preprocess": json.dumps(parts.preprocess.to_json()),
        "faqd.classes": ",".join(parts.classes or ()),
        **_licence(parts),
    }


def _licence(parts: _Parts) -> dict[str, str]:
    """Under the key that ONNX has for it; nothing where nobody said."""
    return {} if parts.licence is None else {"model_license": parts.licence}
