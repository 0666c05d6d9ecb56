"""Arrays in, scales out: where to put the clip of an activation that was observed on unlabelled images.

Each function takes the observed values of one tensor (any shape, float) and its grid, and returns a scale > 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from faqd.quant import Quant

Values = NDArray[np.float32]
Method = Literal["mse", "percentile", "max", "entropy"]
METHODS: tuple[Method, ...] = get_args(Method)

TRIALS = 80
"""Candidate scales of the searching methods, spaced evenly up to the scale of the maximum."""
BINS = 2048
"""Histogram bins of the entropy method."""


def scale_from(values: Values, quant: Quant, method: Method) -> float:
    """The scale that `method` chooses for `values` on the grid of `quant`."""
    return _METHODS[method](values, quant)


def scale_max(values: Values, quant: Quant) -> float:
    """No value is clipped: the largest magnitude becomes the last code."""
    return _positive(_extent(values, quant) / quant.high)


def scale_percentile(values: Values, quant: Quant, percent: float = 99.99) -> float:
    """`percent` of the values (of the positive ones, for an unsigned grid) stay unclipped."""
    magnitudes = np.abs(values) if quant.signed else values[values > 0]
    return _positive(float(np.percentile(magnitudes, percent)) / quant.high if magnitudes.size else 0.0)


def scale_mse(values: Values, quant: Quant) -> float:
    """Least mean squared difference between the values (rectified, for an unsigned grid) and their rounding."""
    wanted = _rectified(values, quant).ravel()
    return _least(wanted, quant, lambda rounded: float(np.square(rounded - wanted, dtype=np.float64).mean()))


def scale_entropy(values: Values, quant: Quant) -> float:
    """Least Kullback-Leibler divergence from the histogram of magnitudes to that of their rounding.

    The idea of NVIDIA's entropy calibrator, on the histogram of what the grid really produces.
    """
    wanted = np.abs(_rectified(values, quant)).ravel()
    wanted = wanted[wanted > 0]
    top = float(wanted.max(initial=0.0))
    if top == 0:
        return _positive(0.0)
    counts, edges = np.histogram(wanted, BINS, (0.0, top))
    centres = ((edges[:-1] + edges[1:]) / 2).astype(np.float32)
    p = counts / counts.sum()

    def divergence(rounded: Values) -> float:
        # Each code spreads its mass evenly over the occupied bins that round to it; a clipped tail lands on the last.
        _, code = np.unique(rounded, return_inverse=True)
        occupied = counts > 0
        mass = np.bincount(code, p)
        q = np.where(occupied, mass[code] / np.maximum(np.bincount(code, occupied), 1)[code], 0.0)
        return float((p[occupied] * np.log(p[occupied] / q[occupied])).sum())

    return _least(centres, quant, divergence)


def _least(values: Values, quant: Quant, error: Callable[[Values], float]) -> float:
    largest = _extent(values, quant) / quant.high
    if largest == 0:
        return _positive(0.0)
    candidates = largest * np.arange(1, TRIALS + 1) / TRIALS
    errors = [error((np.clip(np.rint(values / s), quant.low, quant.high) * s).astype(np.float32)) for s in candidates]
    return float(candidates[int(np.argmin(errors))])


def _rectified(values: Values, quant: Quant) -> Values:
    return values if quant.signed else np.maximum(values, 0)


def _extent(values: Values, quant: Quant) -> float:
    return float(np.abs(_rectified(values, quant)).max(initial=0.0))


def _positive(scale: float) -> float:
    """A tensor that was never above zero still needs a scale; any positive one is exact for it."""
    return scale if scale > 0 else 1.0


_METHODS: dict[Method, Callable[[Values, Quant], float]] = {
    "mse": scale_mse,
    "percentile": scale_percentile,
    "max": scale_max,
    "entropy": scale_entropy,
}
