"""What both sides of the proof are fed, the same on every machine: inputs of the network, and codes inside it.

A quarter each: evaluation images; those enlarged fourfold; noise, between the reach of the images and four times that
of all pixels, so that dark images do not hide a clip; and driven ones. In a driven probe the codes of every rounding
are replaced, once they were compared, by random ones of its whole grid: what a layer meets then does not depend on what
the layers in front of it make of an image.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUARTER = 8
"""Probes of each kind, of images up to QUARTER_PIXELS; of larger ones fewer, in proportion."""
QUARTER_PIXELS = 224 * 224
ENLARGED = 4.0
MIXED = 16
"""One code in so many differs from its channel in maps that are all at one limit: a norm has something to divide by."""


def probe_count(height: int, width: int) -> int:
    """Probes of each kind."""
    return max(1, min(QUARTER, QUARTER * QUARTER_PIXELS // (height * width)))


def probe_inputs(images_NHWC: NDArray[np.uint8], normalise: Any) -> tuple[NDArray[np.float32], int]:
    """Network inputs (N, C, H, W), a quarter of each kind, and how many of them, the last, are driven."""
    count = probe_count(*images_NHWC.shape[1:3])
    images = normalise(images_NHWC[np.arange(count) % len(images_NHWC)])
    extremes = normalise(np.stack([np.full_like(images_NHWC[0], pixel) for pixel in (0, 255)]))
    own, whole = (ENLARGED * float(np.abs(values).max()) for values in (images, extremes))
    reach = np.tile(np.geomspace(whole, own or whole, count, dtype=np.float32), 2).reshape(-1, 1, 1, 1)
    noise = _uniform("input", (2 * count, *images.shape[1:])) * reach  # for driven probes as well
    return np.concatenate([images, images * np.float32(ENLARGED), noise]), count


@dataclass(frozen=True)
class Drive:
    """Replaces the codes of the last `driven` probes. grids: lowest and highest code of every rounding, by place."""

    grids: dict[str, tuple[int, int]]
    driven: int

    def __call__(self, place: str, codes: NDArray[np.int16]) -> NDArray[np.int16]:
        """What is handed on for the codes of a rounding: themselves where they are not driven."""
        if place not in self.grids or not 0 < self.driven <= len(codes) or codes.ndim < 2:
            return codes
        replaced = driven_codes(place, (self.driven, *codes.shape[1:]), *self.grids[place])
        return np.concatenate([codes[: -self.driven], replaced])


UNDRIVEN = Drive({}, 0)


def undriven(array: NDArray[Any], probes: int, driven: int) -> NDArray[Any]:
    """What images and noise make of a tensor, without the probes whose codes were replaced. Tokens and windows of all
    images may stand on its first axis, one image after the other."""
    rows, rest = divmod(len(array), probes) if array.ndim else (0, 1)
    return array if rest else array[: rows * (probes - driven)]


def driven_codes(place: str, shape: tuple[int, ...], low: int, high: int) -> NDArray[np.int16]:
    """Random codes (N, C, ...) from low to high: in every other image each pixel at random, and half of them at a
    limit; in the others channels at one limit, which is what brings an average to its ends."""
    bits = _bits(place, shape)
    codes = low + (bits >> np.uint64(8)).astype(np.int64) % (high - low + 1)
    limit = np.where(bits & np.uint64(1), high, low)
    codes = np.where(bits & np.uint64(2), limit, codes)
    one_pixel = (slice(None), slice(None)) + (slice(0, 1),) * (len(shape) - 2)
    channels = limit[one_pixel]
    at_limit = np.where((bits >> np.uint64(2)) % np.uint64(MIXED), channels, codes)
    codes[1::2] = at_limit[1::2]
    return codes.astype(np.int16)


def _uniform(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Between -1 and 1."""
    numbers = (_bits(name, shape) >> np.uint64(40)).astype(np.float32)  # 24 bits: exact
    noise: NDArray[np.float32] = numbers * np.float32(2.0**-23) - np.float32(1)
    return noise


def _bits(name: str, shape: tuple[int, ...]) -> NDArray[np.uint64]:
    """Random numbers of a name. Straight from the bit generator, whose stream numpy promises not to change."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    numbers: NDArray[np.uint64] = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    return numbers.reshape(shape)
