"""Whether the defaults ever end worse than no training: distillation against PTQ on a list of float networks.

`python -m faqd.benchmarks.studies.defaults NETWORKS.json --out WORK --json FILE`. NETWORKS.json maps a name to
`teacher` (FILE.py:callable), `weights`, `data` (options of `faqd-train distill` without dashes, such as "image_size"),
and may have `metric` (FILE.py:function of (outputs, found), a number, the larger the better; see `--select`); paths are
relative to the file. Judged are deployed integers on the eval split, on which nothing is chosen: top-1 where there are
labels, the metric where there is one, and the distance of the outputs. A finished cell is a file: the same command goes
on.
"""

from __future__ import annotations

import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from faqd import __version__
from faqd.benchmarks.measure.environment import environment
from faqd.benchmarks.studies.resumable import claim, going_on, say
from faqd.command import data_values, emit_json, json_option, run
from faqd.errors import UserError
from faqd.files import read_json, write_json
from faqd.quantize.calibrate import calibrate
from faqd.quantize.capture.capture import capture
from faqd.quantize.outputs import run_batches
from faqd.quantize.prepare import insert_quantizers
from faqd.quantize.student import Student
from faqd.train.distill import calibration_batches, distill
from faqd.train.evaluate import deployable
from faqd.train.loop.batches import splits_on
from faqd.train.loop.distributed import World
from faqd.train.losses.heads import Heads, distance, heads_from
from faqd.train.networks.source import user_function
from faqd.train.recipes import DistillRecipe, distill_default
from faqd.train.run.folder import network_input
from faqd.train.run.lesson import Lesson, lesson_from
from faqd.train.run.student import load_student, recipe_bits

DATA_OPTIONS = ("data", "data_root", "download", "image_size", "resize", "channels", "mean", "std", "labels", "limit")
BATCH_PIXELS = 2**19
"""What is judged at once: the deployed integers are float64."""

Figures = dict[str, float]


def recipe_of(bits: str, seed: int, steps: int) -> DistillRecipe:
    """The defaults, at `bits` as W/A, for so many iterations."""
    weights, activations = map(int, bits.split("/"))
    base = distill_default()
    training = replace(base.training, steps=steps, seed=seed, data_seed=seed)
    return replace(base, weight_bits=weights, act_bits=activations, training=training)


def lesson_of(entry: dict[str, Any], folder: Path) -> Lesson:
    """The network of an entry and its images."""
    file, _, name = str(entry["teacher"]).rpartition(":")
    given = entry["data"]
    options = {**dict.fromkeys(DATA_OPTIONS), "labels": False, "download": False, **given}
    options["data_root"] = Path(given["data_root"]) if "data_root" in given else None
    spec, weights = f"{folder / file}:{name}", folder / entry["weights"]
    return lesson_from(spec, weights, data_values(options), with_labels=True, say=say)


def untrained(lesson: Lesson, recipe: DistillRecipe) -> Student:
    """What a distillation starts from: quantization without training."""
    train, _ = splits_on(torch.device("cpu"), lesson.dataset)
    example = train.normalised(train.pixels[:2]).contiguous()
    student = insert_quantizers(capture(lesson.teacher.network, example), recipe_bits(recipe), example)
    calibrate(student, calibration_batches(train), recipe.calibration)
    student.network.eval()
    return student


def judged(student: Student, lesson: Lesson, wanted: dict[str, Tensor], heads: Heads, metric: Any) -> Figures:
    """The figures of a deployed student on the eval split. wanted: the teacher's outputs there."""
    split = lesson.dataset.eval
    inputs = network_input(split.images, lesson.dataset.preprocess)
    found = run_batches(deployable(student), inputs, _batch(inputs))
    figures = {"distance": sum(float(each) for each in distance(found, wanted, heads).values()) / len(heads)}
    if split.labels is not None and len(found) == 1:
        (scores,) = found.values()
        figures["top1"] = float((scores.argmax(1) == torch.from_numpy(split.labels)).float().mean())
    if metric is not None:
        arrays = [{name: value.numpy() for name, value in each.items()} for each in (found, wanted)]
        figures["metric"] = float(metric(arrays[0], {"images": split.images, "teacher": arrays[1]}))
    return {name: round(value, 6) for name, value in figures.items()}


def cell(lesson: Lesson, recipe: DistillRecipe, out: Path, metric: Any, world: World) -> dict[str, Any]:
    """Distil one student and judge it, beside the same student untrained."""
    began = time.monotonic()
    (record,) = distill([(recipe, out)], lesson, None, resume=True, say=say, world=world)
    seconds = time.monotonic() - began
    inputs = network_input(lesson.dataset.eval.images, lesson.dataset.preprocess)
    wanted = run_batches(lesson.teacher.network, inputs, _batch(inputs))
    heads = heads_from(record["outputs"])
    return {
        "images": len(inputs),
        "ptq": judged(untrained(lesson, recipe), lesson, wanted, heads, metric),
        "distilled": judged(load_student(out), lesson, wanted, heads, metric),
        "kept": record["kept"],
        "taps": record["taps"],
        "recipe": record["recipe"],
        "seconds": round(seconds, 1),
    }


def _batch(inputs: Tensor) -> int:
    return max(1, BATCH_PIXELS // inputs[0, 0].numel())


@click.command(help=(__doc__ or "").splitlines()[0])
@click.argument("networks", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Keep runs and finished cells here.")
@click.option("--only", multiple=True, metavar="NAME", help="Try this network of the list, repeatable.")
@click.option("--bits", multiple=True, metavar="W/A", default=("8/8", "4/4"), show_default=True, help="Try these bits.")
@click.option("--steps", type=click.IntRange(1), default=200, show_default=True, help="Train so many iterations.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Repeat with so many seeds.")
@json_option
def command(
    networks: Path,
    out: Path,
    only: Sequence[str],
    bits: Sequence[str],
    steps: int,
    seeds: int,
    json_target: str | None,
) -> None:
    entries = _entries(networks, only)
    claim(out, {"steps": steps})
    cells = {}
    for name, entry in entries.items():
        lesson = lesson_of(entry, networks.parent)
        spec = entry.get("metric")
        metric = None if spec is None else user_function(str(networks.parent / spec), "metric")
        for pair, seed in product(bits, range(seeds)):
            key = f"{name}-w{pair.replace('/', 'a')}-s{seed}"
            file = out / "cells" / f"{key}.json"
            if not file.is_file():
                with going_on(out):
                    write_json(file, cell(lesson, recipe_of(pair, seed, steps), out / key, metric, World()))
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
