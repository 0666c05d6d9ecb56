"""The files of a bundle: written, described in its manifest, and proved."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from faqd import bundle as names
from faqd.bundle import Bundle, float32_in_words, write_manifest
from faqd.deploy.bundle_facts import BundleOptions, Parts, licence_metadata, manifest_facts, student_metadata
from faqd.deploy.export.float16 import float16_from_float32
from faqd.deploy.export.float16_islands import Float32Part, float32_parts
from faqd.deploy.export.server_configs import one_factor, serving_files
from faqd.deploy.export.teacher_float16 import TEACHER_IMAGES, teacher_float16
from faqd.deploy.export.torch_to_onnx import onnx_from_deployed, onnx_from_network, save
from faqd.deploy.export.uint8_input import with_normalisation, with_preprocessing, without_preprocessing
from faqd.deploy.lower import Lowered, lower
from faqd.deploy.onnx_model.load import load_model
from faqd.deploy.verify.bundle_networks import flavours
from faqd.deploy.verify.test_vectors import probe_inputs
from faqd.deploy.verify.torch_values import as_trained, float_outputs_in_torch, stored_outputs
from faqd.deploy.verify.verify import CEIL_NOTE, agreement_images, verification
from faqd.errors import UserError
from faqd.files import refuse_unmakeable, sha256, write_json, written_beside
from faqd.preprocess import Preprocess
from faqd.proof import for_manifest
from faqd.quant import Target
from faqd.quantize import nodes
from faqd.quantize.capture.capture import capture
from faqd.quantize.capture.fuse_batch_norm import fused
from faqd.quantize.convert import convert

Say = Callable[[str], None]


def refuse_taken(out: Path) -> None:
    """Before any work: a bundle is written into a folder that is new or empty."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give another --out, the folder of the bundle.")
    if (out / names.MANIFEST).is_file():
        raise UserError(f"{out}: already holds a bundle; give another --out, or remove it first.")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: is not empty and is no bundle; give another --out.")
    refuse_unmakeable(out)


def put_bundle(parts: Parts, out: Path, options: BundleOptions, say: Say) -> Bundle:
    images = parts.evaluation.images
    inputs = torch.from_numpy(parts.preprocess.normalise(images))
    captured = parts.teacher_graph or capture(parts.teacher, nodes.two_of(inputs))
    parts = replace(parts, teacher_graph=captured)
    probes, driven = probe_inputs(images, parts.preprocess.normalise)
    with written_beside(out) as folder:
        folder.mkdir()
        files = _Files(folder, parts.preprocess if options.input_form == "uint8-nhwc" else None, say)
        lowered, float32 = _put_students(parts, files, torch.from_numpy(probes), driven, options, say)
        _put_float_networks(parts, files, inputs, options, say)
        wanted = stored_outputs(parts.teacher, inputs)
        replace(parts.evaluation, teacher=wanted).save(folder / names.EVAL)
        undriven = torch.from_numpy(probes[: len(probes) - driven])
        unrounded = float_outputs_in_torch(parts.student, undriven)
        of_teacher = stored_outputs(parts.teacher, undriven)
        names.save_probe_outputs(folder, {"student": unrounded, "teacher": of_teacher})
        files.made_from |= {names.PROBE_OUTPUTS: parts.made_from, names.EVAL: parts.teacher_sha256}
        trained = as_trained(parts.student, next(iter(lowered.values())).network, inputs[: agreement_images(wanted)])
        bundle = _proved(
            files,
            {**manifest_facts(parts, options, lowered, float32, wanted), "as_trained": trained},
            say,
            parts.preprocess if "tensorrt" in lowered and needs_own_file(parts.preprocess, options) else None,
        )
        for name, text in serving_files(bundle, options.servers).items():
            (folder / name).write_text(text, encoding="utf-8")
            say(f"wrote {name}, untried")
        if parts.student.config.rounding == "ceil":
            say(CEIL_NOTE)
    return Bundle(out, bundle.manifest)


class _Files:
    """The files of a bundle as they are written, and the SHA-256 of what each was made from."""

    def __init__(self, folder: Path, preprocess: Preprocess | None, say: Say) -> None:
        """preprocess: what every network does itself; None where it is done for it."""
        self.folder, self.made_from = folder, dict[str, str]()
        self._preprocess, self._say = preprocess, say

    def put_for_deepstream(self, preprocess: Preprocess) -> None:
        """Of the file that an engine is built from, as it stands there now."""
        model = load_model(self.folder / names.STUDENT_TENSORRT)
        model = model if self._preprocess is None else without_preprocessing(model)
        save(with_normalisation(model, preprocess), self.folder / names.STUDENT_DEEPSTREAM)
        self.made_from[names.STUDENT_DEEPSTREAM] = self.made_from[names.STUDENT_TENSORRT]

    def put(self, name: str, model: onnx.ModelProto, source: str) -> None:
        save(model if self._preprocess is None else with_preprocessing(model, self._preprocess), self.folder / name)
        self.made_from[name] = source
        self._say(f"wrote {name}")


def _put_students(
    parts: Parts, files: _Files, probes: Tensor, driven: int, options: BundleOptions, say: Say
) -> tuple[dict[Target, Lowered], list[Float32Part]]:
    """The files of the student, by what runs them, and what stays float32 in TensorRT's FP16 file."""
    found: dict[Target, Lowered] = {}
    float32: list[Float32Part] = []
    bits, metadata = parts.student.config, student_metadata(parts, options)
    for runtime in flavours(bits.target, bits.activations):
        lowered = found[runtime] = lower(
            parts.student, runtime, parts.output_scales, probes, driven=driven, metadata=metadata
        )
        for text in lowered.network.changes.sentences():
            say(f"{runtime}: {text}")
        if runtime == "onnxruntime":
            files.put(names.STUDENT_ONNXRUNTIME, lowered.onnx, parts.made_from)
            continue
        files.put(names.STUDENT_TENSORRT_FP32, lowered.onnx, parts.made_from)
        deployed = lowered.onnx
        if options.float_type == "fp16":
            float32 = float32_parts(lowered.onnx, parts.calibration.numpy())
            deployed = float16_from_float32(lowered.onnx, {name for part in float32 for name in part.nodes})
        files.put(names.STUDENT_TENSORRT, deployed, parts.made_from)
        for text in float32_in_words([part.reason for part in float32]):
            say(text)
    if "tensorrt" not in found:
        say("no TensorRT file: this student has 8-bit activations 0..255, for which TensorRT has no type.")
    return found, float32


def _put_float_networks(parts: Parts, files: _Files, inputs: Tensor, options: BundleOptions, say: Say) -> None:
    """The student unquantized, and the teacher, each in FP32 and FP16."""
    student = onnx_from_deployed(convert(parts.student, "float"), inputs[:2], student_metadata(parts, options))
    files.put(names.FLOAT_STUDENT, student, parts.made_from)
    files.put(names.FLOAT_STUDENT_FP16, float16_from_float32(student), parts.made_from)
    assert parts.teacher_graph is not None
    teacher = onnx_from_network(fused(parts.teacher_graph), inputs[:2], licence_metadata(options))
    files.put(names.TEACHER, teacher, parts.teacher_sha256)
    half, why_not = teacher_float16(teacher, inputs.numpy()[:TEACHER_IMAGES])
    if half is None:
        say(f"no {names.TEACHER_FP16}: {why_not}. The teacher's engine will be FP32.")
    else:
        files.put(names.TEACHER_FP16, half, parts.teacher_sha256)


def needs_own_file(preprocess: Preprocess, options: BundleOptions) -> bool:
    """Whether nvinfer cannot feed the student as the bundle has it: by one factor for all channels, in floats."""
    return "deepstream" in options.servers and (options.input_form == "uint8-nhwc" or one_factor(preprocess) is None)


def _proved(files: _Files, facts: dict[str, Any], say: Say, deepstream: Preprocess | None) -> Bundle:
    """The bundle, verified; in FP32 where FP16 does not hold the proof. Its manifest is written once more in the end,
    with what was found, and verify.json names that one. deepstream: for a file of its own, None for none."""
    if deepstream is not None:
        files.put_for_deepstream(deepstream)
        say(f"wrote {names.STUDENT_DEEPSTREAM}")
    say("verifying")
    record = verification(write_manifest(files.folder, facts, files.made_from))
    if beyond := record.get("float16", {}).get("failures"):
        say(f"{names.STUDENT_TENSORRT} stays FP32 outside of its integers: {beyond[0].partition(';')[0]}")
        shutil.copyfile(files.folder / names.STUDENT_TENSORRT_FP32, files.folder / names.STUDENT_TENSORRT)
        if deepstream is not None:
            files.put_for_deepstream(deepstream)
        facts = {**facts, "float_type": "fp32", "float32_parts": []}
        record = verification(write_manifest(files.folder, facts, files.made_from))
    bundle = write_manifest(files.folder, {**facts, **for_manifest(record)}, files.made_from)
    record["manifest_sha256"] = sha256(files.folder / names.MANIFEST)
    write_json(files.folder / names.VERIFY, record)
    return bundle
