"""Which image trains, which selects and which is reported: told by the image, never by its label or its neighbours."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.errors import UserError
from faqd.train.data.listing import Listing, Say
from faqd.train.data.options import DataOptions
from faqd.train.data.pictures import BLOCK, Pictures

SHARE = 0.1
"""Of a pool of images: what select gets, and once more what eval gets where no test set is published."""
SAME_SIZE_SHARE = 0.01
"""More files than this of one size in bytes, as bitmaps are, are no copies of one another."""

Keys = NDArray[np.uint64]


def shares_of(options: DataOptions) -> tuple[float, ...]:
    """What of a pool evaluates, unless other images do, and what selects; the rest trains."""
    return (SHARE, SHARE) if options.evaluation is None else (SHARE,)


@dataclass(frozen=True)
class Split:
    """pixels: (N, H, W, C) uint8, fitted by `Preprocess.fit`; pictures where they are decoded when they are asked for.
    labels: (N,) int64, None where they were not read. names: (N,) of their files, relative to the folder, None where
    they have none, or it is not known which of them was read."""

    pixels: NDArray[np.uint8] | Pictures
    labels: NDArray[np.int64] | None
    names: NDArray[np.str_] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def images(self) -> NDArray[np.uint8]:
        """All of them, in memory."""
        return self.pixels[:]

    def at(self, index: NDArray[Any] | slice) -> Split:
        pixels = self.pixels.at(index) if isinstance(self.pixels, Pictures) else self.pixels[index]
        labels = None if self.labels is None else self.labels[index]
        return Split(pixels, labels, None if self.names is None else self.names[index])


def split_by_content(pool: Split, *shares: float) -> list[Split]:
    """Cut a pool at the SHA-256 of its images: one split per share, the last split gets the rest.

    Neither a file's name, nor its label, nor its neighbours say where an image goes, and equal images go together.
    Every split is in the order of the hashes, a random order that is the same everywhere.
    """
    keys = keys_of(pool.images)
    return [pool.at(part) for part in cut(keys, keys, *shares)]


def split_by_files(files: Listing, *shares: float, say: Say = lambda _: None) -> list[NDArray[np.int64]]:
    """Cut a list of images that are too many to be looked at: indices, one split per share, the last gets the rest.

    A file's size says where it goes, so that copies go together whatever they are called; where more than one in a
    hundred have one size, the names of those do. Every split is in the order of other hashes of names: in that of the
    same ones the first of the last split would be those that names did not send elsewhere.
    """
    sizes, which, counts = np.unique(files.sizes(say), return_inverse=True, return_counts=True)
    names, order, *_ = _digests(files.encoded_names()).T
    by_size = keys_of(str(size).encode() for size in sizes)[which]
    keys = np.where(counts[which] > SAME_SIZE_SHARE * len(files), names, by_size)
    return cut(keys, order, *shares)


def keys_of_split(split: Split) -> Keys:
    """Of its images, so many at a time."""
    parts = [keys_of(split.pixels[start : start + BLOCK]) for start in range(0, len(split), BLOCK)]
    return np.concatenate([np.empty(0, np.uint64), *parts])


def keys_of(values: Iterable[Any]) -> Keys:
    """The first 64 bits of the SHA-256 of each: bytes, or arrays in C order."""
    return _digests(values)[:, 0]


def _digests(values: Iterable[Any]) -> Keys:
    """(N, 4): SHA-256 in parts of 64 bits."""
    whole = b"".join(hashlib.sha256(value).digest() for value in values)
    return np.frombuffer(whole, ">u8").astype(np.uint64).reshape(-1, 4)


def cut(keys: Keys, order: Keys, *shares: float) -> list[NDArray[np.int64]]:
    """Indices: one split per share of the range of keys, the last gets the rest; each sorted by `order`."""
    bounds = np.array([int(share * 2**64) for share in accumulate(shares)], np.uint64)
    sorted_ = np.argsort(order, kind="stable")
    places = np.searchsorted(bounds, keys[sorted_], side="right")
    splits = [sorted_[places == place] for place in range(len(bounds) + 1)]
    if min(map(len, splits)) == 0:
        places = _by_rank(keys, *shares)[sorted_]
        splits = [sorted_[places == place] for place in range(len(bounds) + 1)]
    return splits


def _by_rank(keys: Keys, *shares: float) -> NDArray[np.intp]:
    """Which split each key goes to where there are so few that a share of their range can be empty by chance: by their
    order, one at least to each."""
    unique, rank = np.unique(keys, return_inverse=True)
    if len(unique) <= len(shares):
        raise UserError(
            f"{len(keys)} images, {len(unique)} of them different, are too few for {len(shares) + 1} parts; give "
            f"{len(shares) + 1} at least, and some hundred for scales and results that mean something."
        )
    counts = [max(1, int(share * len(unique))) for share in shares]
    return np.searchsorted(np.cumsum(counts), rank, side="right")
