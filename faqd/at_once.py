"""How many images go through a whole network at once, where that is nobody's choice."""

from __future__ import annotations

import math
from collections.abc import Sequence

PIXELS = 2**20
"""Of all images together. 128 images of 416 pixels took a detector's float64 student 11 GB at 64 at once."""


def images_at_once(size: Sequence[int], most: int) -> int:
    """At least one, at most `most`. size: height and width."""
    return max(1, min(most, PIXELS // math.prod(size)))
