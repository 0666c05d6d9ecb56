"""What every source of streamed images is: a list of them, made at once, of which each is read by its number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from faqd.train.data.decode import Picture, ScaledSize

Say = Callable[[str], None]
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""What the name of an image ends in."""


@dataclass(frozen=True)
class Names:
    """Names in one block, each up to its place in `ends`: a million Python strings would be copied page by page into
    every worker process that counts its references to them."""

    block: bytes
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, names: Iterable[bytes]) -> Names:
        names = list(names)
        return cls(b"".join(names), np.cumsum([len(name) for name in names], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        return self.block[self.ends[index - 1] if index else 0 : self.ends[index]]

    def __iter__(self) -> Iterator[bytes]:
        return (self.block[start:end] for start, end in pairwise([0, *self.ends.tolist()]))


class Listing(Protocol):
    """Images by their numbers. It goes into the processes that decode, and holds names and places, but no pixels."""

    @property
    def title(self) -> str:
        """What sentences call all of it."""

    @property
    def is_named(self) -> bool:
        """Whether names are those of files, by which something else may be found."""

    @property
    def is_quick(self) -> bool:
        """Whether all images are looked at in no time, however many they are."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What one is called, as no other is."""

    def encoded_names(self) -> Iterator[bytes]:
        """All of them: where there are many images, they say which is where."""

    def where(self, index: int) -> str:
        """Where it is, as a person finds it."""

    def sizes(self, say: Say) -> NDArray[np.int64]:
        """(N,): bytes of each as it is stored; copies have one size."""

    def picture(self, index: int, scaled: ScaledSize | None = None) -> Picture | str:
        """The picture, as `read_picture` has it, or what is wrong with it. OSError where a system fails to read
        it, which may pass."""

    def picture_size(self, index: int) -> tuple[int, int]:
        """(height, width) of one that decodes, upright."""

    def is_as_listed(self, index: int) -> bool:
        """Whether what holds it has the size and the time that it was listed with. OSError where nobody answers."""

    def in_words(self) -> str:
        """What tells this list from one that grew, or whose images were changed."""


def numbers_of(listing: Listing, names: NDArray[np.str_]) -> list[int]:
    """Of images that are known by their names."""
    wanted = {str(name).encode("utf-8", "surrogateescape"): -1 for name in names}
    for index, name in enumerate(listing.encoded_names()):
        if name in wanted:
            wanted[name] = index
    return list(wanted.values())
