"""Distillation as a module, for a training loop of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from faqd.quantize import nodes
from faqd.quantize.capture.capture import capture
from faqd.quantize.outputs import named_outputs
from faqd.quantize.student import Student
from faqd.train.loop.batches import Target
from faqd.train.loop.teacher_forward import target_of
from faqd.train.losses.distillation import LogitForm, affinity_loss, logit_loss
from faqd.train.losses.heads import Heads, distance, heads_of
from faqd.train.losses.layouts import with_maps
from faqd.train.losses.taps import tap_names, tap_pairs
from faqd.train.recipes import distill_default

if TYPE_CHECKING:
    from faqd.train.recipes import DistillAffinity

_DEFAULTS = distill_default()


class DistillationLoss(nn.Module):
    """How far a student is from its float teacher on unlabelled images: outputs, and feature affinity
    (arXiv 2302.10899).

    teacher: the trained float network. feature_layers: those whose maps are compared, by module path, `LAYER` or
    `TEACHER_LAYER=STUDENT_LAYER`; by default the neck's map of each resolution, else the last activated one, of tokens
    the last sum, as `feature_layers` then names them. logit: `relative` is the squared error in units of the teacher's
    variance on the first batch. Each term is divided by what it was on the first batch, so that a weight of 1 means the
    same for every network: untrained, the loss is the sum of the weights. `terms` holds the undivided terms of the last
    call, as floats.

        loss = faqd.DistillationLoss(teacher, student)
        loss(images).backward()

    Under DistributedDataParallel it is this module that is wrapped.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: Student,
        *,
        feature_layers: Sequence[str] | None = None,
        logit: LogitForm = "relative",
        affinity: DistillAffinity = "l2",
        logit_weight: float = 1.0,
        affinity_weight: float = 1.0,
        temperature: float = 4.0,
    ) -> None:
        super().__init__()
        example = _example(student)
        mode = teacher.training
        self._teacher: fx.GraphModule
        self.__dict__["_teacher"] = traced = capture(teacher, example)
        teacher.train(mode)
        named = None if feature_layers is None else list(feature_layers)
        self._pairs = [] if affinity == "none" else tap_pairs(traced, student, named)
        self.feature_layers = tap_names(traced, student, self._pairs)
        self.student = student
        self._forms = logit, affinity
        self._weights = {"logit": logit_weight, "affinity": affinity_weight}
        self._temperature = temperature
        self._heads: Heads | None = None
        self._untrained: dict[str, Tensor] = {}
        self._on: dict[torch.device, tuple[fx.GraphModule, Callable[[Tensor], Target]]] = {}
        self._generator = torch.Generator().manual_seed(0)
        self.terms: dict[str, float] = {}
        for quantizer in student.quantizers().values():
            quantizer.step = _DEFAULTS.scale_step

    def forward(self, images: Tensor) -> Tensor:
        """The loss, a scalar, of network input (N, C, H, W); the teacher receives no gradient."""
        tapped, teach = self._networks(images.device)
        target = teach(images)
        if self._heads is None:
            self._heads = heads_of(self._teacher, lambda x: target.outputs, [images])
        returned, maps = tapped(images)
        outputs = named_outputs(returned)
        logit, affinity = self._forms
        if logit == "relative":
            distances = distance(outputs, target.outputs, self._heads)
        else:
            distances = {
                name: logit_loss(output, target.outputs[name], logit, self._temperature)
                for name, output in outputs.items()
            }
        terms = {"logit": torch.stack(list(distances.values())).sum()}
        if self._pairs and affinity != "none":
            options: dict[str, Any] = {"floor": _DEFAULTS.affinity_floor, "generator": self._generator}
            terms["affinity"] = torch.stack(
                [
                    affinity_loss(ours, target.maps[theirs], affinity, **options)
                    for ours, (theirs, _) in zip(maps, self._pairs, strict=True)
                ]
            ).sum()
        for name, value in terms.items():
            tiny = torch.finfo(value.dtype).tiny
            self._untrained.setdefault(name, value.detach().clamp_min(tiny))
        self.terms = {name: float(value.detach()) for name, value in terms.items()}
        shares = [self._weights[name] * value / self._untrained[name] for name, value in terms.items()]
        return torch.stack(shares).sum()

    def _networks(self, device: torch.device) -> tuple[fx.GraphModule, Callable[[Tensor], Target]]:
        """The student with its maps, and what the teacher makes of a batch, on the device of the images."""
        if device not in self._on:
            tapped = with_maps(self.student.network, [ours for _, ours in self._pairs])
            self._on[device] = tapped, target_of(self._teacher, [theirs for theirs, _ in self._pairs], device)
        return self._on[device]


def _example(student: Student) -> Tensor:
    """Zeros of the size that the student was prepared for, where it is."""
    (image,) = (node for node in student.network.graph.nodes if node.op == "placeholder")
    return torch.zeros(nodes.shape(image), device=next(student.parameters()).device)
