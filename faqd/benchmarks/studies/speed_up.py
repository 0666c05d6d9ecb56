"""How often faster one of two things is that were timed in the same rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any


def speed_up(seconds: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """noisy: the two measures disagree by more than 10 %, so the machine was not quiet."""
    minima = min(baseline) / min(seconds)
    paired = statistics.median(slow / fast for slow, fast in zip(baseline, seconds, strict=False))
    return {"ratio_of_minima": minima, "paired_median": paired, "noisy": abs(math.log(minima / paired)) > math.log(1.1)}
