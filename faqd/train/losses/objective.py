"""What a student is trained for: the terms of its loss, the measure of the best weights, and what learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from faqd.quantize.outputs import named_outputs
from faqd.quantize.student import Student
from faqd.train.loop.accumulate import Losses
from faqd.train.loop.batches import Batch, Target
from faqd.train.loop.select import Answers, Measure, mean_losses
from faqd.train.loop.trainer import Job
from faqd.train.losses.adaptors import Adapted
from faqd.train.losses.correlation import Correlation, beyond_a_constant
from faqd.train.losses.distillation import affinity_loss, logit_loss
from faqd.train.losses.heads import Heads, distance
from faqd.train.losses.layouts import with_maps
from faqd.train.losses.taps import tap_layouts
from faqd.train.recipes import Autocast, DistillRecipe
from faqd.train.run.plan import Plan

Pairs = list[tuple[str, str]]
"""Nodes (teacher, student) whose maps are compared."""
AUTOCAST: dict[Autocast, torch.dtype | None] = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def distill_job(
    plan: Plan,
    student: Student,
    pairs: Pairs,
    heads: Heads | None = None,
    users: Measure | None = None,
) -> Job:
    """What `fit` trains: the student's parameters in two groups, and the weighted terms of the loss.

    heads: of the teacher; without them there is no relative distance, and the last weights are kept. users: the measure
    of --select, instead of the distance of the outputs, or of the whole loss where labels count.
    """
    recipe = plan.recipe
    network = _answering(student, recipe, pairs)
    losses = _losses_of(recipe, pairs, heads)
    quantizers = student.quantizers().values()
    decayed, free = decay_groups(network)
    relative = recipe.training.optimizer == "relative"

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
        balanced={"logit": recipe.logit_weight, "affinity": recipe.affinity_weight} if relative else {},
        measure=None if heads is None or recipe.init == "scratch" else users or _measure_of(recipe, losses, heads),
    )


def _answering(student: Student, recipe: DistillRecipe, pairs: Pairs) -> nn.Module:
    """The student, which gives its outputs and the maps of the pairs."""
    network: nn.Module = with_maps(student.network, [ours for _, ours in pairs])
    if recipe.adaptors and pairs:
        layouts = tap_layouts(student, pairs)
        device = next(student.network.parameters()).device
        signed = [place for place, layout in enumerate(layouts) if layout.kind != "map"]
        network = Adapted(network, [layout.channels for layout in layouts], device, signed)
    return network


def _losses_of(
    recipe: DistillRecipe, pairs: Pairs, heads: Heads | None
) -> Callable[[Any, Batch, torch.Generator], Losses]:
    def losses(answer: Any, batch: Batch, generator: torch.Generator) -> Losses:
        outputs, maps = answer
        target = batch.target
        assert target is not None
        terms: Losses = {}
        if recipe.logit_weight:
            found = _logit_distances(recipe, named_outputs(outputs), target, heads)
            for name, value in found.items():
                terms["logit" if len(found) == 1 else f"logit {name}"] = recipe.logit_weight * value
        if recipe.affinity != "none" and pairs:
            terms["affinity"] = recipe.affinity_weight * _affinity(recipe, maps, target, pairs, generator)
        if recipe.label_weight:
            assert batch.labels is not None
            # Autocast leaves the outputs in half precision.
            terms["label"] = recipe.label_weight * functional.cross_entropy(outputs.float(), batch.labels)
        return terms

    return losses


def _measure_of(
    recipe: DistillRecipe, losses: Callable[[Any, Batch, torch.Generator], Losses], heads: Heads
) -> Measure:
    """The distance of the outputs and beyond 1 their correlation, or the whole loss where labels count."""

    def measure(answers: Answers) -> float:
        if recipe.label_weight:
            return sum(mean_losses(answers, losses, recipe.training.data_seed).values())
        correlation = Correlation(heads)
        values = mean_losses(_seen(answers, correlation), distances_to(heads), recipe.training.data_seed).values()
        return beyond_a_constant(sum(values) / len(values), correlation.value())

    return measure


def _seen(answers: Answers, correlation: Correlation) -> Answers:
    for answer, batch in answers:
        assert batch.target is not None
        correlation.see(named_outputs(answer[0]), batch.target.outputs)
        yield answer, batch


def _logit_distances(
    recipe: DistillRecipe, outputs: Mapping[str, Tensor], target: Target, heads: Heads | None
) -> dict[str, Tensor]:
    """The distance of each output, by its name."""
    if recipe.logit == "relative":
        assert heads is not None
        return distance(outputs, target.outputs, heads)
    form = recipe.logit or "mse"
    return {
        name: logit_loss(output, target.outputs[name], form, recipe.temperature) for name, output in outputs.items()
    }


def distances_to(heads: Heads | None) -> Callable[[Any, Batch, torch.Generator], Losses]:
    """What `mean_losses` takes: the distance of every output."""

    def distances(answer: Any, batch: Batch, generator: torch.Generator) -> Losses:
        assert heads is not None and batch.target is not None
        return distance(named_outputs(answer[0]), batch.target.outputs, heads)

    return distances


def _affinity(
    recipe: DistillRecipe, maps: Sequence[Tensor], target: Target, pairs: Pairs, generator: torch.Generator
) -> Tensor:
    """The sum over taps of the affinity distance."""
    assert recipe.affinity != "none"
    options: dict[str, Any] = {"floor": recipe.affinity_floor, "columns": recipe.columns, "generator": generator}
    distances = [
        affinity_loss(ours, target.maps[theirs], recipe.affinity, **options)
        for ours, (theirs, _) in zip(maps, pairs, strict=True)
    ]
    return torch.stack(distances).sum()


def decay_groups(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What is trained, with and without weight decay: the float weights of layers have it.

    Norms, biases and activation scales do not: none of them has a direction in which smaller is simpler, and a scale
    that shrinks clips.
    """
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for parameter in filter(lambda parameter: parameter.requires_grad, network.parameters()):
        groups[parameter.dim() <= 1].append(parameter)
    return groups
