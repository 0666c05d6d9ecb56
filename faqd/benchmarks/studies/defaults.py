"""Whether the defaults ever end worse than no training: distillation against PTQ on a list of float networks.

`python -m faqd.benchmarks.studies.defaults NETWORKS.json --out WORK --json FILE`. NETWORKS.json maps a name to
`teacher` (FILE.py:callable), `weights`, `data` (options of `faqd-train distill` without dashes, such as "image_size"),
and may have `judged_on`, a source of images that are all judged, with the other options of `data`, and `metric`
(FILE.py:function of (outputs, found), a number, the larger the better; as for `--select`, but `found` has the `files`
of images from a folder as well). Paths are relative to NETWORKS.json. Judged are the files that `faqd-deploy export`
writes, on onnxruntime and on images on which nothing is chosen: those of `judged_on`, else the eval split. By flavour
there is top-1 where there are labels, the metric where there is one, and the distance of the outputs. A finished cell
is a file: the same command goes on.
"""

from __future__ import annotations

import hashlib
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, cast, get_args

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from faqd import __version__
from faqd.benchmarks.measure.environment import environment
from faqd.benchmarks.studies.resumable import claim, going_on, say, training_seconds
from faqd.command import emit_json, json_option, run
from faqd.data_flags import DATA_NAMES, data_values
from faqd.deploy.export.torch_to_onnx import onnx_from_deployed
from faqd.deploy.onnx_model.session import OnnxSession
from faqd.deploy.verify.bundle_networks import flavours
from faqd.errors import UserError
from faqd.files import read_json, write_json
from faqd.quantize.capture.capture import capture
from faqd.quantize.convert import collect_output_scales, convert
from faqd.quantize.outputs import run_batches
from faqd.quantize.student import Student
from faqd.quantize.without_training import JUDGED_IMAGES, best_without_training
from faqd.train.data.datasets import load_dataset
from faqd.train.data.image_files import read_images
from faqd.train.data.listed_files import listed
from faqd.train.data.split import Split
from faqd.train.distill import distill
from faqd.train.loop.batches import splits_on
from faqd.train.loop.calibration_images import calibration_batches
from faqd.train.loop.distributed import ProcessGroup
from faqd.train.losses.distillation import LogitForm
from faqd.train.losses.heads import Heads, distance, heads_from
from faqd.train.networks.source import user_function
from faqd.train.recipes import DistillRecipe, distill_default
from faqd.train.run.folder import network_input
from faqd.train.run.lesson import Lesson, lesson_from
from faqd.train.run.student import load_student, recipe_bits

BATCH_PIXELS = 2**19
"""What is judged at once."""

Figures = dict[str, float]
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class HeldOut:
    """Images on which nothing was chosen, and what the teacher makes of them. files: theirs, where they have some."""

    split: Split
    files: list[str] | None
    inputs: Tensor
    wanted: Outputs
    metric: Callable[..., Any] | None

    def figures(self, found: Outputs, heads: Heads | None) -> Figures:
        """What a network that answers so is worth. heads: of the teacher, None for the teacher itself."""
        figures = {}
        if heads is not None:
            figures["distance"] = sum(float(d) for d in distance(found, self.wanted, heads).values()) / len(heads)
        if self.split.labels is not None and len(found) == 1:
            (scores,) = found.values()
            figures["top1"] = float((scores.argmax(1) == torch.from_numpy(self.split.labels)).float().mean())
        if self.metric is not None:
            ours, teacher = ({n: value.numpy() for n, value in each.items()} for each in (found, self.wanted))
            known = {"images": self.split.images, "teacher": teacher, "files": self.files}
            figures["metric"] = float(self.metric(ours, known))
        return {name: round(value, 6) for name, value in figures.items()}


def recipe_of(bits: str, seed: int, steps: int, logit: LogitForm | None = None) -> DistillRecipe:
    """The defaults, at `bits` as W/A, for so many iterations; with another distance of the outputs, where one is
    given."""
    weights, activations = map(int, bits.split("/"))
    base = distill_default()
    training = replace(base.training, steps=steps, seed=seed, data_seed=seed)
    return replace(base, weight_bits=weights, act_bits=activations, training=training, logit=logit or base.logit)


def lesson_of(entry: dict[str, Any], folder: Path) -> Lesson:
    """The network of an entry and its images."""
    file, _, name = str(entry["teacher"]).rpartition(":")
    spec, weights = f"{folder / file}:{name}", folder / entry["weights"]
    return lesson_from(spec, weights, _data_of(entry, folder), with_labels=True, say=say)


def held_out_of(entry: dict[str, Any], folder: Path, lesson: Lesson) -> HeldOut:
    """What the students of an entry are judged by."""
    split, options, preprocess = lesson.dataset.eval, lesson.data, lesson.dataset.preprocess
    if "judged_on" in entry:
        source = data_values({**dict.fromkeys(DATA_NAMES), "data": _source(entry["judged_on"], folder)})["source"]
        options = replace(options, source=source, image_size=(preprocess.height, preprocess.width), limit=None)
        all_of_it = load_dataset(options, with_labels=True, say=say)
        split = _joined([all_of_it.train, all_of_it.select, all_of_it.eval])
    spec, (kind, _, where) = entry.get("metric"), options.source.partition(":")
    inputs = network_input(split.images, preprocess)
    return HeldOut(
        split,
        _files(Path(where), split.images, preprocess.fit) if kind == "folder" else None,
        inputs,
        run_batches(lesson.teacher.network, inputs, _batch(inputs)),
        None if spec is None else user_function(str(folder / spec), "metric"),
    )


def untrained(lesson: Lesson, recipe: DistillRecipe) -> Student:
    """What a distillation starts from: quantization without training."""
    train, select = splits_on(torch.device("cpu"), lesson.dataset)
    example = train.normalised(train.pixels[:2]).contiguous()
    captured, judged_on = capture(lesson.teacher.network, example), select.normalised(select.pixels[:JUDGED_IMAGES])
    batches = list(calibration_batches(train))
    best = best_without_training(
        captured, recipe_bits(recipe), batches, judged_on, "auto", "auto", asymmetric=recipe.asymmetric
    )
    return best.student


def judged(student: Student, output_scales: dict[str, float], held_out: HeldOut, heads: Heads) -> dict[str, Figures]:
    """The figures of a student's files by flavour: TensorRT's as it is written, onnxruntime's as it is run."""
    found: dict[str, Figures] = {}
    for flavour in flavours(student.config.target, student.config.activations):
        model = onnx_from_deployed(convert(student, flavour, output_scales), held_out.inputs[:2], {})
        threads = torch.get_num_threads()
        session = OnnxSession(model.SerializeToString(), threads=threads, optimise=flavour == "onnxruntime")
        found[flavour] = held_out.figures(
            run_batches(_runner(session), held_out.inputs, _batch(held_out.inputs)), heads
        )
    return found


def cell(
    lesson: Lesson,
    recipe: DistillRecipe,
    out: Path,
    held_out: HeldOut,
    ptq: dict[str, Figures] | None,
    processes: ProcessGroup,
) -> dict[str, Any]:
    """Distil one student and judge it, beside the same student untrained. ptq: the figures of that, where known."""
    (record,) = distill([(recipe, out)], lesson, None, resume=True, say=say, processes=processes)
    heads = heads_from(record["outputs"])
    if ptq is None:
        student = untrained(lesson, recipe)
        train, _ = splits_on(torch.device("cpu"), lesson.dataset)
        batches = (part for some in calibration_batches(train) for part in some.split(_batch(some)))
        ptq = judged(student, collect_output_scales(student, batches), held_out, heads)
    return {
        "images": len(held_out.inputs),
        "teacher": held_out.figures(held_out.wanted, None),
        "ptq": ptq,
        "distilled": judged(load_student(out), record["output_scales"], held_out, heads),
        "kept": record["kept"],
        "taps": record["taps"],
        # Where images of a folder lie is of no interest elsewhere.
        "recipe": {name: value for name, value in record["recipe"].items() if name != "data"},
        "threads": torch.get_num_threads(),
        "seconds": round(training_seconds(out), 1),
    }


def _data_of(entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Its options as fields of DataOptions; where data lie is relative to `folder`."""
    given = entry["data"]
    options = {**dict.fromkeys(DATA_NAMES), "labels": False, "download": False, **given}
    options["data"] = _source(given["data"], folder)
    options["data_root"] = folder / given["data_root"] if "data_root" in given else None
    return data_values(options)


def _source(source: str, folder: Path) -> tuple[str]:
    """As `--data` gives it, which may stand on a line several times."""
    kind, _, where = source.partition(":")
    return (f"{kind}:{folder / where}" if where else kind,)


def _joined(splits: list[Split]) -> Split:
    labels = [split.labels for split in splits if split.labels is not None]
    return Split(np.concatenate([split.images for split in splits]), np.concatenate(labels) if labels else None)


def _files(folder: Path, images: NDArray[np.uint8], fit: Callable[..., NDArray[np.uint8]]) -> list[str]:
    """The file of each image: splits are cut by content, and so it is found again."""
    files = listed(folder)
    read = read_images(files, fit, say)
    named = {_digest(image): files.where(index) for image, index in zip(read.pixels, read.kept, strict=True)}
    return [named[_digest(image)] for image in images]


def _digest(image: NDArray[np.uint8]) -> bytes:
    return hashlib.sha256(image.tobytes()).digest()


def _runner(session: OnnxSession) -> Callable[[Tensor], dict[str, Tensor]]:
    (name,) = session.inputs
    return lambda x: {n: torch.from_numpy(value) for n, value in session.run({name: x.numpy()}).items()}


def _batch(inputs: Tensor) -> int:
    return max(1, BATCH_PIXELS // inputs[0, 0].numel())


@click.command(help=(__doc__ or "").splitlines()[0])
@click.argument("networks", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Keep runs and finished cells here.")
@click.option("--only", multiple=True, metavar="NAME", help="Try this network of the list, repeatable.")
@click.option("--bits", multiple=True, metavar="W/A", default=("8/8", "4/4"), show_default=True, help="Try these bits.")
@click.option("--steps", type=click.IntRange(1), default=200, show_default=True, help="Train so many iterations.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Repeat with so many seeds.")
@click.option(
    "--logit",
    multiple=True,
    type=click.Choice(["default", *get_args(LogitForm)]),
    default=("default",),
    show_default=True,
    help="Measure the distance of the outputs in this way, repeatable.",
)
@json_option
def command(
    networks: Path,
    out: Path,
    only: Sequence[str],
    bits: Sequence[str],
    steps: int,
    seeds: int,
    logit: Sequence[str],
    json_target: str | None,
) -> None:
    entries = _entries(networks, only)
    claim(out, {"steps": steps})
    cells: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        prepared: tuple[Lesson, HeldOut] | None = None
        for pair, seed, form in product(bits, range(seeds), logit):
            start = f"{name}-w{pair.replace('/', 'a')}-"
            key = f"{start}s{seed}" + f"-{form}" * (form != "default")
            file = out / "cells" / f"{key}.json"
            if not file.is_file():
                if prepared is None:
                    lesson = lesson_of(entry, networks.parent)
                    prepared = lesson, held_out_of(entry, networks.parent, lesson)
                lesson, held_out = prepared
                recipe = recipe_of(pair, seed, steps, None if form == "default" else cast(LogitForm, form))
                # Without training, nothing depends on the seed or the loss.
                ptq = next((made["ptq"] for other, made in cells.items() if other.startswith(start)), None)
                with going_on(out):
                    write_json(file, cell(lesson, recipe, out / key, held_out, ptq, ProcessGroup()))
            cells[key] = read_json(file)
            say(f"{key}: ptq {cells[key]['ptq']}, distilled {cells[key]['distilled']}")
    result = {
        "what": "deployed students by the defaults of faqd-train distill, beside the same untrained",
        "command": shlex.join(["python", "-m", "faqd.benchmarks.studies.defaults", *sys.argv[1:]]),
        "environment": environment(),
        "versions": {"faqd": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "steps": steps,
        "cells": cells,
    }
    emit_json(json_target, result)


def _entries(path: Path, only: Sequence[str]) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a JSON file that lists networks.")
    entries: dict[str, dict[str, Any]] = read_json(path)
    if missing := [name for name in only if name not in entries]:
        raise UserError(f"--only {missing[0]}: not in {path}; it lists {', '.join(entries)}.")
    return {name: entry for name, entry in entries.items() if not only or name in only}


def main() -> None:
    run(command)


if __name__ == "__main__":
    main()
