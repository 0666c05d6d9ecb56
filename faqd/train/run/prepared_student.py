"""A student that is about to learn: quantized and not yet trained, with the places where it is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from faqd.bundle import floats_in_words
from faqd.errors import UserError
from faqd.quantize.int8_share import floats_of
from faqd.quantize.student import Student
from faqd.train.data.datasets import Say
from faqd.train.loop.batches import SELECT_IMAGES, Images
from faqd.train.loop.select import Measure, users_measure
from faqd.train.losses.objective import Pairs
from faqd.train.losses.taps import tap_costs, tap_names, tap_pairs
from faqd.train.recipes import DistillRecipe
from faqd.train.run.lesson import Teacher
from faqd.train.run.plan import Plan, has_affinity
from faqd.train.run.student import new_student


@dataclass(frozen=True)
class PreparedStudent:
    """taps: the names of `pairs`, as --feature-layer takes them. measure: of --select."""

    plan: Plan
    student: Student
    pairs: Pairs
    taps: list[str]
    measure: Measure | None


def prepared_students(
    plans: Sequence[Plan],
    measures: Sequence[Measure | None],
    teacher: Teacher,
    teacher_graph: fx.GraphModule,
    example: Tensor,
    taps: list[str] | None,
    say: Say,
) -> list[PreparedStudent]:
    """A new student for each plan. UserError where nothing is left for one to learn from."""
    students = [new_student(plan.recipe, plan.source, teacher, example) for plan in plans]
    for sentence in dict.fromkeys(text for student in students for text in floats_in_words(floats_of(student))):
        say(sentence)
    pairs = [
        tap_pairs(teacher_graph, student, taps) if has_affinity(plan.recipe) else []
        for plan, student in zip(plans, students, strict=True)
    ]
    for plan, of_one in zip(plans, pairs, strict=True):
        if not (of_one or plan.recipe.logit_weight or plan.recipe.label_weight):
            raise UserError(
                "--logit-weight 0: no feature map has one size in both networks either; see --feature-layer."
            )
    return [
        PreparedStudent(plan, student, of_one, tap_names(teacher_graph, student, of_one), measure)
        for plan, student, of_one, measure in zip(plans, students, pairs, measures, strict=True)
    ]


def measure_of(recipe: DistillRecipe, select: Images) -> Measure | None:
    """The user's, of --select."""
    if recipe.select is None:
        return None
    if recipe.init == "scratch":
        raise UserError(f"--select {recipe.select}: a student from scratch keeps its last weights; leave it out.")
    return users_measure(recipe.select, select.pixels[:SELECT_IMAGES].permute(0, 2, 3, 1).cpu().numpy())


def say_taps(prepared: Sequence[PreparedStudent], say: Say) -> None:
    said: dict[str, str] = {}
    for one in prepared:
        recipe = one.plan.recipe
        if recipe.affinity != "none":
            said |= zip(one.taps, tap_costs(one.student, one.pairs, recipe.affinity, recipe.columns), strict=True)
    for name, cost in said.items():
        say(f"feature layer: {name} ({cost})")
    if any(has_affinity(one.plan.recipe) and not one.taps for one in prepared):
        say(
            "no affinity: no feature map has one size in both networks; --feature-layer TEACHER=STUDENT says what to "
            "compare."
        )
