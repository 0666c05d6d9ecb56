"""Distillation: quantized students learn from the float teacher on images without labels (arXiv 2302.10899).

loss = logit_weight * distance of the outputs + affinity_weight * sum over taps of the feature-affinity distance,
and, only where asked for, label_weight * cross-entropy. A term of weight 0 is not computed. With relative steps, which
do not depend on the size of a loss, the two distances count as shares of what they are. A student that started from
trained weights ends with the best ones that were seen, those before training among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from faqd.bundle import floats_in_words
from faqd.errors import UserError
from faqd.quant import FLOAT_BITS
from faqd.quantize import nodes
from faqd.quantize.calibrate import calibrate
from faqd.quantize.capture.capture import capture
from faqd.quantize.convert import collect_output_scales
from faqd.quantize.int8_share import floats_of
from faqd.quantize.student import Student
from faqd.train.data.datasets import Say
from faqd.train.data.doubts import question_taps
from faqd.train.loop.batches import Batches, Images, splits_on
from faqd.train.loop.distributed import World
from faqd.train.loop.fit import finish, fit
from faqd.train.loop.progress import reporting
from faqd.train.loop.select import Answers, Measure, kept_sentence, mean_losses, users_measure
from faqd.train.loop.teacher_forward import dtype_effect, target_of
from faqd.train.loop.trainee import Job, select_losses
from faqd.train.losses.heads import Heads, heads_from, heads_of
from faqd.train.losses.objective import Pairs, distances_to, distill_job
from faqd.train.losses.taps import tap_costs, tap_names, tap_pairs
from faqd.train.networks.own_tensors import own_tensors
from faqd.train.networks.tensor_files import write_tensors
from faqd.train.recipes import DistillRecipe, TeacherDtype, recipe_json, relative_rate
from faqd.train.run.folder import (
    RECORD,
    TEACHER_WEIGHTS,
    begin,
    conclude,
    held,
    is_done,
    read_record,
)
from faqd.train.run.lesson import Lesson, Teacher
from faqd.train.run.plan import Plan, has_affinity, plan_of
from faqd.train.run.student import new_student, start_of

CALIBRATION_IMAGES = 512
FLOAT64_PIXELS = 2**19
"""What a batch of the deployed student holds: its values have eight bytes, and all of a layer's are there at once."""
CONSTANT = 1.0
"""The distance of a student whose outputs never change, about."""
NOTHING_LEARNED = (
    "these weights are no nearer to the teacher than outputs that are the same for every image. Give it more bits, "
    "keep the layers float that lose most (--exclude), or give images on which the teacher finds something."
)
REHEARSED_IMAGES = 8
"""What taps are looked at, and the export is rehearsed, with."""

Rehearsal = Callable[[Student, nn.Module | None, Tensor, Say], None]
"""(calibrated student, its teacher where that is another network, network input on the CPU, say)"""


def distill(
    members: Sequence[tuple[DistillRecipe, Path]],
    lesson: Lesson,
    taps: list[str] | None,
    resume: bool,
    say: Say,
    world: World,
    deadline: float = math.inf,
    rehearse: Rehearsal | None = None,
) -> list[dict[str, Any]]:
    """Distil a student for every recipe and write each run into its folder. Returns their records.

    rehearse: raises what would keep a student from being exported, before anything is trained or written.

    Students with one data seed, batch size and length learn side by side from one pass of the teacher; each ends as
    it would alone, to the last bit on a CPU. A finished one is left as it is. A loss that is no longer finite ends its
    own run; the error comes once the others are done. Paused at the deadline: see `fit`.
    """
    plans = [plan_of(recipe, out, lesson, taps) for recipe, out in members]
    done = world.first(lambda: [is_done(plan.out, plan.record, resume) for plan in plans])
    for plan in (plan for plan, is_finished in zip(plans, done, strict=True) if is_finished):
        say(f"{plan.out}: this run is finished.")
    waiting = [plan for plan, is_finished in zip(plans, done, strict=True) if not is_finished]
    failed: dict[Path, UserError] = {}
    if waiting:
        train, select = splits_on(world.device, lesson.dataset)
        for _, together in groupby(sorted(waiting, key=_course), key=_course):
            failed |= _distill_together(
                list(together), lesson.teacher, train, select, taps, say, world, deadline, rehearse
            )
    if failed:
        raise _all_of(failed, len(plans))
    return world.first(lambda: [read_record(plan.out) for plan in plans])


def _all_of(failed: dict[Path, UserError], asked: int) -> UserError:
    if asked == 1:
        return next(iter(failed.values()))
    return UserError("\n".join(f"{run}: {error}" for run, error in failed.items()), exit_code=1)


def _course(plan: Plan) -> tuple[int | str, ...]:
    """What students must have in common to see the same batches, and the same teacher, to the end."""
    training = plan.recipe.training
    schedule = training.data_seed, training.batch_size, training.steps or 0, training.epochs
    return *schedule, plan.recipe.teacher_dtype


def _distill_together(
    plans: list[Plan],
    teacher: Teacher,
    train: Images,
    select: Images,
    taps: list[str] | None,
    say: Say,
    world: World,
    deadline: float,
    rehearse: Rehearsal | None,
) -> dict[Path, UserError]:
    users = [_users_measure(plan.recipe, select) for plan in plans]
    images = train.normalised(train.pixels[:REHEARSED_IMAGES]).cpu().contiguous()
    example = images[:2]
    teacher_graph = capture(teacher.network, example)
    students = [new_student(plan.recipe, plan.source, teacher, example) for plan in plans]
    for sentence in dict.fromkeys(text for student in students for text in floats_in_words(floats_of(student))):
        say(sentence)
    pairs = [
        tap_pairs(teacher_graph, student, taps) if has_affinity(plan.recipe) else []
        for plan, student in zip(plans, students, strict=True)
    ]
    for plan, of_one in zip(plans, pairs, strict=True):
        if not (of_one or plan.recipe.logit_weight or plan.recipe.label_weight):
            raise UserError("--logit-weight 0: no feature map has one size in both networks either; see --tap.")
    names = [tap_names(teacher_graph, *of_one) for of_one in zip(students, pairs, strict=True)]
    training = plans[0].recipe.training
    theirs = [theirs for of_one in pairs for theirs, _ in of_one]
    dtype = plans[0].recipe.teacher_dtype
    effect = _dtype_effect(dtype, teacher_graph, theirs, train, say, world)
    shown = target_of(teacher_graph, theirs, world.device, dtype)
    batches = Batches(train, select, training.batch_size, training.data_seed, shown, world)
    _say_taps(plans, students, pairs, names, say)
    question_taps(teacher_graph, theirs, images, say)
    for plan, student in zip(plans, students, strict=True):
        student.network.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        method, scratch = plan.recipe.calibration, plan.recipe.init == "scratch"
        calibrate(student, calibration_batches(train), method, batch_statistics=scratch)
        if rehearse is not None and not (plan.out / RECORD).is_file():
            another = None if plan.source == teacher.source else teacher.network
            world.first(partial(rehearse, student, another, images, say))
    heads = heads_of(teacher_graph, lambda x: shown(x).outputs, _batches_of(train, training.batch_size))
    outputs = {"outputs": {name: head.to_json() for name, head in heads.items()}}
    plans = [_with_rate(plan, student, heads, batches) for plan, student in zip(plans, students, strict=True)]
    with ExitStack() as locks:
        if world.leads:
            for plan in plans:
                begin(plan.out, {**plan.record, **effect, **outputs})
                locks.enter_context(held(plan.out))
                write_tensors(plan.out / TEACHER_WEIGHTS, own_tensors(teacher.network))
        # As the run began: measured with another number of threads, the last bits differ.
        recorded = world.first(lambda: [read_record(plan.out) for plan in plans])
        jobs = [
            distill_job(_as_begun(plan, record), student, tapped, heads_from(record["outputs"]), measure)
            for plan, student, tapped, record, measure in zip(plans, students, pairs, recorded, users, strict=True)
        ]
        if len(plans) > 1:
            jobs = [replace(job, title=job.run.name) for job in jobs]
        # Every start calibrates anew, resumed or not, so that these are the losses without training.
        untrained, _ = _selected(jobs, batches)
        failed, best = fit(jobs, batches, deadline)
        selected, broken = _selected([job for job in jobs if job.run not in failed], batches)
        failed |= broken
        for plan, student, tapped in zip(plans, students, names, strict=True):
            if plan.out not in failed:
                results = {
                    "taps": tapped,
                    "select": selected[plan.out],
                    "select_untrained": untrained.get(plan.out),
                }
                if plan.out in best:
                    results["kept"] = best[plan.out].to_json()
                    say(kept_sentence(plan.out, best[plan.out], batches.iterations(training)))
                    if _by_distance(plan.recipe) and best[plan.out].measure >= CONSTANT:
                        say(f"{plan.out}: {NOTHING_LEARNED}")
                world.first(partial(_conclude, plan, student, results, train))
    return failed


def _by_distance(recipe: DistillRecipe) -> bool:
    """Whether the best weights are told by the distance of the outputs, about 1 for a student without a teacher."""
    return recipe.select is None and not recipe.label_weight and recipe.init != "scratch"


def _with_rate(plan: Plan, student: Student, heads: Heads, batches: Batches) -> Plan:
    """`plan` with the rate that suits how far the untrained student is from its teacher, where none was given."""
    if plan.recipe.training.lr is not None:
        return plan
    student.network.eval()
    with torch.no_grad():
        parts: Answers = (((student.network(batch.x), []), batch) for batch in batches.selection())
        distances = mean_losses(parts, distances_to(heads), batches.data_seed).values()
    rate = relative_rate(sum(distances) / len(distances), plan.recipe.weight_bits)
    recipe = replace(plan.recipe, training=replace(plan.recipe.training, lr=rate))
    return replace(plan, recipe=recipe, record={**plan.record, "recipe": recipe_json(recipe)})


def _as_begun(plan: Plan, record: dict[str, Any]) -> Plan:
    training = replace(plan.recipe.training, lr=record["recipe"]["training"]["lr"])
    return replace(plan, recipe=replace(plan.recipe, training=training))


def _users_measure(recipe: DistillRecipe, select: Images) -> Measure | None:
    if recipe.select is None:
        return None
    if recipe.init == "scratch":
        raise UserError(f"--select {recipe.select}: a student from scratch keeps its last weights; leave it out.")
    return users_measure(recipe.select, select.pixels.permute(0, 2, 3, 1).cpu().numpy())


def _selected(jobs: list[Job], batches: Batches) -> tuple[dict[Path, dict[str, float]], dict[Path, UserError]]:
    """The losses on the select split by run, and the error where one is not finite."""
    found, failed = {}, {}
    for job in jobs:
        try:
            found[job.run] = select_losses(job, batches)
        except UserError as error:
            failed[job.run] = error
    return found, failed


def _dtype_effect(
    dtype: TeacherDtype, teacher: fx.GraphModule, taps: list[str], train: Images, say: Say, world: World
) -> dict[str, Any]:
    """What the teacher loses in its dtype, as the record of a run has it; nothing for float32."""
    if dtype == "fp32":
        return {}
    places = {node.name: place for node, place in nodes.places(teacher).items()}
    effect = dtype_effect(
        teacher, {name: places[name] for name in taps}, list(calibration_batches(train)), world.device, dtype
    )
    say(effect.sentence())
    return {"teacher_dtype": effect.to_json()}


def _say_taps(plans: list[Plan], students: list[Student], pairs: list[Pairs], names: list[list[str]], say: Say) -> None:
    said: dict[str, str] = {}
    for plan, student, of_one, tapped in zip(plans, students, pairs, names, strict=True):
        if plan.recipe.affinity != "none":
            said |= zip(tapped, tap_costs(student, of_one, plan.recipe.affinity, plan.recipe.columns), strict=True)
    for name, cost in said.items():
        say(f"affinity tap: {name} ({cost})")
    if any(has_affinity(plan.recipe) and not tapped for plan, tapped in zip(plans, names, strict=True)):
        say("no affinity: no feature map has one size in both networks; --tap TEACHER=STUDENT says what to compare.")


def _conclude(plan: Plan, student: Student, results: dict[str, Any], train: Images) -> None:
    if plan.recipe.act_bits != FLOAT_BITS:
        size = max(1, FLOAT64_PIXELS // train.pixels[0, 0].numel())
        results["output_scales"] = collect_output_scales(student, _reported(list(_batches_of(train, size))))
    conclude(plan.out, results, student.network)
    finish(plan.out)


def _reported(parts: list[Tensor]) -> Iterator[Tensor]:
    with reporting(["output scales"], len(parts)) as report:
        for number, part in enumerate(parts, 1):
            yield part.cpu()
            report(number, {})


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


def calibration_batches(images: Images) -> Iterator[Tensor]:
    return _batches_of(images, 128)


def _batches_of(images: Images, size: int) -> Iterator[Tensor]:
    """The images that scales are chosen on, so many at a time."""
    for pixels in images.pixels[:CALIBRATION_IMAGES].split(size):
        yield images.normalised(pixels)
