"""Codes that differ because their value lies in the middle between two: how many roundings that were.

float32 makes a value that lies all but in the middle fall to either side, and makes the same of equal values: products
of codes take few values, and each asks one question of rounding, in however many pixels. Exactly in the middle the rule
of rounding decides, half to even, and every code counts; but for a channel behind a dead activation, which is one value
in nearly every pixel of every image: two libraries that answer that differently have disagreed once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.deploy.verify.segments import Segment
from faqd.reference import real

REACH = 2.0**-10
"""How far from the middle, in codes, a value may lie for its rounding to be a tie: what float32 makes of a sum."""
EXACT = 2.0**-40
"""How far, relative to it, a value at a tie may be from it: what float64 makes of a few operations."""
DEAD = 0.5
"""Least share of a channel that one value fills before its rounding counts once."""


def distinct_roundings(segment: Segment, values: dict[str, Any], differs: NDArray[np.bool_]) -> int:
    """The codes of the segment's output that differ; those of one value near a tie count once, and so do those of one
    value at a tie that fills most of its channel.

    values: every tensor of the reference's run. differs: where the output's codes are not the reference's.
    """
    if not differs.any() or segment.quantize is None:
        return int(np.count_nonzero(differs))
    unrounded = _unrounded(segment, values)
    off = np.abs(unrounded - np.floor(unrounded) - 0.5)
    exact = off <= EXACT * np.maximum(1.0, np.abs(unrounded))
    near = differs & (off <= REACH) & ~exact
    apart = differs & ~near
    channels = zip(*map(_by_channel, (unrounded, apart, exact)), strict=True)
    return len(np.unique(unrounded[near])) + sum(_in_channel(*channel) for channel in channels)


def _in_channel(unrounded: NDArray[np.float64], differs: NDArray[np.bool_], exact: NDArray[np.bool_]) -> int:
    count = int(np.count_nonzero(differs))
    if count < 2 or not exact.any():
        return count
    found, times = np.unique(unrounded[exact], return_counts=True)
    if times.max() < DEAD * unrounded.size:
        return count
    at_it = int(np.count_nonzero(differs & (unrounded == found[times.argmax()])))
    return count - at_it + min(at_it, 1)


def _by_channel(values: NDArray[Any]) -> list[NDArray[Any]]:
    return list(np.moveaxis(values, 1, 0)) if values.ndim > 1 else [values]


def _unrounded(segment: Segment, values: dict[str, Any]) -> NDArray[np.float64]:
    """What the segment rounds to its codes, in units of a code and in their shape."""
    assert segment.quantize is not None
    tensor, scale = segment.quantize.input[:2]
    return segment.put_in_place(real(values[tensor]) / float(values[scale].item()))
