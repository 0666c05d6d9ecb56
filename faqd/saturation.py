"""Where integer sums of onnxruntime saturate, and where they cannot.

x86 CPUs with AVX2 or AVX-512 but no VNNI multiply unsigned 8-bit codes by signed 8-bit weights and add each two
neighbouring products in int16, which saturates (the instruction vpmaddubsw); every other CPU adds in int32. Neighbours
are the items 2i and 2i + 1 of a layer's weights with the channels of its group innermost: (ky, kx, channel). Layers in
which every group has one input and one output channel have kernels of their own that add in int32.
Codes here are those of the file: 0..255, zero point included.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.quant import Quant, fits_int8

LOWEST, HIGHEST = -(2**15), 2**15 - 1
"""What the sum of two products is limited to."""


def zero_point(quant: Quant) -> int:
    """Of a grid in onnxruntime's unsigned 8 bits; even, so that a tie stays one between the same two codes."""
    return 128 * quant.signed if fits_int8(quant) else -(quant.low // 2 * 2)


def pair_limit(highest_code: int) -> int:
    """What two neighbouring weights of one sign may add up to, so that no codes 0..highest_code make them saturate."""
    return HIGHEST // highest_code


def in_kernel_order(weight_OCK: NDArray[Any]) -> NDArray[Any]:
    """Weights (O, C, kernel...) as rows (O, items), whose neighbours are added."""
    return np.moveaxis(weight_OCK, 1, -1).reshape(len(weight_OCK), -1)


def neighbours(rows_OK: NDArray[Any]) -> NDArray[Any]:
    """(O, pairs, 2): the last item of an odd number is added to nothing."""
    even = np.pad(rows_OK, ((0, 0), (0, rows_OK.shape[1] % 2)))
    return even.reshape(len(rows_OK), -1, 2)


def largest_pairs(rows_OK: NDArray[Any]) -> NDArray[np.int64]:
    """(O,): of the neighbours in each row the largest sum of magnitudes of one sign."""
    pairs = neighbours(rows_OK.astype(np.int64))
    of_a_sign = (np.maximum(sign * pairs, 0).sum(2).max(1, initial=0) for sign in (1, -1))
    found: NDArray[np.int64] = np.maximum(*of_a_sign)
    return found
