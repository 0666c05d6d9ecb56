"""Distillation: a quantized student learns from the float teacher on images without labels (arXiv 2302.10899).

loss = logit_weight * distance of the outputs + affinity_weight * sum over taps of the feature-affinity distance.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from faqd.errors import UserError
from faqd.quant import FLOAT_BITS
from faqd.train import graph
from faqd.train.convert import collect_output_scales
from faqd.train.data import Say
from faqd.train.fuse import fused
from faqd.train.loop import NORMS, Images, Job, finish, fit, select_losses
from faqd.train.losses import affinity_loss, logit_loss
from faqd.train.network import NetworkSource, read_tensors, write_tensors
from faqd.train.placement import Bits
from faqd.train.prepare import Student, calibrate, prepare
from faqd.train.quantizers import SMALLEST_SCALE, ActivationQuantizer
from faqd.train.recipes import FROM_SCRATCH, FROM_TRAINED, DistillRecipe, recipe_json
from faqd.train.run import (
    TEACHER_WEIGHTS,
    WEIGHTS,
    asked_json,
    begin,
    conclude,
    data_json,
    fill,
    finished,
    is_done,
    load_exactly,
    read_record,
)
from faqd.train.source import Lesson, Teacher
from faqd.train.teacher import splits_on

CALIBRATION_IMAGES = 512
QUANTIZED = "_quant"
"""What the place of a tensor has at its end where the tensor is rounded."""


def distill(
    recipe: DistillRecipe,
    lesson: Lesson,
    taps: list[str] | None,
    out: Path,
    device: torch.device,
    resume: bool,
    say: Say,
) -> dict[str, Any]:
    """Distil a student and write the run. Returns its record, with the losses on the select split."""
    teacher = lesson.teacher
    source = student_source(recipe, teacher)
    recipe = _resolved(recipe, lesson, source)
    record = _record(recipe, lesson, source, taps)
    if is_done(out, record, resume):
        say(f"{out}: this run is finished.")
        return read_record(out)
    train, select = splits_on(device, lesson.dataset)
    example = train.normalised(train.pixels[:2]).cpu().contiguous()
    teacher_graph = graph.capture(teacher.network, example)
    student = new_student(recipe, source, teacher, example)
    pairs = _chosen_taps(recipe, teacher_graph, student, taps)
    for line in tap_names(teacher_graph, student, pairs):
        say(f"affinity tap: {line}")
    if recipe.affinity != "none" and not pairs:
        say("no affinity: no feature map has one size in both networks; --tap TEACHER=STUDENT says what to compare.")
    student.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    calibrate(student, _batches(train), "mse", batch_statistics=recipe.init == "scratch")
    begin(out, record)
    write_tensors(out / TEACHER_WEIGHTS, teacher.network.state_dict())
    job = distill_job(recipe, student, teacher_graph, pairs, train, select, device)
    fit(job, out)
    results: dict[str, Any] = {"taps": tap_names(teacher_graph, student, pairs), "select": select_losses(job)}
    if recipe.act_bits != FLOAT_BITS:
        results["output_scales"] = collect_output_scales(student, (batch.cpu() for batch in _batches(train)))
    record = conclude(out, results, student.network)
    finish(out)
    return record


def _resolved(recipe: DistillRecipe, lesson: Lesson, source: NetworkSource) -> DistillRecipe:
    """`recipe` with what the teacher and the data decide: nothing that a reader of the run would have to guess."""
    same = source == lesson.teacher.source
    if recipe.init == "teacher" and not same:
        raise UserError("--init teacher: student and teacher are different networks; use --init scratch.")
    init = recipe.init or ("teacher" if same else "scratch")
    usual = FROM_SCRATCH if init == "scratch" else FROM_TRAINED
    unset = {name: value for name, value in usual.items() if getattr(recipe.training, name) is None}
    training = replace(recipe.training, **unset)
    return replace(recipe, data=lesson.data.source, arch=source.architecture, init=init, training=training)


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


def student_source(recipe: DistillRecipe, teacher: Teacher) -> NetworkSource:
    """The student's network: the teacher's own, or --arch with the teacher's number of outputs."""
    if recipe.arch is None or recipe.arch == teacher.source.architecture:
        return teacher.source
    with torch.no_grad():
        outputs = teacher.network(teacher.source.example())
    if outputs.dim() != 2:
        raise UserError("--arch: the teacher has no single vector of class scores that the zoo could imitate.")
    return NetworkSource(teacher.source.channels, teacher.source.pixels, outputs.shape[1], architecture=recipe.arch)


def new_student(recipe: DistillRecipe, source: NetworkSource, teacher: Teacher, example: Tensor) -> Student:
    """The student before training: the teacher's weights, fresh ones, or those of the run `recipe.init` names."""
    torch.manual_seed(recipe.training.seed)
    network = source.build()
    if recipe.init == "teacher":
        network.load_state_dict(teacher.network.state_dict())
    elif recipe.init != "scratch":
        _load_float(network, source, Path(str(recipe.init)))
    return prepare(graph.capture(network, example), recipe_bits(recipe), example)


def _load_float(network: nn.Module, source: NetworkSource, folder: Path) -> None:
    """Fill `network` with the float weights of a finished run of either kind, whatever its bits were."""
    if not folder.is_dir():
        raise UserError(f"--init {folder}: expected teacher, scratch or the folder of a run.")
    if NetworkSource.from_json(finished(folder)["network"]) != source:
        raise UserError(f"--init {folder}: that run trained another network than {source.name}.")
    state = read_tensors(folder / WEIGHTS)
    latent = {key.replace(".parametrizations.weight.original", ".weight"): value for key, value in state.items()}
    wanted = network.state_dict()
    fill(network, {key: value for key, value in latent.items() if key in wanted}, folder / WEIGHTS)


def recipe_bits(recipe: DistillRecipe) -> Bits:
    return Bits(recipe.weight_bits, recipe.act_bits, recipe.target, recipe.scales == "channel")


def load_student(folder: Path) -> Student:
    """The trained student of a finished distillation run, in evaluation mode."""
    record = read_record(folder)
    if record["kind"] != "distill":
        raise UserError(f"{folder}: holds a teacher; distil a student from it first, or use `faqd-deploy ptq`.")
    source = NetworkSource.from_json(record["network"])
    asked = record["recipe"]
    bits = Bits(asked["weight_bits"], asked["act_bits"], asked["target"], asked["scales"] == "channel")
    student = prepare(graph.capture(source.build(), source.example()), bits, source.example())
    load_exactly(student.network, folder / WEIGHTS)
    student.network.eval()
    return student


def _chosen_taps(
    recipe: DistillRecipe, teacher: fx.GraphModule, student: Student, names: list[str] | None
) -> list[tuple[str, str]]:
    if recipe.affinity != "none":
        return tap_pairs(teacher, student, names)
    if names:
        raise UserError(f"--tap {names[0]}: nothing is compared there with --affinity none; leave one of them out.")
    return []


def tap_pairs(teacher: fx.GraphModule, student: Student, names: list[str] | None) -> list[tuple[str, str]]:
    """Pairs of node names (teacher, student) whose feature maps are compared.

    names None: the last activated map of each size, where both networks have one of that size. Otherwise what --tap
    gives, each `PLACE` in both networks or `TEACHER_PLACE=STUDENT_PLACE`.
    """
    if names is None:
        ours, theirs = _last_maps(student.network), _last_maps(teacher)
        return [(theirs[size], ours[size]) for size in theirs if size in ours]
    pairs = []
    for name in names:
        theirs_name, _, ours_name = name.partition("=")
        pairs.append((_map_at(teacher, theirs_name), _map_at(student.network, ours_name or theirs_name)))
    return pairs


def tap_names(teacher: fx.GraphModule, student: Student, pairs: list[tuple[str, str]]) -> list[str]:
    """The pairs as --tap takes them: places of the teacher and of the student, `TEACHER=STUDENT` where they differ."""
    theirs, ours = (
        {node.name: name.removesuffix(QUANTIZED) for node, name in graph.places(network).items()}
        for network in (teacher, student.network)
    )
    return [theirs[a] if theirs[a] == ours[b] else f"{theirs[a]}={ours[b]}" for a, b in pairs]


def _last_maps(network: fx.GraphModule) -> dict[tuple[int, int], str]:
    """Size (H, W) -> name of the last activated feature map of that size, in graph order; one pixel is no map."""
    found: dict[tuple[int, int], str] = {}
    for node in network.graph.nodes:
        if not graph.is_tensor(node) or len(graph.shape(node)) != 4:
            continue
        module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
        activated = graph.role(network, node) == "rectify"
        if isinstance(module, ActivationQuantizer):
            activated = not module.quant.signed
        size = graph.shape(node)[2:]
        if activated and size != (1, 1):
            found.pop((size[0], size[1]), None)
            found[size[0], size[1]] = node.name
    return found


def _map_at(network: fx.GraphModule, place: str) -> str:
    maps = {
        name: node.name
        for node, name in graph.places(network).items()
        if graph.is_tensor(node) and len(graph.shape(node)) == 4
    }
    for candidate in (place + QUANTIZED, place):
        if candidate in maps:
            return maps[candidate]
    close = difflib.get_close_matches(place, [name.removesuffix(QUANTIZED) for name in maps], n=3, cutoff=0.0)
    raise UserError(f"--tap {place}: no feature map of that name in the network; the nearest are {', '.join(close)}.")


def distill_job(
    recipe: DistillRecipe,
    student: Student,
    teacher: fx.GraphModule,
    pairs: list[tuple[str, str]],
    train: Images,
    select: Images,
    device: torch.device,
) -> Job:
    """What `fit` trains: the student's parameters in two groups, and the weighted terms of the loss.

    Norms, biases and activation scales do not decay. pairs: nodes (teacher, student) whose maps are compared.
    """
    tapped_student = graph.with_taps(student.network, [ours for _, ours in pairs])
    tapped_teacher = fused(graph.with_taps(teacher, [theirs for theirs, _ in pairs]))
    tapped_teacher.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def losses(x: Tensor, labels: Tensor | None, generator: torch.Generator) -> dict[str, Tensor]:
        with torch.no_grad():
            wanted, their_maps = tapped_teacher(x)
        outputs, our_maps = tapped_student(x)
        terms = {"logit": recipe.logit_weight * logit_loss(outputs, wanted, recipe.logit, recipe.temperature)}
        if pairs and recipe.affinity != "none":
            distances = [
                affinity_loss(ours, theirs, recipe.affinity, columns=recipe.columns, generator=generator)
                for ours, theirs in zip(our_maps, their_maps, strict=True)
            ]
            terms["affinity"] = recipe.affinity_weight * torch.stack(distances).sum()
        return terms

    scales = [quantizer.scale for quantizer in student.quantizers().values()]
    norms = [p for m in student.network.modules() if isinstance(m, NORMS) for p in m.parameters()]
    free_ids = {id(p) for p in [*scales, *norms]}
    decayed = [p for p in student.network.parameters() if id(p) not in free_ids and p.dim() > 1]
    free = [p for p in student.network.parameters() if id(p) in free_ids or p.dim() <= 1]

    @torch.no_grad()
    def keep_scales_positive() -> None:
        for scale in scales:
            scale.clamp_min_(SMALLEST_SCALE)

    return Job(
        f"distill {recipe.weight_bits}/{recipe.act_bits}",
        tapped_student,
        decayed,
        free,
        losses,
        keep_scales_positive,
        train,
        select,
        recipe.training,
    )


def _batches(images: Images) -> Iterator[Tensor]:
    for pixels in images.pixels[:CALIBRATION_IMAGES].split(128):
        yield images.normalised(pixels)
