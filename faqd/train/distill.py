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

from faqd.errors import UserError
from faqd.quant import FLOAT_BITS
from faqd.quantize import nodes
from faqd.quantize.calibrate import calibrate
from faqd.quantize.capture.capture import capture
from faqd.quantize.convert import collect_output_scales
from faqd.quantize.outputs import named_outputs
from faqd.quantize.student import Student
from faqd.train.data.datasets import Say
from faqd.train.data.sanity_checks import warn_of_taps
from faqd.train.loop.batches import Batches, Images, refuse_uneven, splits_on
from faqd.train.loop.calibration_images import calibration_batches
from faqd.train.loop.distributed import ProcessGroup
from faqd.train.loop.fit import finish, fit
from faqd.train.loop.progress import reporting
from faqd.train.loop.select import Answers, kept_sentence, mean_losses
from faqd.train.loop.teacher_cache import TeacherCache, facts_of, refuse_uncacheable, summary, written_cache
from faqd.train.loop.teacher_forward import dtype_effect, target_of
from faqd.train.loop.trainer import Job, select_losses
from faqd.train.losses.heads import Heads, heads_from, heads_of
from faqd.train.losses.objective import distances_to, distill_job
from faqd.train.networks.own_tensors import own_tensors, put_tensors
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
from faqd.train.run.plan import Plan, plan_of
from faqd.train.run.prepared_student import PreparedStudent, measure_of, prepared_students, say_taps
from faqd.train.run.understood import training_in_words
from faqd.train.run.untrained_start import with_best_start

FLOAT64_PIXELS = 2**19
"""What a batch of the deployed student holds: its values have eight bytes, and all of a layer's are there at once."""
CONSTANT = 1.0
"""The distance of a student whose outputs never change, about."""
NOTHING_LEARNED = (
    "these weights are no nearer to the teacher than outputs that are the same for every image. Give it more bits, "
    "keep the layers float that lose most (--exclude), or give images on which the teacher finds something."
)
ROUNDING = 1e-4
"""By how much of their largest value outputs of one network may differ from run to run."""
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
    processes: ProcessGroup,
    deadline: float = math.inf,
    rehearse: Rehearsal | None = None,
    cache: Path | None = None,
) -> list[dict[str, Any]]:
    """Distil a student for every recipe and write each run into its folder. Returns their records.

    cache: the folder of `--cache-teacher`.
    rehearse: raises what would keep a student from being exported, before anything is trained or written.

    Students with one data seed, batch size and length learn side by side from one pass of the teacher; each ends as
    it would alone, to the last bit on a CPU. A finished one is left as it is. A loss that is no longer finite ends its
    own run; the error comes once the others are done. Paused at the deadline: see `fit`.
    """
    plans = [plan_of(recipe, out, lesson, taps) for recipe, out in members]
    if cache is not None:
        refuse_uncacheable(lesson.dataset.augmentation, plans[0].recipe.training)
    refuse_uneven(plans[0].recipe.training, len(lesson.dataset.train), processes)
    done = processes.from_rank_0(lambda: [is_done(plan.out, plan.record, resume) for plan in plans])
    for plan in (plan for plan, is_finished in zip(plans, done, strict=True) if is_finished):
        say(f"{plan.out}: this run is finished.")
    waiting = [plan for plan, is_finished in zip(plans, done, strict=True) if not is_finished]
    failed: dict[Path, UserError] = {}
    if waiting:
        train, select = splits_on(processes.device, lesson.dataset, plans[0].recipe.training.views)
        for _, together in groupby(sorted(waiting, key=_schedule), key=_schedule):
            failed |= _distill_together(
                list(together), lesson.teacher, train, select, taps, say, processes, deadline, rehearse, cache
            )
    if failed:
        raise _all_of(failed, len(plans))
    return processes.from_rank_0(lambda: [read_record(plan.out) for plan in plans])


@torch.no_grad()
def refuse_what_no_run_keeps(teacher: Teacher, images: Tensor) -> None:
    """UserError where the teacher, built again and given its tensors, as an export will, computes something else."""
    again = teacher.source.build()
    again.eval()
    try:
        put_tensors(again, own_tensors(teacher.network))
        found, wanted = (named_outputs(network(images)) for network in (again, teacher.network))
        pairs = [(found[name].double(), value.double()) for name, value in wanted.items()]
        same = all(bool((a - b).abs().max() <= ROUNDING * b.abs().max()) for a, b in pairs)
    except Exception:  # of the user's modules; keys that are others, for one
        same = False
    if not same:
        raise UserError(
            f"{teacher.source.name}: built again and given its tensors it computes something else. Loading its weights "
            "sets something beside tensors, or each build differs; let build() make all but the weights."
        )


def _all_of(failed: dict[Path, UserError], asked: int) -> UserError:
    if asked == 1:
        return next(iter(failed.values()))
    return UserError("\n".join(f"{run}: {error}" for run, error in failed.items()), exit_code=1)


def _schedule(plan: Plan) -> tuple[int | str, ...]:
    """What students must have in common to see the same batches, and the same teacher, to the end."""
    training = plan.recipe.training
    images = training.data_seed, training.batch_size, training.accumulate, training.decode
    schedule = *images, training.steps or 0, training.epochs
    return *schedule, plan.recipe.teacher_dtype


def _distill_together(
    plans: list[Plan],
    teacher: Teacher,
    train: Images,
    select: Images,
    taps: list[str] | None,
    say: Say,
    processes: ProcessGroup,
    deadline: float,
    rehearse: Rehearsal | None,
    cache: Path | None,
) -> dict[Path, UserError]:
    measures = [measure_of(plan.recipe, select) for plan in plans]
    images = train.normalised(train.pixels[:REHEARSED_IMAGES]).cpu().contiguous()
    refuse_what_no_run_keeps(teacher, images[:2])
    teacher_graph = capture(teacher.network, images[:2])
    prepared = prepared_students(plans, measures, teacher, teacher_graph, images[:2], taps, say)
    prepared = [with_best_start(one, train, select, say, processes) for one in prepared]
    theirs = [theirs for one in prepared for theirs, _ in one.pairs]
    training, dtype = plans[0].recipe.training, plans[0].recipe.teacher_dtype
    effect = _dtype_effect(dtype, teacher_graph, theirs, train, say, processes)
    shown = target_of(teacher_graph, theirs, processes.device, dtype)
    shares = training.accumulate, training.decode
    batches = Batches(train, select, training.batch_size, training.data_seed, shown, processes, *shares)
    say_taps(prepared, say)
    warn_of_taps(teacher_graph, theirs, images, say)
    for one in prepared:
        _calibrate(one, train, processes.device)
        if rehearse is not None and not (one.plan.out / RECORD).is_file():
            another = None if one.plan.source == teacher.source else teacher.network
            processes.from_rank_0(partial(rehearse, one.student, another, images, say))
    heads = heads_of(teacher_graph, lambda x: shown(x).outputs, calibration_batches(train, batches.part_size))
    outputs = {"outputs": {name: head.to_json() for name, head in heads.items()}}
    prepared = [replace(one, plan=_with_rate(one, heads, batches)) for one in prepared]
    cached: dict[str, Any] = {}
    if cache is not None:
        facts = facts_of(teacher.source.to_json(), teacher.sha256, dtype, train, theirs)
        kept = processes.from_rank_0(partial(written_cache, cache, facts, train, shown, batches, training, say))
        batches, cached = replace(batches, cache=TeacherCache(kept, processes.device)), {"teacher_cache": summary(kept)}
    for sentence in dict.fromkeys(text for one in prepared for text in _in_words(one, batches)):
        say(sentence)
    with ExitStack() as locks:
        if processes.is_rank_0:
            for plan in (one.plan for one in prepared):
                begin(plan.out, {**plan.record, **effect, **outputs, **cached})
                locks.enter_context(held(plan.out))
                write_tensors(plan.out / TEACHER_WEIGHTS, own_tensors(teacher.network))
        return _teach(prepared, batches, deadline, say)


def _in_words(one: PreparedStudent, batches: Batches) -> Iterator[str]:
    training = one.plan.recipe.training
    return training_in_words(one.student.network, training, batches.iterations(training), len(batches.train.pixels))


def _calibrate(one: PreparedStudent, train: Images, device: torch.device) -> None:
    student, recipe = one.student, one.plan.recipe
    student.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    method = one.plan.record.get("untrained", {}).get("calibration", recipe.calibration)
    calibrate(
        student,
        calibration_batches(train),
        "mse" if method == "auto" else method,
        batch_statistics=recipe.init == "scratch",
    )


def _teach(prepared: list[PreparedStudent], batches: Batches, deadline: float, say: Say) -> dict[Path, UserError]:
    """Train all of them and conclude their runs, but for those that it returns."""
    # As the run began: measured with another number of threads, the last bits differ.
    recorded = batches.processes.from_rank_0(lambda: [read_record(one.plan.out) for one in prepared])
    jobs = [_job(one, record) for one, record in zip(prepared, recorded, strict=True)]
    if len(jobs) > 1:
        jobs = [replace(job, title=job.run.name) for job in jobs]
    # Every start calibrates anew, resumed or not, so that these are the losses without training.
    untrained, _ = _selected(jobs, batches)
    failed, best = fit(jobs, batches, deadline)
    selected, broken = _selected([job for job in jobs if job.run not in failed], batches)
    failed |= broken
    for one in prepared:
        run = one.plan.out
        if run not in failed:
            results: dict[str, Any] = {
                "taps": one.taps,
                "select": selected[run],
                "select_untrained": untrained.get(run),
            }
            if batches.broken:
                results["broken_images"] = dict(sorted(batches.broken.items()))
            if run in best:
                results["kept"] = best[run].to_json()
                say(kept_sentence(run, best[run], batches.iterations(one.plan.recipe.training)))
                if _by_distance(one.plan.recipe) and best[run].measure >= CONSTANT:
                    say(f"{run}: {NOTHING_LEARNED}")
            batches.processes.from_rank_0(partial(_conclude, one, results, batches.train))
    for sentence in batches.in_words():
        say(sentence)
    return failed


def _by_distance(recipe: DistillRecipe) -> bool:
    """Whether the best weights are told by the distance of the outputs, about 1 for a student without a teacher."""
    return recipe.select is None and not recipe.label_weight and recipe.init != "scratch"


def _with_rate(one: PreparedStudent, heads: Heads, batches: Batches) -> Plan:
    """Its plan with the rate that suits how far the untrained student is from its teacher, where none was given."""
    plan, student = one.plan, one.student
    if plan.recipe.training.lr is not None:
        return plan
    student.network.eval()
    with torch.no_grad():
        parts: Answers = (((student.network(batch.x), []), batch) for batch in batches.selection())
        distances = mean_losses(parts, distances_to(heads), batches.data_seed).values()
    rate = relative_rate(sum(distances) / len(distances), plan.recipe.weight_bits)
    recipe = replace(plan.recipe, training=replace(plan.recipe.training, lr=rate))
    return replace(plan, recipe=recipe, record={**plan.record, "recipe": recipe_json(recipe)})


def _job(one: PreparedStudent, record: dict[str, Any]) -> Job:
    """record: of its run, which was begun."""
    recipe = one.plan.recipe
    training = replace(recipe.training, lr=record["recipe"]["training"]["lr"])
    plan = replace(one.plan, recipe=replace(recipe, training=training))
    return distill_job(plan, one.student, one.pairs, heads_from(record["outputs"]), one.measure)


def _selected(jobs: list[Job], batches: Batches) -> tuple[dict[Path, dict[str, float]], dict[Path, UserError]]:
    """The losses on the validation split by run, and the error where one is not finite."""
    found, failed = {}, {}
    for job in jobs:
        try:
            found[job.run] = select_losses(job, batches)
        except UserError as error:
            failed[job.run] = error
    return found, failed


def _dtype_effect(
    dtype: TeacherDtype, teacher: fx.GraphModule, taps: list[str], train: Images, say: Say, processes: ProcessGroup
) -> dict[str, Any]:
    """What the teacher loses in its dtype, as the record of a run has it; nothing for float32."""
    if dtype == "fp32":
        return {}
    places = {node.name: place for node, place in nodes.places(teacher).items()}
    effect = dtype_effect(
        teacher, {name: places[name] for name in taps}, list(calibration_batches(train)), processes.device, dtype
    )
    say(effect.sentence())
    return {"teacher_dtype": effect.to_json()}


def _conclude(one: PreparedStudent, results: dict[str, Any], train: Images) -> None:
    plan, student = one.plan, one.student
    if plan.recipe.act_bits != FLOAT_BITS:
        size = max(1, FLOAT64_PIXELS // math.prod(train.pixels.shape[2:]))
        results["output_scales"] = collect_output_scales(student, _reported(list(calibration_batches(train, size))))
    conclude(plan.out, results, student.network)
    finish(plan.out)


def _reported(parts: list[Tensor]) -> Iterator[Tensor]:
    with reporting(["output scales"], len(parts)) as report:
        for number, part in enumerate(parts, 1):
            yield part.cpu()
            report(number, {})
