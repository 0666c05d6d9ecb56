"""The maps of student and teacher as every affinity form wants them: normalised, side by side, by tiles of columns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-5
"""What is added to the length of every column, beside a floor that is relative to the map: no zero is divided by."""
TINY_NORM = 1e-18

Norms = tuple[Tensor, Tensor]
Floors = tuple[Tensor, Tensor]


class Pair(NamedTuple):
    """The maps of some samples, or some columns of them, as every form wants them.

    halves (b, 2C, N): U over S. norms (b, 1, N) twice: lengths of the columns of student and teacher. floors
    (b, 1, 1) twice: what is added to those lengths.
    """

    halves: Tensor
    norms: Norms
    floors: Floors

    @classmethod
    def of(cls, student: Tensor, teacher: Tensor, floors: Floors, norms: Norms | None = None) -> Pair:
        samples, width, pixels = student.shape
        channels = max(width, teacher.shape[1])
        make = student.new_empty if width == teacher.shape[1] else student.new_zeros
        halves = make((samples, 2 * channels, pixels))
        u, s = halves[:, :channels], halves[:, channels:]
        norms = norms or (_norm(student), _norm(teacher))
        torch.mul(student, _weight(norms[0], floors[0]), out=s[:, :width])
        torch.mul(teacher, _weight(norms[1], floors[1]), out=u[:, : teacher.shape[1]])
        torch.sub(s, u, out=u)
        return cls(halves, norms, floors)

    @property
    def u(self) -> Tensor:
        return self.halves[:, : self.halves.shape[1] // 2]

    @property
    def s(self) -> Tensor:
        return self.halves[:, self.halves.shape[1] // 2 :]

    @property
    def t(self) -> Tensor:
        return self.s - self.u

    @property
    def pixels(self) -> int:
        return self.halves.shape[2]


def _norm(features: Tensor) -> Tensor:
    return (features * features).sum(1, keepdim=True).sqrt_()


def _weight(norm: Tensor, floor: Tensor) -> Tensor:
    return (norm + floor).reciprocal_()


def floors_of(student: Tensor, teacher: Tensor, share: float) -> Floors:
    """What is added to the lengths of the columns of both maps (b, C, N): EPSILON, and `share` of the root mean square
    of the map's own lengths, which counts as a constant in the gradient."""
    return _floor(student, share), _floor(teacher, share)


def _floor(features: Tensor, share: float) -> Tensor:
    if not share:
        return features.new_full((len(features), 1, 1), EPSILON)
    length: Tensor = torch.linalg.vector_norm(features, dim=(1, 2), keepdim=True)
    return length.mul_(share / features.shape[2] ** 0.5).add_(EPSILON)


def write_gradient(out: Tensor, features: Tensor, norm: Tensor, floor: Tensor, slope: Tensor, factor: Tensor) -> None:
    """To `out`: the gradient of `features` (b, Cs, N), of that `norm`, where that of S is factor * slope (b, C, N).

    A zero column has the gradient slope / floor: its norm contributes nothing, instead of 0 / 0.
    """
    slope, weight = slope[:, : features.shape[1]], _weight(norm, floor)
    radial = (features * slope).sum(1, keepdim=True).mul_(weight).div_(norm.clamp_min(TINY_NORM))
    torch.mul(torch.addcmul(slope, features, radial, value=-1), weight.mul_(factor), out=out)


class Tile:
    """Some columns of the maps as a pair, for the forward and again for the backward pass.

    Kept in between where the tiles are few; of many only the lengths are. To make a pair again costs less than to
    read it back from beyond the caches, and fresh memory, whose every page the system has to clear, most of all.
    """

    def __init__(self, columns: slice, dtype: torch.dtype, floors: Floors, keep: bool) -> None:
        self.columns, self._dtype, self._floors, self._keep = columns, dtype, floors, keep
        self._pair: Pair | None = None
        self._norms: Norms | None = None

    def pair(self, student: Tensor, teacher: Tensor) -> Pair:
        if self._pair is not None:
            return self._pair
        pair = Pair.of(self.of(student), self.of(teacher), self._floors, self._norms)
        self._norms, self._pair = pair.norms, pair if self._keep else None
        return pair

    def of(self, maps: Tensor) -> Tensor:
        return maps[:, :, self.columns].to(self._dtype)
