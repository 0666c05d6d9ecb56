"""The best weights of a run: when they are looked for, by what measure, and keeping them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from faqd.errors import UserError
from faqd.quantize.outputs import named_outputs
from faqd.train.loop.batches import SELECTION, Batch, Batches, stream
from faqd.train.networks.own_tensors import own_tensors
from faqd.train.networks.source import user_function

Answers = Iterator[tuple[Any, Batch]]
"""What a network returns for the validation split, part by part, and each part."""
Measure = Callable[[Answers], float]
"""How far a network is from what is wanted: the least is the best."""

LOOKS = 8
"""Looks that are spread evenly over a run; before the first of them come those after 1, 2, 4, 8 ... iterations."""


def is_due(iteration: int, total: int) -> bool:
    """Whether the validation split is looked at after this iteration of `total`."""
    even = -(-total // LOOKS)
    return iteration in (0, total) or iteration % even == 0 or (iteration < even and iteration & (iteration - 1) == 0)


@dataclass
class Best:
    """The weights that were best so far. first, last: the measure before training and at the last look."""

    iteration: int = 0
    measure: float = math.inf
    first: float = math.inf
    last: float = math.inf
    weights: dict[str, Tensor] = field(default_factory=dict)

    def see(self, iteration: int, measure: float, network: nn.Module) -> None:
        """A look at `network` after `iteration`. What is no number is never the best."""
        self.last = measure if math.isfinite(measure) else math.inf
        if not self.weights:
            self.first = self.last
        if not self.weights or self.last < self.measure:
            self.iteration, self.measure = iteration, self.last
            self.weights = {name: value.detach().clone() for name, value in own_tensors(network).items()}

    def to_json(self) -> dict[str, Any]:
        """What a record or a checkpoint says of it; None stands for a measure that was no number."""
        found = {"iteration": self.iteration, "measure": self.measure, "untrained": self.first, "last": self.last}
        return {name: value if math.isfinite(value) else None for name, value in found.items()}

    @classmethod
    def from_json(cls, record: dict[str, Any], weights: dict[str, Tensor]) -> Best:
        best, first, last = (
            math.inf if record[name] is None else float(record[name]) for name in ("measure", "untrained", "last")
        )
        return cls(record["iteration"], best, first, last, weights)


@torch.no_grad()
def answers(network: nn.Module, batches: Batches) -> Answers:
    """What `network` in evaluation mode makes of the validation split."""
    network.eval()
    for batch in batches.selection():
        yield network(batch.x), batch


def mean_losses(
    answers: Answers, losses: Callable[[Any, Batch, torch.Generator], dict[str, Tensor]], data_seed: int
) -> dict[str, float]:
    """The mean over all images of every term of `losses` (answer, batch, private generator)."""
    sums: dict[str, float] = {}
    images = 0
    for number, (answer, batch) in enumerate(answers):
        terms = losses(answer, batch, stream(data_seed, SELECTION, number))
        images += len(batch.x)
        sums = {name: sums.get(name, 0.0) + len(batch.x) * float(value) for name, value in terms.items()}
    return {name: value / images for name, value in sums.items()}


def users_measure(spec: str, images_NHWC: Any) -> Measure:
    """`--select FILE.py:function`: function(outputs, found) returns a number of which the largest is the best.

    As for the bench's --metric, outputs maps names to arrays, and found holds the `images` (N, H, W, C uint8) and
    `teacher`, its outputs. Labels are not in it. UserError where the function fails or returns something else.
    """
    function = user_function(spec, "--select")

    def measure(answers: Answers) -> float:
        ours: dict[str, list[Any]] = {}
        theirs: dict[str, list[Any]] = {}
        for (outputs, _), batch in answers:
            assert batch.target is not None
            for found, of_batch in ((ours, named_outputs(outputs)), (theirs, batch.target.outputs)):
                for name, value in of_batch.items():
                    found.setdefault(name, []).append(value.float().cpu().numpy())
        outputs, teacher = ({n: np.concatenate(parts) for n, parts in found.items()} for found in (ours, theirs))
        count = len(next(iter(teacher.values())))
        result = function(outputs, {"images": images_NHWC[:count], "teacher": teacher})
        if isinstance(result, bool) or not isinstance(result, int | float | np.integer | np.floating):
            raise UserError(
                f"--select {spec}: returned a {type(result).__name__}; return a number, the larger the better."
            )
        return -float(result)

    return measure


def kept_sentence(run: Path, best: Best, total: int) -> str:
    """What was kept, in one line."""
    what = "the untrained student" if best.iteration == 0 else f"{abs(best.measure):.4g}"
    last = "no number" if math.isinf(best.last) else f"{abs(best.last):.4g}"
    return (
        f"{run}: kept: iteration {best.iteration} of {total}, {what} (validation measure: "
        f"untrained {abs(best.first):.4g}, after the last iteration {last})."
    )
