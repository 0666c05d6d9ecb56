"""Distillation: a quantized student learns from the float teacher on images without labels (arXiv 2302.10899).

loss = logit_weight * distance of the outputs + affinity_weight * sum over taps of the feature-affinity distance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from faqd.errors import UserError
from faqd.files import read_json, write_json
from faqd.quant import FLOAT_BITS
from faqd.train import graph
from faqd.train.convert import collect_output_scales
from faqd.train.data import DataOptions, load_dataset
from faqd.train.loop import NORMS, Images, Job, finish, fit, select_losses
from faqd.train.losses import affinity_loss, logit_loss
from faqd.train.network import NetworkSource
from faqd.train.placement import Bits
from faqd.train.prepare import Student, calibrate, prepare
from faqd.train.quantizers import SMALLEST_SCALE, ActivationQuantizer
from faqd.train.recipes import DistillRecipe, recipe_json
from faqd.train.run import RECORD, TEACHER_WEIGHTS, WEIGHTS, claim, data_json, load_exactly, read_record, save_weights
from faqd.train.teacher import Say, splits_on

CALIBRATION_IMAGES = 512


@dataclass(frozen=True)
class Teacher:
    """A float network in evaluation mode, where it came from, and the SHA-256 of its weights."""

    network: nn.Module
    source: NetworkSource
    sha256: str


def distill(
    recipe: DistillRecipe,
    teacher: Teacher,
    data: DataOptions,
    taps: list[str] | None,
    out: Path,
    device: torch.device,
    resume: bool,
    say: Say,
) -> dict[str, Any]:
    """Distil a student and write the run. Returns its record, with the losses on the select split."""
    dataset = load_dataset(data, with_labels=False, say=say)
    images = dataset.train.images
    if images.shape[3] != teacher.source.channels:
        raise UserError(
            f"--data {data.source}: images have {images.shape[3]} channels, the teacher reads "
            f"{teacher.source.channels}; see --channels."
        )
    source = student_source(recipe, teacher.source, (images.shape[1], images.shape[2]))
    asked = {
        "recipe": recipe_json(recipe),
        "data": data_json(data),
        "teacher_sha256": teacher.sha256,
        "student": source.to_json(),
        "taps": taps,
    }
    record: dict[str, Any] = {
        "kind": "distill",
        "asked": asked,
        "recipe": recipe_json(recipe),
        "data": data_json(data),
        "network": source.to_json(),
        "teacher": teacher.source.to_json(),
        "teacher_sha256": teacher.sha256,
        "preprocess": dataset.preprocess.to_json(),
    }
    if claim(out, record, resume):
        say(f"{out}: this run is finished.")
        return dict(read_json(out / RECORD))
    train, select = splits_on(device, dataset)
    example = train.normalised(train.pixels[:2]).cpu().contiguous()
    teacher_graph = graph.capture(teacher.network, example)
    same = recipe.init != "scratch" and source == teacher.source
    student = new_student(recipe, source, teacher, example, same)
    student.network.to(device, memory_format=torch.channels_last)
    calibrate(student, _batches(train), "mse", batch_statistics=not (same or recipe.init not in (None, "scratch")))
    pairs = tap_pairs(teacher_graph, student, taps) if recipe.affinity != "none" else []
    for teacher_tap, student_tap in pairs:
        say(f"affinity tap: teacher {teacher_tap}, student {student_tap}")
    job = _job(recipe, student, teacher_graph, pairs, train, select, device)
    save_weights(out / TEACHER_WEIGHTS, teacher.network)
    fit(job, out)
    record["taps"] = [list(pair) for pair in pairs]
    record["select"] = select_losses(job)
    if recipe.act_bits != FLOAT_BITS:
        record["output_scales"] = collect_output_scales(student, (batch.cpu() for batch in _batches(train)))
    save_weights(out / WEIGHTS, student.network)
    record = {**read_json(out / RECORD), **record}
    write_json(out / RECORD, record)
    finish(out)
    return record


def student_source(recipe: DistillRecipe, teacher: NetworkSource, pixels: tuple[int, int]) -> NetworkSource:
    """The student's network: the teacher's own, or --arch with the teacher's number of outputs."""
    if recipe.arch is None or recipe.arch == teacher.architecture:
        return NetworkSource.from_json({**teacher.to_json(), "pixels": pixels})
    classes = teacher.classes
    if classes == 0:
        with torch.no_grad():
            outputs = teacher.build().eval()(teacher.example())
        if not isinstance(outputs, Tensor) or outputs.dim() != 2:
            raise UserError("--arch: the teacher has no single vector of class scores that the zoo could imitate.")
        classes = outputs.shape[1]
    return NetworkSource(teacher.channels, pixels, classes, architecture=recipe.arch)


def new_student(
    recipe: DistillRecipe, source: NetworkSource, teacher: Teacher, example: Tensor, from_teacher: bool
) -> Student:
    """The student before training: the teacher's weights, fresh ones, or those of the run `recipe.init` names."""
    bits = recipe_bits(recipe)
    if recipe.init not in (None, "teacher", "scratch"):
        folder = Path(str(recipe.init))
        found = read_record(folder)
        if found["network"] != source.to_json():
            raise UserError(f"--init {folder}: that run trained another network.")
        network = source.build()
        if found["kind"] == "teacher":
            load_exactly(network, folder / WEIGHTS)
            return prepare(graph.capture(network, example), bits, example)
        student = prepare(graph.capture(network, example), bits, example)
        load_exactly(student.network, folder / WEIGHTS)
        return student
    if recipe.init == "teacher" and not from_teacher:
        raise UserError("--init teacher: student and teacher are different networks; use --init scratch.")
    torch.manual_seed(recipe.training.seed)
    network = source.build()
    if from_teacher:
        network.load_state_dict(teacher.network.state_dict())
    return prepare(graph.capture(network, example), bits, example)


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


def tap_pairs(teacher: fx.GraphModule, student: Student, names: list[str] | None) -> list[tuple[str, str]]:
    """(teacher node, student node) of the feature maps that are compared: the last of each resolution both have.

    names: places to use instead, each `PLACE` in both networks or `TEACHER_PLACE=STUDENT_PLACE`.
    """
    if names is None:
        ours, theirs = _last_maps(student.network), _last_maps(teacher)
        return [(theirs[size], ours[size]) for size in theirs if size in ours]
    pairs = []
    for name in names:
        theirs_name, _, ours_name = name.partition("=")
        pairs.append((_node_at(teacher, theirs_name), _node_at(student.network, ours_name or theirs_name)))
    return pairs


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


def _node_at(network: fx.GraphModule, place: str) -> str:
    by_place = {name: node for node, name in graph.places(network).items()}
    for candidate in (f"{place}_quant", place):
        if candidate in by_place:
            return by_place[candidate].name
    raise UserError(f"--tap {place}: no such place in the network; `faqd-train inspect` lists them.")


def _job(
    recipe: DistillRecipe,
    student: Student,
    teacher: fx.GraphModule,
    pairs: list[tuple[str, str]],
    train: Images,
    select: Images,
    device: torch.device,
) -> Job:
    tapped_student = graph.with_taps(student.network, [ours for _, ours in pairs])
    tapped_teacher = graph.with_taps(fuse(teacher), [theirs for theirs, _ in pairs])
    tapped_teacher.eval().to(device, memory_format=torch.channels_last)

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
