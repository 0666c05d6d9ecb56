"""Codes that differ because their value lies in the middle between two: how many roundings that were.

A channel behind a dead activation is one value in nearly every pixel of every image: it asks one question of rounding,
again and again. Two libraries that answer it differently differ in all of them, and have disagreed once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.deploy.segments import Segment
from faqd.reference import real

REACH = 2.0**-10
"""How far from the middle, in codes, a value may lie for its rounding to be a tie: what float32 makes of a sum."""
DEAD = 0.5
"""Least share of a channel that one value fills before its rounding counts once."""


def distinct_roundings(segment: Segment, values: dict[str, Any], differs: NDArray[np.bool_]) -> int:
    """The codes of the segment's output that differ; those of one value at a tie that fills most of its channel count
    once.

    values: every tensor of the referee's run. differs: where the output's codes are not the referee's.
    """
    if not differs.any() or segment.quantize is None:
        return int(np.count_nonzero(differs))
    unrounded = _unrounded(segment, values)
    channels = zip(_by_channel(unrounded), _by_channel(differs), strict=True)
    return sum(_in_channel(value, differing) for value, differing in channels)


def _in_channel(unrounded: NDArray[np.float64], differs: NDArray[np.bool_]) -> int:
    count = int(np.count_nonzero(differs))
    if count < 2:
        return count
    found, times = np.unique(unrounded, return_counts=True)
    value, most = found[times.argmax()], times.max()
    if most < DEAD * unrounded.size or abs(value - np.floor(value) - 0.5) > REACH:
        return count
    at_it = int(np.count_nonzero(differs & (unrounded == value)))
    return count - at_it + min(at_it, 1)


def _by_channel(values: NDArray[Any]) -> list[NDArray[Any]]:
    return list(np.moveaxis(values, 1, 0)) if values.ndim > 1 else [values]


def _unrounded(segment: Segment, values: dict[str, Any]) -> NDArray[np.float64]:
    """What the segment rounds to its codes, in units of a code and in their shape."""
    assert segment.quantize is not None
    tensor, scale = segment.quantize.input[:2]
    unrounded: NDArray[np.float64] = real(values[tensor]) / float(values[scale].item())
    behind = zip(values[segment.output].shape, unrounded.shape, strict=True)
    return np.pad(unrounded, [(0, wanted - found) for wanted, found in behind])
