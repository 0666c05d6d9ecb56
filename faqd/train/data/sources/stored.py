"""A file that is read in parts, and never whole: of this machine, or of another behind a URL."""

from __future__ import annotations

import errno
import glob
import math
import os
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import BinaryIO, Protocol

from faqd.errors import UserError
from faqd.files import written_beside
from faqd.train.data.listed_files import State, state_of

MOST_NAMES = 1_000_000
"""In the braces of a pattern."""


class StoredFile(Protocol):
    """It goes into the processes that decode. Whatever fails is an OSError with a `strerror`."""

    @property
    def place(self) -> str:
        """Its path or URL."""

    def __hash__(self) -> int: ...

    def state(self) -> State:
        """What changes when it changes; ABSENT where it is gone."""

    def read(self, start: int, size: int) -> bytes:
        """So many bytes, or fewer where it ends before."""

    def open(self) -> BinaryIO: ...

    def beside(self, name: str) -> StoredFile:
        """Another one in the same folder."""

    def replace(self, content: bytes) -> None:
        """Write it whole."""


@dataclass(frozen=True)
class LocalFile:
    """Of this machine."""

    path: Path

    @property
    def place(self) -> str:
        return str(self.path)

    def state(self) -> State:
        return state_of(self.path)

    def read(self, start: int, size: int) -> bytes:
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(start)
            # One call reads 2 GiB at most, and may read less.
            parts = []
            while size > 0 and (part := stream.read(size)):
                parts.append(part)
                size -= len(part)
        return b"".join(parts)

    def open(self) -> BinaryIO:
        return self.path.open("rb")

    def beside(self, name: str) -> LocalFile:
        return LocalFile(self.path.with_name(name))

    def replace(self, content: bytes) -> None:
        with written_beside(self.path) as temporary:
            temporary.write_bytes(content)


def is_url(where: str) -> bool:
    return "://" in where


def file_name(file: StoredFile) -> str:
    return file.place.rsplit("/", 1)[-1]


def stored_files(kind: str, pattern: str) -> list[StoredFile]:
    """The files that a pattern fits, sorted: a path or URL with *, ?, [...], {000..127} or {a,b}. UserError where there
    is none, or something else is there. kind: of the source, for sentences."""
    if not is_url(pattern) and os.path.lexists(path := Path(pattern).expanduser()):
        return [_regular(kind, path)]
    files: list[StoredFile] = []
    for plain in _without_braces(pattern):
        if not (found := _found(kind, plain)):
            raise UserError(
                f"{kind}:{plain}: no such file. A pattern may hold *, ?, [...], {{a,b}} and {{000..127}}; quote it, so "
                "that the shell leaves it alone."
            )
        files += found
    return list(dict.fromkeys(files))


def one_stored_file(kind: str, where: str) -> StoredFile:
    """The one file that is named."""
    files = stored_files(kind, where)
    if len(files) > 1:
        raise UserError(f"{kind}:{where}: fits {len(files)} files; give one.")
    return files[0]


def _found(kind: str, pattern: str) -> list[StoredFile]:
    if is_url(pattern):
        # Here, because a folder of this machine needs no fsspec.
        from faqd.train.data.sources.urls import files_behind

        return files_behind(kind, pattern)
    path = Path(pattern).expanduser()
    fitting = glob.glob(str(path), recursive=True)  # noqa: PTH207  # Path.glob takes no absolute pattern
    places = [path] if os.path.lexists(path) else sorted(map(Path, fitting))
    return [_regular(kind, place) for place in places]


def _regular(kind: str, path: Path) -> StoredFile:
    if path.is_dir():
        raise UserError(
            f"{kind}:{path}: is a folder, expected a file, or a pattern that fits some, such as "
            f"{path / '*'}{ENDINGS.get(kind, '')}."
        )
    if path.exists() and not path.is_file():
        raise UserError(
            f"{kind}:{path}: is a pipe or a device, which can only be read from front to back; write it into a file, "
            f"and give that: cat {path} > file{ENDINGS.get(kind, '')}"
        )
    if not path.exists():
        raise UserError(f"{kind}:{path}: is a link that leads nowhere; repair or remove it.")
    return LocalFile(path)


ENDINGS = {"npy": ".npy", "shards": ".tar", "parquet": ".parquet", "arrow": ".arrow"}
"""What files of a kind of source are called."""


def _without_braces(pattern: str) -> list[str]:
    """All that {a,b} and {000..127} stand for."""
    pieces = re.split(r"\{([^{}]*(?:\.\.|,)[^{}]*)\}", pattern)
    choices = [[piece] if place % 2 == 0 else _choices(piece, pattern) for place, piece in enumerate(pieces)]
    if (count := math.prod(map(len, choices))) > MOST_NAMES:
        raise UserError(f"{pattern}: its braces stand for {count:,} files; give fewer.")
    return ["".join(chosen) for chosen in product(*choices)]


def _choices(braces: str, pattern: str) -> list[str]:
    if not (numbers := re.fullmatch(r"(\d+)\.\.(\d+)", braces)):
        return braces.split(",")
    first, last = numbers.groups()
    if not int(first) <= int(last) < int(first) + MOST_NAMES:
        raise UserError(f"{pattern}: {{{braces}}} stands for nothing, or for too much; write it as {{000..127}}.")
    return [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]


def failed(place: str, why: str) -> OSError:
    """What reading raises where a library has its own errors."""
    return OSError(errno.EIO, why, place)
