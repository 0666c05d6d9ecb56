"""Codes that differ because their value lies in the middle between two: how many roundings that were.

A map that is constant, as a channel behind a dead activation is, asks one question of rounding in every pixel of every
image. Two libraries that answer it differently differ in all of them, and have disagreed once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.deploy.segments import Segment
from faqd.reference import real

REACH = 2.0**-10
"""How far from the middle, in codes, a value may lie for its rounding to be a tie: what float32 makes of a sum."""


def distinct_roundings(segment: Segment, values: dict[str, Any], differs: NDArray[np.bool_]) -> int:
    """The codes of the segment's output that differ, those of equal values at a tie counted once.

    values: every tensor of the referee's run. differs: where the output's codes are not the referee's.
    """
    unrounded = _unrounded(segment, values)
    if unrounded is None:
        return int(np.count_nonzero(differs))
    found = unrounded[differs]
    tied = np.abs(found - np.floor(found) - 0.5) <= REACH
    return int(np.count_nonzero(~tied)) + len(np.unique(found[tied]))


def _unrounded(segment: Segment, values: dict[str, Any]) -> NDArray[np.float64] | None:
    """What the segment rounds to its codes, in units of a code and in their shape; None where something else makes
    them."""
    producer = {name: node for node in segment.model.graph.node for name in node.output}
    node = producer[segment.output]
    while node.op_type in ("Clip", "Pad") and node.input[0] in producer:  # on codes
        node = producer[node.input[0]]
    if node.op_type != "QuantizeLinear":
        return None
    unrounded: NDArray[np.float64] = real(values[node.input[0]]) / float(values[node.input[1]].item())
    behind = zip(values[segment.output].shape, unrounded.shape, strict=True)
    return np.pad(unrounded, [(0, wanted - found) for wanted, found in behind])
