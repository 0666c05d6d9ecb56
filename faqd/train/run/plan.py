"""A run that is asked for: its options checked and filled in, before anything is captured or trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from faqd.errors import UserError
from faqd.quantize.outputs import named_outputs
from faqd.train.data.sanity_checks import refuse_kl_of_one, refuse_one_class
from faqd.train.networks.source import NetworkSource
from faqd.train.recipes import DistillRecipe, recipe_json, usual_training
from faqd.train.run.folder import asked_json, data_json
from faqd.train.run.lesson import Lesson, Teacher, output_shapes
from faqd.train.run.student import start_of, student_source


@dataclass(frozen=True)
class Plan:
    """A run that is asked for: its recipe, its folder, the student's network, its record.

    Nothing is left open in the recipe but the rate of relative steps, which an untrained student decides.
    """

    recipe: DistillRecipe
    out: Path
    source: NetworkSource
    record: dict[str, Any]


def plan_of(recipe: DistillRecipe, out: Path, lesson: Lesson, taps: list[str] | None) -> Plan:
    """What a run is asked for; UserError where its options contradict each other, or the data."""
    source = student_source(recipe.arch, lesson.teacher)
    recipe = _resolved(recipe, lesson, source)
    if not (recipe.logit_weight or recipe.label_weight or has_affinity(recipe)):
        raise UserError("--logit-weight 0: nothing is left to learn from; give one of the terms a weight.")
    if taps and recipe.affinity == "none":
        raise UserError(
            f"--feature-layer {taps[0]}: nothing is compared there with --affinity none; leave one of them out."
        )
    if recipe.adaptors and not has_affinity(recipe):
        raise UserError("--adaptors: what they adapt to is off; give --no-adaptors, or an --affinity with a weight.")
    if recipe.autocast == "fp16" and recipe.scale_gradient != "lsq":
        raise UserError(
            f"--autocast fp16: the limit of --scale-gradient {recipe.scale_gradient} does not go with a loss that is "
            "scaled up, as float16 needs it; use --autocast bf16, or --scale-gradient lsq."
        )
    if recipe.logit == "kl" and recipe.logit_weight:
        refuse_kl_of_one(output_shapes(lesson.teacher.network, lesson.teacher.source, "as the student's"))
    if recipe.label_weight:
        _refuse_without_labels(lesson)
        refuse_one_class(lesson.dataset, "--label-weight")
    return Plan(recipe, out, source, _record(recipe, lesson, source, taps))


def with_seeds(recipes: Sequence[DistillRecipe], count: int, teacher: Teacher) -> list[DistillRecipe]:
    """Every recipe with `count` seeds, counted on from its own.

    From scratch the seeds are those of the initial weights, and all students share one stream of batches. A student
    that starts from trained weights draws none, so that its data seed counts on as well.
    """
    made = []
    for recipe in recipes:
        training, fresh = recipe.training, start_of(recipe, teacher) == "scratch"
        for number in range(count):
            data_seed = training.data_seed if fresh else training.data_seed + number
            seeded = replace(training, seed=training.seed + number, data_seed=data_seed)
            made.append(replace(recipe, training=seeded))
    return made


def _refuse_without_labels(lesson: Lesson) -> None:
    dataset = lesson.dataset
    if dataset.train.labels is None or dataset.classes is None:
        raise UserError(
            f"--label-weight: {dataset.source} has no labels here. A folder has them as names of subfolders with "
            "--labels, an npz file as its array 'labels'."
        )
    with torch.no_grad():
        outputs = lesson.teacher.network(lesson.teacher.source.example())
    shapes = [tuple(output.shape[1:]) for output in named_outputs(outputs).values()]
    if not isinstance(outputs, Tensor) or shapes != [(len(dataset.classes),)]:
        raise UserError(
            f"--label-weight: the teacher has outputs {', '.join(map(str, shapes))} and {dataset.source} "
            f"{len(dataset.classes)} classes; learn without labels."
        )


def has_affinity(recipe: DistillRecipe) -> bool:
    """Whether feature maps count in the loss."""
    return recipe.affinity != "none" and recipe.affinity_weight > 0


def _resolved(recipe: DistillRecipe, lesson: Lesson, source: NetworkSource) -> DistillRecipe:
    """`recipe` with what the teacher and the data decide, so that a reader of the run need not guess."""
    init = start_of(recipe, lesson.teacher)
    height, width = lesson.dataset.train.pixels.shape[1:3]
    training = usual_training(recipe.training, init == "scratch", height * width)
    arch = source.architecture or recipe.arch
    logit = recipe.logit or ("relative" if training.optimizer == "relative" else "mse")
    return replace(recipe, data=lesson.data.source, arch=arch, init=init, training=training, logit=logit)


def _record(recipe: DistillRecipe, lesson: Lesson, source: NetworkSource, taps: list[str] | None) -> dict[str, Any]:
    teacher = {"teacher": lesson.teacher.source.to_json(), "teacher_sha256": lesson.teacher.sha256}
    return {
        "kind": "distill",
        "asked": {
            **asked_json(recipe, lesson.data, lesson.dataset.files),
            **teacher,
            "student": source.to_json(),
            "taps": taps,
        },
        "recipe": recipe_json(recipe),
        "data": data_json(lesson.data),
        "network": source.to_json(),
        **teacher,
        "preprocess": lesson.dataset.preprocess.to_json(),
    }
