"""Distillation: quantized students learn from the float teacher on images without labels (arXiv 2302.10899).

loss = logit_weight * distance of the outputs + affinity_weight * sum over taps of the feature-affinity distance,
and, only where asked for, label_weight * cross-entropy. A term of weight 0 is not computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from faqd.errors import UserError
from faqd.quant import FLOAT_BITS
from faqd.train import graph
from faqd.train.adaptors import Adapted
from faqd.train.batches import Batch, Batches, Images, splits_on
from faqd.train.capture import capture
from faqd.train.convert import collect_output_scales
from faqd.train.data import Say
from faqd.train.doubts import question_taps, refuse_kl_of_one, refuse_one_class
from faqd.train.job import Job, select_losses
from faqd.train.loop import finish, fit
from faqd.train.losses import affinity_loss, logit_loss
from faqd.train.network import NetworkSource, write_tensors
from faqd.train.outputs import named_outputs
from faqd.train.prepare import Student, calibrate
from faqd.train.recipes import FROM_SCRATCH, FROM_TRAINED, Autocast, DistillRecipe, TeacherDtype, recipe_json
from faqd.train.run import (
    RECORD,
    TEACHER_WEIGHTS,
    asked_json,
    begin,
    conclude,
    data_json,
    held,
    is_done,
    read_record,
)
from faqd.train.source import Lesson, Teacher, output_shapes
from faqd.train.student import new_student, start_of, student_source
from faqd.train.taps import tap_names, tap_pairs
from faqd.train.target import dtype_effect, target_of
from faqd.train.world import World

CALIBRATION_IMAGES = 512
REHEARSED_IMAGES = 8
"""What taps are looked at, and the export is rehearsed, with."""
AUTOCAST: dict[Autocast, torch.dtype | None] = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


Rehearsal = Callable[[Student, nn.Module | None, Tensor, Say], None]
"""(calibrated student, its teacher where that is another network, network input on the CPU, say)"""


@dataclass(frozen=True)
class Plan:
    """A run that is asked for: its recipe with nothing left open, its folder, the student's network, its record."""

    recipe: DistillRecipe
    out: Path
    source: NetworkSource
    record: dict[str, Any]


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
    plans = [_plan(recipe, out, lesson, taps) for recipe, out in members]
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


def _plan(recipe: DistillRecipe, out: Path, lesson: Lesson, taps: list[str] | None) -> Plan:
    source = student_source(recipe.arch, lesson.teacher)
    recipe = _resolved(recipe, lesson, source)
    if not (recipe.logit_weight or recipe.label_weight or _has_affinity(recipe)):
        raise UserError("--logit-weight 0: nothing is left to learn from; give one of the terms a weight.")
    if taps and recipe.affinity == "none":
        raise UserError(f"--tap {taps[0]}: nothing is compared there with --affinity none; leave one of them out.")
    if recipe.adaptors and not _has_affinity(recipe):
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


def _has_affinity(recipe: DistillRecipe) -> bool:
    return recipe.affinity != "none" and recipe.affinity_weight > 0


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
    images = train.normalised(train.pixels[:REHEARSED_IMAGES]).cpu().contiguous()
    example = images[:2]
    teacher_graph = capture(teacher.network, example)
    students = [new_student(plan.recipe, plan.source, teacher, example) for plan in plans]
    pairs = [
        tap_pairs(teacher_graph, student, taps) if _has_affinity(plan.recipe) else []
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
    _say_taps(plans, names, say)
    question_taps(teacher_graph, theirs, images, say)
    for plan, student in zip(plans, students, strict=True):
        student.network.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        calibrate(student, calibration_batches(train), "mse", batch_statistics=plan.recipe.init == "scratch")
        if rehearse is not None and not (plan.out / RECORD).is_file():
            another = None if plan.source == teacher.source else teacher.network
            world.first(partial(rehearse, student, another, images, say))
    with ExitStack() as locks:
        if world.leads:
            for plan in plans:
                begin(plan.out, {**plan.record, **effect})
                locks.enter_context(held(plan.out))
                write_tensors(plan.out / TEACHER_WEIGHTS, teacher.network.state_dict())
        jobs = [distill_job(*of_one) for of_one in zip(plans, students, pairs, strict=True)]
        if len(plans) > 1:
            jobs = [replace(job, title=job.run.name) for job in jobs]
        # Every start calibrates anew, resumed or not, so that these are the losses without training.
        untrained, _ = _selected(jobs, batches)
        failed = fit(jobs, batches, deadline)
        selected, broken = _selected([job for job in jobs if job.run not in failed], batches)
        failed |= broken
        for plan, student, tapped in zip(plans, students, names, strict=True):
            if plan.out not in failed:
                results = {
                    "taps": tapped,
                    "select": selected[plan.out],
                    "select_untrained": untrained.get(plan.out),
                }
                world.first(partial(_conclude, plan, student, results, train))
    return failed


def _selected(jobs: list[Job], batches: Batches) -> tuple[dict[Path, dict[str, float]], dict[Path, UserError]]:
    """The losses on the select split by run, and the error where one is not finite."""
    found, failed = {}, {}
    selection = batches.selection()
    for job in jobs:
        try:
            found[job.run] = select_losses(job, batches, selection)
        except UserError as error:
            failed[job.run] = error
    return found, failed


def _dtype_effect(
    dtype: TeacherDtype, teacher: fx.GraphModule, taps: list[str], train: Images, say: Say, world: World
) -> dict[str, Any]:
    """What the teacher loses in its dtype, as the record of a run has it; nothing for float32."""
    if dtype == "fp32":
        return {}
    places = {node.name: place for node, place in graph.places(teacher).items()}
    effect = dtype_effect(
        teacher, {name: places[name] for name in taps}, list(calibration_batches(train)), world.device, dtype
    )
    say(effect.sentence())
    return {"teacher_dtype": effect.to_json()}


def _say_taps(plans: list[Plan], names: list[list[str]], say: Say) -> None:
    for name in dict.fromkeys(name for tapped in names for name in tapped):
        say(f"affinity tap: {name}")
    if any(_has_affinity(plan.recipe) and not tapped for plan, tapped in zip(plans, names, strict=True)):
        say("no affinity: no feature map has one size in both networks; --tap TEACHER=STUDENT says what to compare.")


def _conclude(plan: Plan, student: Student, results: dict[str, Any], train: Images) -> None:
    if plan.recipe.act_bits != FLOAT_BITS:
        results["output_scales"] = collect_output_scales(student, (batch.cpu() for batch in calibration_batches(train)))
    conclude(plan.out, results, student.network)
    finish(plan.out)


def _resolved(recipe: DistillRecipe, lesson: Lesson, source: NetworkSource) -> DistillRecipe:
    """`recipe` with what the teacher and the data decide: nothing that a reader of the run would have to guess."""
    init = start_of(recipe, lesson.teacher)
    usual = FROM_SCRATCH if init == "scratch" else FROM_TRAINED
    unset = {name: value for name, value in usual.items() if getattr(recipe.training, name) is None}
    training = replace(recipe.training, **unset)
    arch = source.architecture or recipe.arch
    return replace(recipe, data=lesson.data.source, arch=arch, init=init, training=training)


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


def _record(recipe: DistillRecipe, lesson: Lesson, source: NetworkSource, taps: list[str] | None) -> dict[str, Any]:
    teacher = {"teacher": lesson.teacher.source.to_json(), "teacher_sha256": lesson.teacher.sha256}
    return {
        "kind": "distill",
        "asked": {**asked_json(recipe, lesson.data), **teacher, "student": source.to_json(), "taps": taps},
        "recipe": recipe_json(recipe),
        "data": data_json(lesson.data),
        "network": source.to_json(),
        **teacher,
        "preprocess": lesson.dataset.preprocess.to_json(),
    }


def distill_job(plan: Plan, student: Student, pairs: list[tuple[str, str]]) -> Job:
    """What `fit` trains: the student's parameters in two groups, and the weighted terms of the loss.

    pairs: nodes (teacher, student) whose maps are compared.
    """
    recipe = plan.recipe

    def losses(answer: Any, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        outputs, maps = answer
        target = batch.target
        assert target is not None
        terms = {}
        if recipe.logit_weight:
            for name, output in named_outputs(outputs).items():
                distance = logit_loss(output, target.outputs[name], recipe.logit, recipe.temperature)
                terms["logit" if len(target.outputs) == 1 else f"logit {name}"] = recipe.logit_weight * distance
        if recipe.affinity != "none" and pairs:
            distances = [
                affinity_loss(ours, target.maps[name], recipe.affinity, columns=recipe.columns, generator=generator)
                for ours, (name, _) in zip(maps, pairs, strict=True)
            ]
            terms["affinity"] = recipe.affinity_weight * torch.stack(distances).sum()
        if recipe.label_weight:
            assert batch.labels is not None
            # Autocast leaves the outputs in half precision.
            terms["label"] = recipe.label_weight * functional.cross_entropy(outputs.float(), batch.labels)
        return terms

    network: nn.Module = graph.with_taps(student.network, [ours for _, ours in pairs])
    if recipe.adaptors and pairs:
        shapes = {node.name: graph.shape(node) for node in student.network.graph.nodes if graph.is_tensor(node)}
        device = next(student.network.parameters()).device
        network = Adapted(network, [shapes[ours][1] for _, ours in pairs], device)
    quantizers = student.quantizers().values()
    decayed, free = decay_groups(network)

    def keep_scales() -> None:
        for quantizer in quantizers:
            quantizer.keep_scale(recipe.scale_step)

    return Job(
        f"distill {recipe.weight_bits}/{recipe.act_bits}",
        plan.out,
        network,
        decayed,
        free,
        losses,
        keep_scales,
        recipe.training,
        all_used=bool(recipe.logit_weight or recipe.label_weight),
        autocast=AUTOCAST[recipe.autocast],
    )


def decay_groups(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What is trained, with and without weight decay: the float weights of layers have it.

    Norms, biases and activation scales do not: none of them has a direction in which smaller is simpler, and a scale
    that shrinks clips.
    """
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for parameter in filter(lambda parameter: parameter.requires_grad, network.parameters()):
        groups[parameter.dim() <= 1].append(parameter)
    return groups


def calibration_batches(images: Images) -> Iterator[Tensor]:
    for pixels in images.pixels[:CALIBRATION_IMAGES].split(128):
        yield images.normalised(pixels)
