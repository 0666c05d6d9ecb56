"""What the outputs of a teacher are made of, and how far a student is from them in units of that.

Nothing is known of the task. Where an output is a concatenation, each operand is a branch; what comes out of a sigmoid
or a softmax are probabilities. Everything else are figures of the teacher's outputs on unlabelled images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from faqd.fidelity import LEAST_SHARE, Branch
from faqd.quantize.branches import branches_of


@dataclass(frozen=True)
class Head:
    """An output. certainty: mean over images and places of the teacher's certainty, see `certainties`; None where the
    output's places have none."""

    branches: tuple[Branch, ...]
    certainty: float | None = None

    def to_json(self) -> dict[str, Any]:
        branches = [{**branch.to_json(), "variance": list(branch.variance)} for branch in self.branches]
        return {"branches": branches, "certainty": self.certainty}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Head:
        return cls(tuple(map(Branch.from_json, record["branches"])), record["certainty"])


Heads = dict[str, Head]
"""By the name of the output."""


def heads_from(record: Mapping[str, Any]) -> Heads:
    """The heads that a run recorded."""
    return {name: Head.from_json(head) for name, head in record.items()}


def distance(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], heads: Heads) -> dict[str, Tensor]:
    """By output, the squared error over the teacher's variance: a constant student would have about 1.

    Outputs (B, C, ...). The mean over branches of the mean over channels, images and places, where a place, or an image
    that has none, counts by the teacher's certainty there; only a gate counts everywhere alike. The teacher receives no
    gradient; the arithmetic is float32, or float64 where an input is.
    """
    teacher = {name: output.detach() for name, output in teacher.items()}
    certainty = certainties(teacher, heads)
    found = {}
    for name, head in heads.items():
        ours, theirs = student[name], teacher[name]
        if ours.dtype != torch.float64:
            ours, theirs = ours.float(), theirs.to(torch.promote_types(theirs.dtype, torch.float32))
        square = (ours - theirs).square()
        weight = None if head.certainty is None else certainty[theirs.shape[2:]] / head.certainty
        parts = []
        for branch in head.branches:
            part = square[:, branch.start : branch.end]
            variance = part.new_tensor(branch.variance).view(-1, *[1] * (part.dim() - 2))
            part = part / variance
            parts.append((part if weight is None or branch.gate else part * weight).mean())
        found[name] = torch.stack(parts).mean()
    return found


def certainties(teacher: Mapping[str, Tensor], heads: Heads) -> dict[torch.Size, Tensor]:
    """How sure the teacher is that there is something: (B, 1, ...) by the size of the places.

    The geometric mean, over all branches of probabilities with these places, of the greatest of each: for a detector
    the root of objectness times best class. A size without probabilities has no entry.
    """
    greatest: dict[torch.Size, list[Tensor]] = {}
    for name, head in heads.items():
        for branch in (branch for branch in head.branches if branch.probability):
            output = teacher[name]
            greatest.setdefault(output.shape[2:], []).append(
                output[:, branch.start : branch.end].amax(1, keepdim=True).clamp_min(0)
            )
    return {size: torch.stack(each).log().mean(0).exp() for size, each in greatest.items()}


@torch.no_grad()
def heads_of(
    network: fx.GraphModule, outputs_of: Callable[[Tensor], Mapping[str, Tensor]], batches: Iterable[Tensor]
) -> Heads:
    """The heads of the captured teacher `network`, with figures of its outputs on unlabelled batches (B, C, H, W)."""
    heads = {name: Head(branches) for name, branches in branches_of(network).items()}
    sums: dict[str, list[Tensor]] = {}
    sure: dict[str, list[Tensor]] = {name: [] for name in heads}
    for batch in batches:
        outputs = {name: output.double() for name, output in outputs_of(batch).items()}
        certainty = certainties(outputs, heads)
        for name, output in outputs.items():
            columns = output.transpose(0, 1).flatten(1)
            new = [torch.full_like(columns[:, 0], columns.shape[1]), columns.sum(1), columns.square().sum(1)]
            sums[name] = [a + b for a, b in zip(sums[name], new, strict=True)] if name in sums else new
            if output.shape[2:] in certainty:
                sure[name].append(certainty[output.shape[2:]].flatten())
    found = {}
    for name, head in heads.items():
        count, total, square = sums[name]
        variance = (square / count - (total / count).square()).clamp_min(0)
        branches = tuple(_with_variance(branch, variance[branch.start : branch.end]) for branch in head.branches)
        mean = float(torch.cat(sure[name]).mean()) if sure[name] else 0.0
        found[name] = Head(branches, mean if mean > 0 else None)
    return found


def _with_variance(branch: Branch, variance: Tensor) -> Branch:
    mean = variance.mean()
    if mean == 0:  # the teacher always says the same
        mean, variance = torch.ones_like(mean), torch.ones_like(variance)
    values = [float(mean)] if branch.probability else variance.clamp_min(LEAST_SHARE * mean).tolist()
    return Branch(branch.start, branch.end, branch.probability, tuple(values))
