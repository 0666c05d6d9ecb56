"""The image files of a folder, listed once: names, sizes and times, in little memory for millions of them."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from faqd.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_SUFFIXES = tuple(map(os.fsencode, SUFFIXES))
State = tuple[int, int]
"""Size in bytes and time of the last change in ns; of what is no file, or a link that leads nowhere, ABSENT."""
ABSENT: State = (-1, 0)


@dataclass(frozen=True)
class ListedFiles:
    """Image files below `folder`, sorted by their names. states: (N, 2), of each its State.

    The names stand in one block, each up to its place in `ends`: a million Python strings would be copied page by page
    into every worker process that counts its references to them.
    """

    folder: Path
    block: bytes
    ends: NDArray[np.int64]
    states: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, index: int) -> str:
        """Relative to the folder."""
        return os.fsdecode(self.block[self.ends[index - 1] if index else 0 : self.ends[index]])

    def names(self) -> list[str]:
        return list(map(os.fsdecode, self.encoded_names()))

    def encoded_names(self) -> Iterator[bytes]:
        return (self.block[start:end] for start, end in pairwise([0, *self.ends.tolist()]))

    def is_as_listed(self, index: int) -> bool:
        """Whether the file has the size and the time that it was listed with."""
        return _state(self.folder / self.name(index)) == tuple(self.states[index].tolist())

    def in_words(self) -> str:
        """What tells this list from one that grew, or whose files were changed."""
        newest = datetime.fromtimestamp(int(self.states[:, 1].max()) // 10**9, timezone.utc)
        digest = hashlib.sha256(self.block)
        for numbers in (self.ends, self.states):
            digest.update(np.ascontiguousarray(numbers).data)
        return f"{len(self):,} files, the newest of {newest:%Y-%m-%d %H:%M:%S} UTC, {digest.hexdigest()[:16]}"


def listed(folder: Path) -> ListedFiles:
    """The image files below `folder`, through links to folders too; hidden ones are left out (file managers leave
    copies)."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.")
    names: list[bytes] = []
    states = array("q")
    for name, state in _walked(os.fsencode(folder), b"", set()):
        names.append(name)
        states.extend(state)
    if not names:
        raise UserError(f"{folder}: no image in it or below it; expected files that end in {', '.join(SUFFIXES)}.")
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    return ListedFiles(folder, b"".join(names), ends, np.frombuffer(states, np.int64).reshape(-1, 2))


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
            yield prefix + key, _state(keys[key])


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _state(file: Path | os.DirEntry[bytes]) -> State:
    try:
        found = file.stat()
    except OSError:
        return ABSENT
    return found.st_size, found.st_mtime_ns
