"""Percentiles by trtexec's rule, how far chance can move them, and how many queries they need."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

CONFIDENCE = 0.95


def percentile(sorted_ms: Sequence[float], p: float) -> float:
    """trtexec's percentile: no interpolation, index max(n - 1 - floor((1 - p / 100) n), 0).

    trtexec evaluates the index in float32; float64 gives another one at every multiple of 10 for p90 and of 100
    for p99.
    """
    excluded = int((np.float32(1) - np.float32(p) / np.float32(100)) * np.float32(len(sorted_ms)))
    return sorted_ms[max(len(sorted_ms) - 1 - excluded, 0)]


def samples_needed(p: float) -> int:
    """Queries that a percentile needs so that, on average, one lies beyond it: p90 10, p99 100, p99.9 1000."""
    return math.ceil(100 / (100 - Fraction(str(p))))


def carried(sorted_ms: Sequence[float], p: float) -> float | None:
    return percentile(sorted_ms, p) if len(sorted_ms) >= samples_needed(p) else None


def band(sorted_ms: Sequence[float], p: float) -> tuple[float | None, float | None]:
    """95 % confidence limits of a percentile from the order of the samples alone, whatever their distribution.

    The number of samples beyond the true percentile is binomial; a limit that no sample can give is None. Queries that
    follow each other are not independent, so the true band is wider.
    """
    n, share = len(sorted_ms), 1 - p / 100
    if not 0 < share < 1:
        return None, None
    below = _binomial_cdf(n, share)
    tail = (1 - CONFIDENCE) / 2
    above = int(np.searchsorted(below, tail, side="right"))  # how many k have P(K <= k) <= tail
    upper = sorted_ms[n - above] if above else None
    # The (k + 1)-th largest is a lower limit where P(K <= k) >= 1 - tail.
    first = int(np.searchsorted(below, 1 - tail))
    lower = sorted_ms[n - 1 - first] if first < n else None
    return lower, upper


def _binomial_cdf(n: int, share: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """P(K <= k) for k = 0 .. n."""
    k = np.arange(n, dtype=np.float64)
    steps = np.log(n - k) - np.log(k + 1) + math.log(share) - math.log1p(-share)
    log_pmf = np.concatenate([[0.0], np.cumsum(steps)]) + n * math.log1p(-share)
    return np.asarray(np.minimum(np.cumsum(np.exp(log_pmf)), 1.0))


def spread(values: Sequence[float], percentiles: Sequence[float]) -> dict[str, Any]:
    """Least, middle and largest of some times in ms, and the percentiles that so many can carry."""
    ordered = sorted(values)
    mean = statistics.fmean(ordered)
    return {
        "min_ms": ordered[0],
        "median_ms": statistics.median(ordered),
        "mean_ms": mean,
        "max_ms": ordered[-1],
        "coefficient_of_variation": statistics.pstdev(ordered, mean) / mean if mean else 0.0,
        "percentiles_ms": {f"{p:g}": carried(ordered, p) for p in percentiles},
    }
