"""Float tensors in a few numbers each, by which two computations of one are compared without keeping either.

Codes are compared by digests, for they are equal or wrong. What float islands compute is neither: torch and the
reference add floats in other orders. A sketch is a tensor's norm and random signed sums of its values, and the
difference of two sketches is about the norm of the difference of the tensors, wherever in them it is.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

BITS = 20
"""Significant bits to which torch and the reference have to agree. Both add in float64 and mostly agree to 49; but
constants that torch makes inside an operator, such as n / (n - 1) of a variance, are float32 in the file."""
SUMS = 8
"""Signed sums of a tensor: a difference hides from one of them by chance, to a tenth of its size in 8 % of cases."""
ROW = 1024
"""Values that are summed with signs of their own before the sums are summed with others."""
MOST_BITS = 52
_SEED = 0


def sketched(values: NDArray[Any]) -> list[float]:
    """How many values are not finite, the norm of the others, and SUMS signed sums of them."""
    flat = np.ascontiguousarray(values, np.float64).reshape(-1)
    finite = np.isfinite(flat)
    count = int(flat.size - np.count_nonzero(finite))
    flat = flat if not count else np.where(finite, flat, 0.0)
    rows = -(-flat.size // ROW)
    padded = np.zeros(rows * ROW)
    padded[: flat.size] = flat
    generator = np.random.PCG64(_SEED)
    columns, signs = _signs(generator, (ROW, SUMS)), _signs(generator, (rows, SUMS))
    sums = (padded.reshape(rows, ROW) @ columns * signs).sum(0)
    return [float(count), float(np.linalg.norm(flat)), *map(float, sums)]


def agreeing_bits(found: list[float], wanted: list[float]) -> float:
    """To how many bits of its norm the tensor of one sketch is that of the other: MOST_BITS where nothing tells them
    apart, 0 where all does."""
    count, norm, *sums = wanted
    if found[0] != count or len(found) != len(wanted):
        return 0.0
    apart = max(abs(a - b) for a, b in zip(found[1:], [norm, *sums], strict=True))
    if apart <= norm * 2.0**-MOST_BITS:
        return float(MOST_BITS)
    return max(0.0, math.log2(norm / apart)) if norm else 0.0


def _signs(generator: np.random.PCG64, shape: tuple[int, int]) -> NDArray[np.float64]:
    """Straight from the bit generator, whose stream numpy promises not to change."""
    bits: NDArray[np.uint64] = generator.random_raw(math.prod(shape)).reshape(shape)
    return np.where(bits >> np.uint64(63), 1.0, -1.0)
