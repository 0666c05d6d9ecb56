"""What a student learns from: the teacher and the images that the command line names, and whether they fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from faqd.errors import UserError, first_line
from faqd.files import sha256
from faqd.preprocess import Preprocess
from faqd.quantize.outputs import named_outputs
from faqd.train.data.datasets import Dataset, Say, load_dataset
from faqd.train.data.options import DataOptions
from faqd.train.data.sanity_checks import warn_of_images, warn_of_teacher
from faqd.train.networks.load_weights import load_weights
from faqd.train.networks.source import NetworkSource, is_program, is_users, user_source
from faqd.train.run.folder import data_options, finished, load_teacher, network_input, run_preprocess
from faqd.train.run.labels import refuse_other_labels
from faqd.train.run.understood import data_in_words, network_in_words

NEUTRAL = {"mean": 0.0, "std": 1.0}
"""What `none` stands for."""


@dataclass(frozen=True)
class Teacher:
    """A float network in evaluation mode, where it came from, and the SHA-256 of its weights."""

    network: nn.Module
    source: NetworkSource
    sha256: str


@dataclass(frozen=True)
class Lesson:
    """A teacher and the images it teaches on, seen as it was trained to see them. data: the options of the images."""

    teacher: Teacher
    data: DataOptions
    dataset: Dataset


def lesson_from(
    spec: str,
    weights: Path | None,
    data: dict[str, Any],
    *,
    with_labels: bool | Literal["eval"] = False,
    say: Say = lambda _: None,
) -> Lesson:
    """The lesson of a command: `spec` is a finished run, code of the user's with `weights`, FILE.pt2 or
    FILE.onnx.

    data: fields of DataOptions, None where the command line is silent; a run then says with what images and what
    preprocessing it was trained. UserError says what is missing, or where the two contradict each other.
    """
    is_run = _is_run(spec, weights)
    options = _as_taught(spec, data) if is_run else _as_given(data)
    dataset = load_dataset(options, with_labels=with_labels, say=say)
    teacher = Teacher(*load_teacher(Path(spec))) if is_run else _users_teacher(spec, weights, dataset, say)
    unread = options.labels and not with_labels
    for sentence in (
        *data_in_words(dataset, unread_labels=unread),
        network_in_words(teacher.network, teacher.source.name),
    ):
        say(sentence)
    _refuse_misfit(teacher, dataset)
    warn_of_images(dataset, say)
    warn_of_teacher(teacher.network, teacher.source.name, dataset, say)
    return Lesson(teacher, options, dataset)


def judged_images(dataset: Dataset, count: int) -> Tensor:
    """Network input of the validation split, `count` at most, on which students are compared; of the training split
    where that has but one."""
    split = dataset.select if len(dataset.select) > 1 else dataset.train
    return network_input(split.pixels[:count], dataset.preprocess)


def _is_run(spec: str, weights: Path | None) -> bool:
    if weights is not None:
        refuse_weights_of_a_run(spec)
    if Path(spec).is_dir():
        return True
    if not is_users(spec):
        raise UserError(
            f"--teacher {spec}: no such run folder, and neither FILE.py:callable, module:callable, FILE.pt2 nor "
            "FILE.onnx."
        )
    if weights is None and not is_program(spec):
        raise UserError(f"--teacher {spec}: needs --teacher-weights FILE, the trained weights of that network.")
    user_source(spec, 1, (1, 1))  # refuses a wrong name before images are read
    return False


def refuse_weights_of_a_run(spec: str) -> None:
    if Path(spec).is_dir():
        raise UserError(f"--teacher-weights: the run {spec} has its own weights; leave the option out.")


def _as_given(data: dict[str, Any]) -> DataOptions:
    if data["source"] is None:
        raise UserError("--data: say which images to learn from, for example --data folder:images.")
    return DataOptions(**data)


def _as_taught(spec: str, data: dict[str, Any]) -> DataOptions:
    record = finished(Path(spec))
    recorded = data_options(record)
    given = {name: value for name, value in data.items() if value not in (None, False)}
    other = given.get("source", recorded.source) != recorded.source
    base = DataOptions(given["source"], resize=recorded.resize) if other else recorded
    return replace(base, **{**given, **_preprocessing(spec, run_preprocess(record), given)})


def _preprocessing(spec: str, taught: Preprocess, given: dict[str, Any]) -> dict[str, Any]:
    """What the teacher was trained with, for the fields of DataOptions. Another normalisation is never right."""
    wanted: dict[str, Any] = {
        "image_size": (taught.height, taught.width),
        "channels": taught.channels,
        "mean": taught.mean,
        "std": taught.std,
    }
    for name, value in wanted.items():
        found = given.get(name, value)
        if found == "none":
            found = (NEUTRAL[name],) * len(value)
        if found != value:
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{option} {_listed(found)}: the teacher {spec} was trained with {_listed(value)}; leave the option "
                "out, a student sees what its teacher saw."
            )
    return wanted


def _listed(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return ("x" if isinstance(value[0], int) else ",").join(map(str, value))


def _users_teacher(spec: str, weights: Path | None, dataset: Dataset, say: Say) -> Teacher:
    _, height, width, channels = dataset.train.pixels.shape
    source = user_source(spec, channels, (height, width))
    network = source.build()
    if weights is not None:
        load_weights(network, weights, say)
    network.eval()  # for some networks of users' own it returns nothing
    return Teacher(network, source, str(source.sha256) if weights is None else sha256(weights))


def _refuse_misfit(teacher: Teacher, dataset: Dataset) -> None:
    shapes = output_shapes(teacher.network, teacher.source, f"{dataset.source}; see --image-size and --channels")
    refuse_other_labels(dataset, shapes, teacher.source.name)


@torch.no_grad()
def output_shapes(network: nn.Module, source: NetworkSource, images: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the outputs by name, for two images; `network` in evaluation mode, as `source` describes it.

    UserError where it fails on such images, or returns what nothing could learn from. images: where they come from
    and what to do, for the first of these.
    """
    shape = f"{source.channels}x{source.pixels[0]}x{source.pixels[1]}"
    try:
        outputs = named_outputs(network(source.example()))
    except (Exception, SystemExit) as error:  # whatever the user's forward raises
        where = _other_floats(network) or f"on images of {shape} ({images})"
        raise UserError(f"{source.name}: fails {where}: {first_line(error)}.") from error
    try:
        network(source.example(3))
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{source.name}: takes two images and not three: {first_line(error)}. The number of images must be free; "
            "torch.export has dynamic_shapes for that."
        ) from error
    if not outputs:
        raise UserError(f"{source.name}: returns no output; give a callable whose network returns what to imitate.")
    for name, output in outputs.items():
        if not isinstance(output, Tensor) or not output.is_floating_point():
            kind = str(output.dtype) if isinstance(output, Tensor) else type(output).__name__
            raise UserError(
                f"{source.name}: its output {name} is {kind}, expected a tensor of floats; give a callable whose "
                "network returns only the outputs to imitate."
            )
        if output.dim() < 2 or len(output) != len(source.example()):
            raise UserError(
                f"{source.name}: its output {name} has shape {tuple(output.shape)} for 2 images, expected (images, "
                "classes, ...)."
            )
    return {name: tuple(output.shape) for name, output in outputs.items()}


def _other_floats(network: nn.Module) -> str:
    """Why a network fails on float32 images where its own numbers are of another kind; nothing where none is."""
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        if value.is_floating_point() and value.dtype != torch.float32:
            kind = str(value.dtype).removeprefix("torch.")
            return f"on float32 images, and its {name} is {kind}; let the callable return network.float()"
    return ""
