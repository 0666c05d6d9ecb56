"""Arrays in, scales out: where to put the clip of an activation that was observed on unlabelled images.

Each function takes the observed values of one tensor (any shape, float) and its grid, and returns a scale > 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from faqd.quant import Quant
from faqd.reference import quantize

Values = NDArray[np.float32]
Method = Literal["mse", "percentile", "max", "entropy"]
METHODS: tuple[Method, ...] = get_args(Method)

TRIALS = 80
"""Candidate scales of the searching methods, spaced evenly up to the scale of the maximum."""
PERCENT = 99.99
"""Of the values, by default unclipped by the percentile method."""
REFINEMENTS = 9
"""Candidates between the neighbours of the best one."""
SMALLEST = float(np.finfo(np.float32).tiny)
"""Scales below this count as zero: float32, which deploys them, holds them badly or not at all."""
BINS = 2048
"""Histogram bins of the entropy method."""


def scale_from(values: Values, quant: Quant, method: Method, shift: float = 0.0) -> float:
    """The scale that `method` chooses for `values` on the grid of `quant`.

    shift: of the rounding (faqd.quant.SHIFTS); of the methods only mse looks at single roundings.
    """
    return scale_mse(values, quant, shift) if method == "mse" else _METHODS[method](values, quant)


def scale_max(values: Values, quant: Quant) -> float:
    """No value is clipped: the largest magnitude becomes the last code."""
    return _positive(_extent(values, quant) / quant.high)


def scale_percentile(values: Values, quant: Quant, percent: float = PERCENT) -> float:
    """`percent` of the values (of the positive ones, for an unsigned grid) stay unclipped."""
    magnitudes = np.abs(values) if quant.signed else values[values > 0]
    return _positive(float(np.percentile(magnitudes, percent)) / quant.high if magnitudes.size else 0.0)


def scale_mse(values: Values, quant: Quant, shift: float = 0.0) -> float:
    """Least mean squared difference between the values (rectified, for an unsigned grid) and their rounding."""
    wanted = _rectified(values, quant).ravel()

    def error(scale: float) -> float:
        rounded = quantize(wanted, scale, quant.low, quant.high, shift) * scale
        return float(np.square(rounded - wanted, dtype=np.float64).mean())

    return _least(error, _extent(wanted, quant) / quant.high)


def scale_entropy(values: Values, quant: Quant) -> float:
    """Least Kullback-Leibler divergence from the histogram of magnitudes to that of their rounding.

    NVIDIA's entropy calibrator: what is clipped counts as the last magnitude that is not, which rounding cannot show.
    """
    magnitudes = np.abs(_rectified(values, quant)).ravel()
    top = _extent(magnitudes, quant)
    if top < SMALLEST:
        return _positive(0.0)
    counts, edges = np.histogram(magnitudes[magnitudes > 0], BINS, (0.0, top))
    occupied = counts > 0
    centres = ((edges[:-1] + edges[1:]) / 2)[occupied]
    p = counts[occupied] / counts.sum()

    def divergence(scale: float) -> float:
        kept = int(np.searchsorted(centres, (quant.high + 0.5) * scale))
        if kept == 0:
            return np.inf
        codes = np.rint(centres[:kept] / scale).astype(int)
        # Each code spreads its mass evenly over the occupied bins that round to it.
        q = (np.bincount(codes, p[:kept]) / np.maximum(np.bincount(codes), 1))[codes]
        wanted = p[:kept].copy()
        wanted[-1] += p[kept:].sum()
        return float((wanted * np.log(wanted / q * q.sum())).sum())

    return _least(divergence, top / quant.high)


def _least(error: Callable[[float], float], largest: float) -> float:
    """The scale of least error, up to `largest`, which clips nothing."""
    if largest < SMALLEST:
        return _positive(0.0)

    def best(candidates: NDArray[np.float64]) -> float:
        return float(min(candidates.tolist(), key=error))

    coarse = best(largest * np.arange(1, TRIALS + 1) / TRIALS)
    return best(coarse + largest / TRIALS * np.linspace(-1, 1, REFINEMENTS + 2)[1:-1])


def _rectified(values: Values, quant: Quant) -> Values:
    return values if quant.signed else np.maximum(values, 0)


def _extent(values: Values, quant: Quant) -> float:
    return float(np.abs(_rectified(values, quant)).max(initial=0.0))


def _positive(scale: float) -> float:
    """A tensor that was never above zero still needs a scale; any positive one is exact for it."""
    return scale if scale >= SMALLEST else 1.0


_METHODS: dict[Method, Callable[[Values, Quant], float]] = {
    "mse": scale_mse,
    "percentile": scale_percentile,
    "max": scale_max,
    "entropy": scale_entropy,
}
