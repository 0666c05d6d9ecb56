"""Arrays in, scale and lowest code out: where 256 codes lie best for an activation that was observed.

values = scale * (low .. low + 255), with zero one of the codes and `low` even (`faqd.quant.asymmetric_quant`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from faqd.calib.ranges import PERCENT, REFINEMENTS, SMALLEST, TRIALS, Method, Values, scale_entropy
from faqd.quant import CODES_8, SIGNED_8

LAST = CODES_8 - 1
LOWEST = -(CODES_8 - 2)
"""Below it nothing above zero would have a code."""


def asymmetric_range(values: Values, method: Method) -> tuple[float, int]:
    """The scale (> 0) and the lowest code (LOWEST..0, even) that `method` chooses for `values` (any shape, float)."""
    low, high = min(float(values.min(initial=0.0)), 0.0), max(float(values.max(initial=0.0)), 0.0)
    if method == "mse":
        return _least_squares(values, low, high)
    if method == "percentile":
        below, above = np.percentile(values, (100 - PERCENT, PERCENT)) if values.size else (0.0, 0.0)
        low, high = min(float(below), 0.0), max(float(above), 0.0)
    elif method == "entropy":
        largest = scale_entropy(values, SIGNED_8) * SIGNED_8.high
        low, high = max(low, -largest), min(high, largest)
    return _holding(low, high)


def _holding(low: float, high: float) -> tuple[float, int]:
    """The finest scale, within a code or two, by which no value from low <= 0 to high >= 0 is clipped."""
    if high - low < SMALLEST * LAST:
        return 1.0, 0
    begins = max(_even(np.floor(low / (high - low) * LAST)), LOWEST)
    return max(high / (begins + LAST), -low / max(1, -begins)), begins


def _even(code: float) -> int:
    return int(code) // 2 * 2


def _least_squares(values: Values, low: float, high: float) -> tuple[float, int]:
    """Least mean squared difference between the values and their rounding."""
    if high - low < SMALLEST * LAST:
        return 1.0, 0
    ordered = np.sort(values.ravel()).astype(np.float64)
    squares = _Squares(ordered)
    largest = _holding(low, high)[0]

    def best(candidates: NDArray[np.float64]) -> tuple[float, int]:
        found = [(*squares.least(scale), scale) for scale in candidates.tolist()]
        _, begins, scale = min(found)
        return scale, begins

    coarse, _ = best(largest * np.arange(1, TRIALS + 1) / TRIALS)
    return best(coarse + largest / TRIALS * np.linspace(-1, 1, REFINEMENTS + 2)[1:-1])


class _Squares:
    """Squared errors of sorted values, for all lowest codes of a scale at once.

    A value within the codes is rounded to a multiple of the scale, wherever those begin; the others are clipped.
    """

    def __init__(self, ordered: NDArray[np.float64]) -> None:
        self._values = ordered
        self._sums, self._squares = _cumulative(ordered), _cumulative(np.square(ordered))

    def least(self, scale: float) -> tuple[float, int]:
        """The least sum of squared errors, and the lowest code that has it."""
        begins = np.arange(LOWEST, 1, 2)
        bottom, top = begins * scale, (begins + LAST) * scale
        rounded = _cumulative(np.square(self._values - np.rint(self._values / scale) * scale))
        below, above = (np.searchsorted(self._values, ends) for ends in (bottom, top))
        total = rounded[above] - rounded[below]
        total += self._squares[below] - 2 * bottom * self._sums[below] + below * np.square(bottom)
        count = len(self._values) - above
        squares, sums = self._squares[-1] - self._squares[above], self._sums[-1] - self._sums[above]
        total += squares - 2 * top * sums + count * np.square(top)
        best = int(total.argmin())
        return float(total[best]), int(begins[best])


def _cumulative(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(values)])
