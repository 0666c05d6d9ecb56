"""Pictures that are decoded when they are asked for: more than memory holds, in the form of an array."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.errors import UserError
from faqd.train.data.decode import Picture, ScaledSize
from faqd.train.data.findings import Findings
from faqd.train.data.listing import Listing

HEAD = 512
"""The first so many of a split are looked at again and again, for scales and for the best weights: they are kept."""
BLOCK = 256
"""So many are decoded at once where many are asked for."""
MOST_BROKEN = 1000
"""So many broken files in a row are no accident."""

Fit = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]


@dataclass(frozen=True)
class Read:
    """One picture. pixels: fitted, None with a failure. broken: files that were passed over, and what is wrong with
    each. name, picture: what was read, without its pixels."""

    pixels: NDArray[np.uint8] | None
    broken: dict[str, str]
    name: str = ""
    picture: Picture | None = None
    failure: str | None = None

    def without_pixels(self) -> Read:
        return replace(self, pixels=None if self.pixels is None else self.pixels[:0])


@dataclass(frozen=True)
class PictureFiles:
    """The pictures of a split by their position in it; which process reads one does not matter.

    index: of each in `files`. A file that does not decode is replaced by the next of the split that does. scaled: what
    `fit` scales pictures to. reduced: whether they may be decoded at a part of their size for it.
    """

    files: Listing
    index: NDArray[np.int64]
    fit: Fit
    scaled: ScaledSize | None = None
    reduced: bool = False

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> Read:
        broken: dict[str, str] = {}
        for step in range(min(len(self), MOST_BROKEN)):
            file = int(self.index[(position + step) % len(self)])
            name, where = self.files.name(file), self.files.where(file)
            picture, failure = self._picture(file)
            if failure is not None:
                return Read(None, {}, failure=f"{where}: {failure}")
            assert picture is not None
            if isinstance(picture, Picture):
                return Read(self.fit(picture.pixels), broken, name, picture.without_pixels())
            broken[name] = picture
        return Read(None, broken, failure=f"{where}: the last of {len(broken)} image files in a row that {picture}.")

    def _picture(self, file: int) -> tuple[Picture | str | None, str | None]:
        """A picture or what is broken in it, or else why the run cannot go on."""
        picture, failed = None, None
        try:
            picture = self.files.picture(file, self.scaled if self.reduced else None)
        except OSError as error:
            failed = error
        try:
            # Asked when it was read: what changes before or meanwhile shows.
            if not self.files.is_as_listed(file):
                return None, "changed, or gone, since the images were listed."
        except OSError as error:
            failed = error
        # No broken file: another time it may be read, and the run would be another one.
        return picture, None if failed is None else f"cannot be read ({failed.strerror})."


class Pictures:
    """(N, H, W, C) uint8: a split of pictures that is indexed as an array is, and holds its first few only.

    findings: about all files that were read so far, in this process or, as told to `see`, in another. UserError where
    a file is no longer what was listed.
    """

    def __init__(self, files: PictureFiles, size: tuple[int, int, int]) -> None:
        self.files = files
        self.shape = (len(files), *size)
        self.findings = Findings()
        self._head: list[NDArray[np.uint8]] = []

    def __len__(self) -> int:
        return len(self.files)

    def at(self, index: NDArray[Any] | slice) -> Pictures:
        """Some of them, not decoded."""
        return Pictures(replace(self.files, index=self.files.index[index]), self.shape[1:])

    def reduced(self) -> Pictures:
        """The same, decoded at a part of their size where that suffices, and with the same findings."""
        other = Pictures(replace(self.files, reduced=True), self.shape[1:])
        other.findings = self.findings
        return other

    def __getitem__(self, index: slice | NDArray[Any]) -> NDArray[np.uint8]:
        positions = np.arange(len(self))[index]
        pixels = np.empty((len(positions), *self.shape[1:]), np.uint8)
        if len(positions) and positions.max() < HEAD:
            self._read_head(int(positions.max()) + 1)
            for place, position in enumerate(positions):
                pixels[place] = self._head[position]
            return pixels
        for start in range(0, len(positions), BLOCK):
            for place, read in enumerate(self._read(positions[start : start + BLOCK]), start):
                pixels[place] = self.see(read)
        return pixels

    def _read_head(self, count: int) -> None:
        for read in self._read(range(len(self._head), count)):
            self._head.append(self.see(read))
            if read.picture is not None:
                self.findings.see(read.name, read.picture)

    def _read(self, positions: Iterable[int]) -> Iterator[Read]:
        with ThreadPoolExecutor() as pool:
            yield from pool.map(self.files.__getitem__, positions)

    def see(self, read: Read) -> NDArray[np.uint8]:
        """The pixels of one picture that was read."""
        self.findings.broken |= read.broken
        if read.pixels is None:
            raise UserError(f"{read.failure} Put it back as it was and go on with --resume, or give another --out.")
        return read.pixels

    def in_words(self) -> str | None:
        """What was passed over so far."""
        found = self.findings.broken_in_words(self.files.files.title, len(self.files.files))
        return (
            f"{found}, as far as they were read; each is replaced by the next that does."
            if self.findings.broken
            else None
        )
