"""From a finished run, or a float network, to a verified bundle. The one place where deployment meets training."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from faqd import bundle as names
from faqd.bundle import Bundle, Evaluation, write_manifest
from faqd.calib.ranges import Method
from faqd.deploy.bundle_facts import BundleOptions, Parts, licence_metadata, manifest_facts, student_metadata
from faqd.deploy.export.float16 import float16_from_float32
from faqd.deploy.export.server_configs import check_servers, serving_files
from faqd.deploy.export.teacher_float16 import TEACHER_IMAGES, teacher_float16
from faqd.deploy.export.torch_to_onnx import onnx_from_deployed, onnx_from_network, save
from faqd.deploy.export.uint8_input import with_preprocessing
from faqd.deploy.lower import Lowered, lower
from faqd.deploy.verify.bundle_networks import flavours
from faqd.deploy.verify.test_vectors import probe_inputs
from faqd.deploy.verify.torch_values import as_trained, float_outputs_in_torch, stored_outputs
from faqd.deploy.verify.verify import CEIL_NOTE, agreement_images, verify_bundle
from faqd.errors import UserError
from faqd.files import read_json, sha256, written_beside
from faqd.preprocess import Preprocess
from faqd.quant import Target
from faqd.quantize.calibrate import BATCH, calibrate
from faqd.quantize.capture.capture import capture
from faqd.quantize.capture.fuse_batch_norm import fused
from faqd.quantize.config import QuantConfig
from faqd.quantize.convert import collect_output_scales, convert
from faqd.quantize.prepare import insert_quantizers
from faqd.quantize.student import Student
from faqd.train.data.datasets import Dataset, labelled_if_possible
from faqd.train.networks.own_tensors import own_tensors
from faqd.train.networks.source import NetworkSource
from faqd.train.networks.tensor_files import tensors_sha256
from faqd.train.run.folder import WEIGHTS, data_options, finished, load_teacher, network_input, run_preprocess
from faqd.train.run.lesson import lesson_from
from faqd.train.run.student import load_student

Say = Callable[[str], None]
OUTPUT_SCALE_IMAGES = 512


@dataclass(frozen=True)
class Calibration:
    """How scales are chosen where nothing is trained. images: how many of the training split."""

    method: Method = "mse"
    images: int = 512


def export_run(run: Path, out: Path, options: BundleOptions, say: Say, data_root: Path | None = None) -> Bundle:
    """Lower the student of a finished distillation run into the bundle `out`, and verify it."""
    _refuse_taken(out)
    check_servers(options.servers, options.input_form)
    record = finished(run)
    student = load_student(run)
    teacher, teacher_source, teacher_sha256 = load_teacher(run)
    if "output_scales" not in record:
        raise UserError(f"{run}: a student with 32-bit activations cannot be exported; use --act-bits 1 to 8.")
    dataset = labelled_if_possible(data_options(record, data_root), say)
    parts = Parts(
        "distilled",
        student,
        NetworkSource.from_json(record["network"]).name,
        sha256(run / WEIGHTS),
        record["output_scales"],
        teacher,
        teacher_source.name,
        teacher_sha256,
        run_preprocess(record),
        _evaluation(dataset, options),
        dataset.classes,
    )
    return _write_bundle(parts, out, options, say)


def quantize_after_training(
    teacher: str,
    teacher_weights: Path | None,
    data: dict[str, Any],
    bits: QuantConfig,
    calibration: Calibration,
    out: Path,
    options: BundleOptions,
    say: Say,
) -> Bundle:
    """Post-training quantization: the float network itself, scales from unlabelled images, the same lowering.

    data: fields of DataOptions, None where the command line is silent and the teacher's run knows.
    """
    _refuse_taken(out)
    check_servers(options.servers, options.input_form)
    lesson = lesson_from(teacher, teacher_weights, data, with_labels=True, say=say)
    dataset, taught = lesson.dataset, lesson.teacher
    x = network_input(dataset.train.images[: max(2, calibration.images)], dataset.preprocess)
    student = insert_quantizers(capture(taught.network, x[:2]), bits, x[:2])
    student.network.eval()
    batches = x[: calibration.images].split(128)
    calibrate(student, batches, calibration.method)
    parts = Parts(
        "ptq",
        student,
        taught.source.name,
        taught.sha256,
        collect_output_scales(student, batches),
        taught.network,
        taught.source.name,
        taught.sha256,
        dataset.preprocess,
        _evaluation(dataset, options),
        dataset.classes,
        student.float_network,
    )
    return _write_bundle(parts, out, options, say)


def export(
    student: Student,
    folder: Path | str,
    images: Tensor | Iterable[Tensor],
    *,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    teacher: nn.Module | None = None,
    name: str = "student",
    classes: Sequence[str] | None = None,
    options: BundleOptions | None = None,
    say: Say = lambda _: None,
) -> Bundle:
    """Lower a student into the bundle `folder`, prove it and write it; one whose proof fails is an error.

    images: network input (N, C, H, W) of 1 or 3 channels, or batches of it, normalised by mean and std in units of a
    pixel range 0..1; the bundle holds the pixels. teacher: what the student is held against, by default the float
    network that it was prepared from. UserError where pixels are not what mean and std make of the images, where an
    operator cannot be lowered, and (exit code 1) where the bundle is not proved; it is left for inspection then.

        bundle = faqd.export(student, "bundle", images, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    """
    out, asked = Path(folder), options or BundleOptions()
    _refuse_taken(out)
    check_servers(asked.servers, asked.input_form)
    x = (images if isinstance(images, Tensor) else torch.cat(list(images))).detach().float().cpu()
    channels, (height, width) = x.shape[1], x.shape[2:]
    scale, offset = (tuple(map(float, given)) * (channels if len(given) == 1 else 1) for given in (std, mean))
    preprocess = Preprocess(height, width, offset, scale, channels="grey" if channels == 1 else "rgb")
    pixels = preprocess.pixels(x.numpy())
    mode, place = student.training, next(student.parameters()).device
    student.cpu().eval()
    for quantizer in student.quantizers().values():
        quantizer.keep_scale(quantizer.step)
    taught = teacher or student.float_network
    held = copy.deepcopy(taught).cpu()
    held.eval()
    try:
        parts = Parts(
            "distilled",
            student,
            name,
            tensors_sha256(own_tensors(student.network)),
            collect_output_scales(student, x[:OUTPUT_SCALE_IMAGES].split(BATCH)),
            held,
            f"{name} in float",
            tensors_sha256(own_tensors(taught)),
            preprocess,
            Evaluation(pixels[: asked.eval_samples], None, {}),
            tuple(classes) if classes else None,
            held if isinstance(held, torch.fx.GraphModule) and teacher is None else None,
        )
        bundle = _write_bundle(parts, out, asked, say)
    finally:
        student.to(place).train(mode)
    if failures := read_json(out / names.VERIFY)["failures"]:
        raise UserError(f"{out}: not proved: {failures[0]} (see {names.VERIFY}).", exit_code=1)
    return bundle


def _evaluation(dataset: Dataset, options: BundleOptions) -> Evaluation:
    images, labels = dataset.eval.images, dataset.eval.labels
    return Evaluation(images[: options.eval_samples], None if labels is None else labels[: options.eval_samples], {})


def _refuse_taken(out: Path) -> None:
    """Before any work: a bundle is written into a folder that is new or empty."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give another --out, the folder of the bundle.")
    if (out / names.MANIFEST).is_file():
        raise UserError(f"{out}: already holds a bundle; give another --out, or remove it first.")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: is not empty and is no bundle; give another --out.")


class _Files:
    """The files of a bundle as they are written, and the SHA-256 of what each was made from."""

    def __init__(self, folder: Path, preprocess: Preprocess | None, say: Say) -> None:
        """preprocess: what every network does itself; None where it is done for it."""
        self.folder, self.made_from = folder, dict[str, str]()
        self._preprocess, self._say = preprocess, say

    def put(self, name: str, model: onnx.ModelProto, source: str) -> None:
        save(model if self._preprocess is None else with_preprocessing(model, self._preprocess), self.folder / name)
        self.made_from[name] = source
        self._say(f"wrote {name}")


def _write_bundle(parts: Parts, out: Path, options: BundleOptions, say: Say) -> Bundle:
    images = parts.evaluation.images
    inputs = network_input(images, parts.preprocess)
    example = inputs[:2] if len(inputs) > 1 else inputs.repeat(2, 1, 1, 1)
    parts = replace(parts, teacher_graph=parts.teacher_graph or capture(parts.teacher, example))
    probes, driven = probe_inputs(images, parts.preprocess.normalise)
    with written_beside(out) as folder:
        folder.mkdir()
        files = _Files(folder, parts.preprocess if options.input_form == "uint8-nhwc" else None, say)
        lowered = _put_students(parts, files, torch.from_numpy(probes), driven, options, say)
        _put_float_networks(parts, files, inputs, options, say)
        wanted = stored_outputs(parts.teacher, inputs)
        replace(parts.evaluation, teacher=wanted).save(folder / names.EVAL)
        undriven = torch.from_numpy(probes[: len(probes) - driven])
        unrounded = float_outputs_in_torch(parts.student, undriven)
        of_teacher = stored_outputs(parts.teacher, undriven)
        names.save_probe_outputs(folder, {"student": unrounded, "teacher": of_teacher})
        files.made_from |= {names.PROBE_OUTPUTS: parts.made_from, names.EVAL: parts.teacher_sha256}
        trained = as_trained(parts.student, next(iter(lowered.values())).network, inputs[: agreement_images(wanted)])
        bundle = _proved(files, {**manifest_facts(parts, options, lowered, wanted), "as_trained": trained}, say)
        for name, text in serving_files(bundle, options.servers).items():
            (folder / name).write_text(text, encoding="utf-8")
            say(f"wrote {name}, untried")
        if parts.student.config.rounding == "ceil":
            say(CEIL_NOTE)
    return Bundle(out, bundle.manifest)


def _put_students(
    parts: Parts, files: _Files, probes: Tensor, driven: int, options: BundleOptions, say: Say
) -> dict[Target, Lowered]:
    """The files of the student, by what runs them."""
    found: dict[Target, Lowered] = {}
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
        deployed = float16_from_float32(lowered.onnx) if options.float_type == "fp16" else lowered.onnx
        files.put(names.STUDENT_TENSORRT, deployed, parts.made_from)
    if "tensorrt" not in found:
        say("no TensorRT file: this student has 8-bit activations 0..255, which TensorRT has no grid for.")
    return found


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


def _proved(files: _Files, facts: dict[str, Any], say: Say) -> Bundle:
    """The bundle with its manifest, verified; in FP32 where FP16 does not hold the proof."""
    bundle = write_manifest(files.folder, facts, files.made_from)
    say("verifying")
    if beyond := verify_bundle(bundle).get("float16", {}).get("failures"):
        say(f"{names.STUDENT_TENSORRT} stays FP32 outside of its integers: {beyond[0].partition(';')[0]}")
        shutil.copyfile(files.folder / names.STUDENT_TENSORRT_FP32, files.folder / names.STUDENT_TENSORRT)
        bundle = write_manifest(files.folder, {**facts, "float_type": "fp32"}, files.made_from)
        verify_bundle(bundle)
    return bundle
