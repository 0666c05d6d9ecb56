"""The image files of a folder, listed once: names, sizes and times, in little memory for millions of them."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from faqd.errors import UserError
from faqd.train.data.decode import Picture, ScaledSize, decoded, size_of_picture
from faqd.train.data.listing import SUFFIXES, Names, Say

_SUFFIXES = tuple(map(os.fsencode, SUFFIXES))
State = tuple[int, int]
"""Size in bytes and time of the last change in ns; of what is no file, or a link that leads nowhere, ABSENT."""
ABSENT: State = (-1, 0)


@dataclass(frozen=True)
class ListedFiles:
    """Image files below `folder`, sorted by their names, which are relative to it. states: (N, 2), of each its State.

    A `Listing`.
    """

    folder: Path
    encoded: Names
    states: NDArray[np.int64]
    is_named = True
    is_quick = False

    @property
    def title(self) -> str:
        return str(self.folder)

    def __len__(self) -> int:
        return len(self.encoded)

    def name(self, index: int) -> str:
        return os.fsdecode(self.encoded[index])

    def names(self) -> list[str]:
        return list(map(os.fsdecode, self.encoded))

    def encoded_names(self) -> Iterator[bytes]:
        return iter(self.encoded)

    def where(self, index: int) -> str:
        return str(self.path(index))

    def path(self, index: int) -> Path:
        return self.folder / self.name(index)

    def sizes(self, say: Say) -> NDArray[np.int64]:
        return self.states[:, 0]

    def picture(self, index: int, scaled: ScaledSize | None = None) -> Picture | str:
        return decoded(self.path(index), scaled)

    def picture_size(self, index: int) -> tuple[int, int]:
        return size_of_picture(self.path(index))

    def is_as_listed(self, index: int) -> bool:
        return state_of(self.path(index)) == tuple(self.states[index].tolist())

    def in_words(self) -> str:
        newest = datetime.fromtimestamp(int(self.states[:, 1].max()) // 10**9, timezone.utc)
        digest = hashlib.sha256(self.encoded.block)
        for numbers in (self.encoded.ends, self.states):
            digest.update(np.ascontiguousarray(numbers).data)
        return f"{len(self):,} files, the newest of {newest:%Y-%m-%d %H:%M:%S} UTC, {digest.hexdigest()[:16]}"


def listed(folder: Path) -> ListedFiles:
    """The image files below `folder`, through links to folders too; hidden ones are left out (file managers leave
    copies)."""
    if not folder.is_dir():
        found = " It is a file; is it npz:, npy:, shards: or parquet: ?" if folder.is_file() else ""
        raise UserError(f"{folder}: no such folder.{found}")
    names: list[bytes] = []
    states = array("q")
    for name, state in _walked(os.fsencode(folder), b"", set()):
        names.append(name)
        states.extend(state)
    if not names:
        raise UserError(f"{folder}: no image in it or below it; expected files that end in {', '.join(SUFFIXES)}.")
    return ListedFiles(folder, Names.of(names), np.frombuffer(states, np.int64).reshape(-1, 2))


def chosen(folder: Path, names: Sequence[str]) -> ListedFiles:
    """Files of a folder that are known by their names, in this order."""
    states = np.array([state_of(folder / name) for name in names], np.int64)
    return ListedFiles(folder, Names.of(map(os.fsencode, names)), states.reshape(-1, 2))


def _walked(folder: bytes, prefix: bytes, seen: set[bytes]) -> Iterator[tuple[bytes, State]]:
    """Names and states below one folder, sorted; it is walked through once, however many links lead to it."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    try:
        entries = list(os.scandir(folder))
    except OSError:  # a folder of somebody else's, such as lost+found
        return
    keys = {entry.name + b"/" * _is_folder(entry): entry for entry in entries if not entry.name.startswith(b".")}
    for key in sorted(keys):
        if key.endswith(b"/"):
            yield from _walked(keys[key].path, prefix + key, seen)
        elif key.lower().endswith(_SUFFIXES):
            yield prefix + key, state_of(keys[key])


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def state_of(file: Path | os.DirEntry[bytes]) -> State:
    try:
        found = file.stat()
    except OSError:
        return ABSENT
    return found.st_size, found.st_mtime_ns
