"""Beyond the distance of a constant, what goes along with the teacher is better than what says less."""

from __future__ import annotations

import math

import numpy as np
import torch

from faqd.fidelity import Branch
from faqd.train.loop.select import Best
from faqd.train.losses.correlation import Correlation, beyond_a_constant
from faqd.train.losses.heads import Head, Heads, distance


def _heads(*branches: Branch) -> Heads:
    return {"y": Head(branches)}


def _of(heads: Heads, ours: torch.Tensor, theirs: torch.Tensor, parts: int = 3) -> float:
    found = Correlation(heads)
    for some, wanted in zip(ours.tensor_split(parts), theirs.tensor_split(parts), strict=True):
        found.see({"y": some}, {"y": wanted})
    return found.value()


def test_it_is_numpys_by_channel_and_over_probabilities_of_a_branch_together() -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = torch.randn(7, 5, 4, 3, generator=generator) + torch.arange(5).view(5, 1, 1)
    ours = 0.3 * theirs + torch.randn(7, 5, 4, 3, generator=generator)
    heads = _heads(Branch(0, 2, False, (1.0, 1.0)), Branch(2, 5, True, (1.0,)))
    a, b = (values.transpose(0, 1).flatten(1).numpy().astype(np.float64) for values in (ours, theirs))
    boxes = np.mean([np.corrcoef(a[i], b[i])[0, 1] for i in range(2)])
    classes = np.corrcoef(a[2:].ravel(), b[2:].ravel())[0, 1]
    assert math.isclose(_of(heads, ours, theirs), (boxes + classes) / 2, rel_tol=1e-9)


def test_a_constant_goes_along_with_nothing() -> None:
    theirs = torch.rand(4, 2, 3, 3)
    heads = _heads(Branch(0, 2, False, (1.0, 1.0)))
    assert _of(heads, torch.full_like(theirs, 0.1), theirs) == 0.0
    assert _of(heads, theirs, torch.full_like(theirs, 1000.1)) == 0.0
    assert math.isclose(_of(heads, 3 * theirs - 7, theirs), 1.0, rel_tol=1e-6)


def test_of_two_ruined_students_the_one_that_says_something_is_kept() -> None:
    generator = torch.Generator().manual_seed(1)
    theirs = torch.randn(16, 1, 8, 8, generator=generator)
    heads = _heads(Branch(0, 1, False, (1.0,)))
    students = {
        "wild": theirs + 2 * torch.randn(16, 1, 8, 8, generator=generator),
        "silent": torch.full_like(theirs, 0.2),
    }
    best, measures = Best(), {}
    for iteration, (name, ours) in enumerate(students.items()):
        far = float(distance({"y": ours}, {"y": theirs}, heads)["y"])
        measures[name] = (far, beyond_a_constant(far, _of(heads, ours, theirs)))
        best.see(iteration, measures[name][1], torch.nn.Linear(1, 1))
    assert measures["wild"][0] > 3 > measures["silent"][0] > 1
    assert best.iteration == 0


def test_up_to_a_constants_the_measure_is_the_distance_and_no_number_stays_none() -> None:
    assert beyond_a_constant(0.7, -0.2) == 0.7
    assert beyond_a_constant(1.01, 0.2) == beyond_a_constant(7.0, 0.2) == 1.8
    assert not math.isfinite(beyond_a_constant(math.inf, 0.2))
    assert not math.isfinite(beyond_a_constant(math.nan, 0.2))
    broken = torch.full((4, 1, 2, 2), math.nan)
    heads = _heads(Branch(0, 1, False, (1.0,)))
    assert not math.isfinite(beyond_a_constant(math.nan, _of(heads, broken, torch.rand(4, 1, 2, 2))))
