"""From a finished run, or a float network, to a verified bundle. The one place where deployment meets training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from faqd import bundle as names
from faqd.bundle import Bundle, Evaluation
from faqd.deploy.bundle_facts import BundleOptions, Parts
from faqd.deploy.bundle_files import Say, put_bundle, refuse_taken
from faqd.deploy.export.float16_islands import IMAGES
from faqd.deploy.mixed_precision import kept_float
from faqd.deploy.verify.bundle_networks import flavours
from faqd.errors import UserError
from faqd.fidelity import KEPT
from faqd.files import read_json, sha256
from faqd.preprocess import Preprocess
from faqd.quantize.calibrate import BATCH
from faqd.quantize.capture.capture import capture
from faqd.quantize.config import QuantConfig
from faqd.quantize.convert import collect_output_scales
from faqd.quantize.sensitivity import Trial
from faqd.quantize.student import Student
from faqd.quantize.without_training import (
    JUDGED_IMAGES,
    Asymmetric,
    CalibrationMethod,
    Equalize,
    Untrained,
    best_without_training,
)
from faqd.train.data.datasets import Dataset, labelled_if_possible
from faqd.train.data.evaluation import names_and_sizes
from faqd.train.networks.own_tensors import own_tensors
from faqd.train.networks.source import NetworkSource
from faqd.train.networks.tensor_files import tensors_sha256
from faqd.train.run.folder import (
    WEIGHTS,
    MovedData,
    finished,
    images_of_run,
    load_teacher,
    network_input,
    run_preprocess,
)
from faqd.train.run.labels import refuse_other_labels, without_labels
from faqd.train.run.lesson import Lesson, Teacher, judged_images, lesson_from, output_shapes
from faqd.train.run.student import load_student

OUTPUT_SCALE_IMAGES = 512
SEARCHED_IMAGES = 32
"""For the scales of students that are tried on the way to what stays float."""


@dataclass(frozen=True)
class Calibration:
    """How a network is quantized where nothing is trained (`faqd.quantize.without_training`). images: of the training
    split, for scales and channels' largest values. keep_float: at most so many places are, as few as have the fidelity
    `enough`."""

    method: CalibrationMethod = "auto"
    images: int = 512
    equalize: Equalize = "auto"
    asymmetric: Asymmetric = "auto"
    keep_float: int = 0
    enough: float = KEPT


def export_run(
    run: Path,
    out: Path,
    options: BundleOptions,
    say: Say,
    data_root: Path | None = None,
    source: str | None = None,
    evaluation: tuple[str, bool] | None = None,
) -> Bundle:
    """Lower the student of a finished distillation run into the bundle `out`, and verify it.

    data_root, source: where its images are now (`MovedData`). evaluation: images in place of those that it evaluates
    on (`DataOptions.evaluation`, and its `labels`).
    """
    refuse_taken(out)
    record = finished(run)
    student = load_student(run)
    if options.float_type == "fp32" and "tensorrt" not in flavours(student.config.target, student.config.activations):
        raise UserError("--float-type: a student of --target onnxruntime has no TensorRT file; leave it out.")
    teacher, teacher_source, teacher_sha256 = load_teacher(run)
    if "output_scales" not in record:
        raise UserError(f"{run}: a student with 32-bit activations cannot be exported; use --act-bits 1 to 8.")
    data = images_of_run(record, MovedData(data_root, source))
    asked = data if evaluation is None else replace(data, evaluation=evaluation[0], labels=evaluation[1])
    trained = data.evaluation is None and evaluation is not None
    dataset = _labelled_for(teacher, teacher_source, labelled_if_possible(asked, say, trained=trained), say)
    parts = Parts(
        "distilled",
        student,
        NetworkSource.from_json(record["network"], run).name,
        sha256(run / WEIGHTS),
        record["output_scales"],
        teacher,
        teacher_source.name,
        teacher_sha256,
        run_preprocess(record),
        _evaluation(dataset, options),
        network_input(dataset.train.pixels[:IMAGES], run_preprocess(record)),
        dataset.classes,
    )
    return put_bundle(parts, out, options, say)


@dataclass(frozen=True)
class QuantizedFloat:
    """A float network, captured, and quantized without training. batches: the images that scales were chosen on.
    trials: of `mixed_precision`, where it was asked for."""

    network: fx.GraphModule
    untrained: Untrained
    teacher: Teacher
    dataset: Dataset
    batches: tuple[Tensor, ...]
    trials: tuple[Trial, ...] = ()

    def select_images(self, count: int) -> Tensor:
        """Network input of images that nothing was chosen on, `count` at most."""
        return network_input(self.dataset.select.pixels[:count], self.dataset.preprocess)


def quantized_float(
    teacher: str,
    teacher_weights: Path | None,
    data: dict[str, Any],
    bits: QuantConfig,
    calibration: Calibration,
    say: Say,
) -> QuantizedFloat:
    """data: fields of DataOptions, None where the command line is silent and the teacher's run knows."""
    lesson = lesson_from(teacher, teacher_weights, data, with_labels="eval", say=say)
    return quantized_lesson(lesson, bits, calibration, say)


def quantized_lesson(
    lesson: Lesson,
    bits: QuantConfig,
    calibration: Calibration,
    say: Say,
    judged: int = JUDGED_IMAGES,
    tried: Callable[[Untrained], None] = lambda one: None,
) -> QuantizedFloat:
    """The same for a teacher and images that are read already. judged: on so many images of the validation split what
    is tried is compared in the end. tried: told of each of these."""
    dataset, taught = lesson.dataset, lesson.teacher
    x = network_input(dataset.train.pixels[: max(2, calibration.images)], dataset.preprocess)
    captured = capture(taught.network, x[:2])
    batches = x[: calibration.images].split(BATCH)
    say(f"{bits.weights}/{bits.activations} bits, scales chosen on {len(x[: calibration.images]):,} training images.")
    images = judged_images(dataset, judged)

    def best_of(
        config: QuantConfig,
        equalize: Equalize,
        batches: Sequence[Tensor],
        images: Tensor,
        tried: Callable[[Untrained], None] = lambda one: None,
    ) -> Untrained:
        def told(one: Untrained) -> None:
            say(one.in_words())
            tried(one)

        return best_without_training(
            captured,
            config,
            batches,
            images,
            calibration.method,
            equalize,
            told,
            enough=calibration.enough,
            asymmetric=calibration.asymmetric,
        )

    trials: tuple[Trial, ...] = ()
    equalize = calibration.equalize
    if calibration.keep_float:
        few = x[: min(SEARCHED_IMAGES, calibration.images)].split(BATCH)
        seen = torch.cat([images, x[len(few[0]) :]])[:JUDGED_IMAGES]  # in a small split few show what is looked for
        most, enough = calibration.keep_float, calibration.enough
        search = partial(best_of, batches=few, images=seen)
        bits, trials = kept_float(search, bits, equalize, few, seen, most, enough, say)
        say(f"scales chosen again, on all {len(x[: calibration.images]):,} images.")
    best = best_of(bits, equalize, batches, images, tried)
    return QuantizedFloat(captured, best, taught, dataset, batches, trials)


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
    refuse_taken(out)
    return put_quantized(quantized_float(teacher, teacher_weights, data, bits, calibration, say), out, options, say)


def put_quantized(made: QuantizedFloat, out: Path, options: BundleOptions, say: Say) -> Bundle:
    """Lower what was quantized without training into the bundle `out`, and verify it."""
    student, taught, dataset = made.untrained.student, made.teacher, made.dataset
    parts = Parts(
        "ptq",
        student,
        taught.source.name,
        taught.sha256,
        collect_output_scales(student, made.batches),
        taught.network,
        taught.source.name,
        taught.sha256,
        dataset.preprocess,
        _evaluation(dataset, options),
        made.batches[0],
        dataset.classes,
        made.network,
        made.untrained,
        made.trials,
    )
    return put_bundle(parts, out, options, say)


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
    refuse_taken(out)
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
            x[:IMAGES],
            tuple(classes) if classes else None,
            held if isinstance(held, torch.fx.GraphModule) and teacher is None else None,
        )
        bundle = put_bundle(parts, out, asked, say)
    finally:
        student.to(place).train(mode)
    if failures := read_json(out / names.VERIFY)["failures"]:
        raise UserError(f"{out}: not proved: {failures[0]} (see {names.VERIFY}).", exit_code=1)
    return bundle


def _labelled_for(teacher: nn.Module, source: NetworkSource, dataset: Dataset, say: Say) -> Dataset:
    """Without labels that are not of the teacher's classes: nobody has looked at them in training."""
    try:
        refuse_other_labels(dataset, output_shapes(teacher, source, dataset.source), source.name)
    except UserError as error:
        say(f"The bundle is written without labels: {error}")
        return without_labels(dataset)
    return dataset


def _evaluation(dataset: Dataset, options: BundleOptions) -> Evaluation:
    split = dataset.eval.at(slice(options.eval_samples))
    images = split.images
    return Evaluation(images, split.labels, {}, *names_and_sizes(split, dataset.eval_files))
