"""How far a student's outputs go along with its teacher's, where their distance has nothing to say any more.

At a distance above 1 a student is farther from its teacher than one that always says the same. The nearer of two such
students may be the one that says less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from faqd.train.losses.heads import Heads

SATURATED = 1.0
"""The distance from which on correlation decides: about that of a student that always says the same."""


def beyond_a_constant(distance: float, correlation: float) -> float:
    """The measure of a student, the less the better: its distance up to 1, above it 2 - correlation, from 1 to 3.

    What is no number stays none.
    """
    if distance <= SATURATED or not (math.isfinite(distance) and math.isfinite(correlation)):
        return distance
    return 2 - correlation


class Correlation:
    """Pearson's, of a student's outputs with the teacher's over batches: the mean over outputs, branches and channels.

    Probabilities of one branch count as one channel, as in their distance. A channel in which either never changes has
    0.
    """

    def __init__(self, heads: Heads) -> None:
        self._heads = heads
        self._sums: dict[tuple[str, int], Tensor] = {}

    def see(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        """Outputs (B, C, ...) of one batch."""
        for name, head in self._heads.items():
            for branch in head.branches:
                part = slice(branch.start, branch.end)
                ours, theirs = (each[name][:, part].double().transpose(0, 1).flatten(1) for each in (student, teacher))
                if branch.probability:
                    ours, theirs = ours.reshape(1, -1), theirs.reshape(1, -1)
                sums = torch.stack(
                    [torch.ones_like(ours).sum(1), ours.sum(1), theirs.sum(1)]
                    + [(a * b).sum(1) for a, b in ((ours, ours), (theirs, theirs), (ours, theirs))]
                )
                key = (name, branch.start)
                self._sums[key] = self._sums[key] + sums if key in self._sums else sums

    def value(self) -> float:
        """-1 to 1."""
        found = []
        for name, head in self._heads.items():
            branches = [_of_sums(self._sums[name, branch.start]).mean() for branch in head.branches]
            found.append(torch.stack(branches).mean())
        return float(torch.stack(found).mean())


def _of_sums(sums: Tensor) -> Tensor:
    """(channels,). Below 1e-12 of its mean square a variance is what float64 makes of a constant."""
    count, ours, theirs, squares, their_squares, products = sums
    variance = squares / count - (ours / count).square()
    their_variance = their_squares / count - (theirs / count).square()
    changes = (variance > 1e-12 * squares / count) & (their_variance > 1e-12 * their_squares / count)
    covariance = products / count - ours * theirs / count.square()
    return torch.where(changes, covariance / (variance * their_variance).clamp_min(0).sqrt(), 0.0)
