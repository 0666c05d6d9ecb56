"""What is in a file of many images, found by reading through it once and kept beside it: its index."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from faqd.errors import UserError
from faqd.train.data.listed_files import State
from faqd.train.data.listing import Names, Say
from faqd.train.data.sources.stored import StoredFile, file_name


@dataclass(frozen=True)
class Index:
    """Of one file. names: of its images. places: (N, 2) where each begins and how many bytes it has. labels: (N, 2)
    the same of the file that holds its label, -1 where there is none."""

    names: Names
    places: NDArray[np.int64]
    labels: NDArray[np.int64]


def indexed(file: StoredFile, what: str, read: Callable[[StoredFile], Index], unkept: list[str]) -> tuple[Index, State]:
    """The index of a file: the one beside it, where that is of the file as it is now, or by `read`, and then kept.

    what: it says, another one is not meant. unkept: gets a sentence's part where it could not be kept.
    """
    beside = file.beside(index_name(file_name(file)))
    try:
        state = file.state()
        if (found := _kept(beside, what, state)) is not None:
            return found, state
        made = read(file)
        changed = file.state() != state
    except OSError as error:
        raise UserError(f"{file.place}: cannot be read ({error.strerror or error}).") from None
    if changed:
        raise UserError(f"{file.place}: was changed while it was read; run the same command again.")
    try:
        beside.replace(_encoded(made, what, state))
    except OSError as error:
        unkept.append(str(error.strerror or error).lower())
    return made, state


def index_name(name: str) -> str:
    """Hidden, so that no pattern takes it for one of the files."""
    return f".{name}.index.npz"


def tell_unkept(title: str, unkept: list[str], say: Say) -> None:
    if unkept:
        many = f"{len(unkept):,} indexes cannot" if len(unkept) > 1 else "its index cannot"
        say(
            f"{title}: {many} be kept beside what they are of ({unkept[0]}); each run reads through the files anew "
            "before it begins."
        )


def _kept(file: StoredFile, what: str, state: State) -> Index | None:
    """None where there is none, or it is damaged, or of a file that was another one."""
    try:
        if (size := file.state()[0]) <= 0:
            return None
        with np.load(io.BytesIO(file.read(0, size)), allow_pickle=False) as kept:
            if str(kept["what"]) != what or kept["state"].tolist() != list(state):
                return None
            names = Names(kept["names"].tobytes(), kept["ends"].astype(np.int64))
            found = Index(names, kept["places"].astype(np.int64), kept["labels"].astype(np.int64))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError):
        return None
    return found if _is_sound(found, state[0]) else None


def _is_sound(index: Index, size: int) -> bool:
    ends = index.names.ends
    return (
        ends.ndim == 1
        and index.places.shape == index.labels.shape == (len(ends), 2)
        and bool((np.diff(ends, prepend=0) >= 0).all())
        and (len(ends) == 0 or int(ends[-1]) == len(index.names.block))
        and bool((index.places >= 0).all())
        and bool((index.places.sum(1) <= size).all())
        and bool((index.labels.sum(1) <= size).all())
    )


def _encoded(index: Index, what: str, state: State) -> bytes:
    file = io.BytesIO()
    np.savez(
        file,
        what=np.array(what),
        state=np.array(state, np.int64),
        names=np.frombuffer(index.names.block, np.uint8),
        ends=index.names.ends,
        places=index.places,
        labels=index.labels,
    )
    return file.getvalue()


def told_apart(indexes: list[Index], files: list[StoredFile]) -> Names | None:
    """The names of all images: as they are where no two are one, else behind the path of their file. None where a file
    has two of one name."""
    plain = [name for index in indexes for name in index.names]
    if len(set(plain)) == len(plain):
        return Names.of(plain)
    # Cut back to a whole folder; commonpath would take a URL apart.
    shared = os.path.commonprefix([file.place for file in files]).rpartition("/")[0]  # noqa: RUF071
    called = [file.place.removeprefix(f"{shared}/") for file in files]
    behind = [
        prefix.encode() + b"/" + name for prefix, index in zip(called, indexes, strict=True) for name in index.names
    ]
    return Names.of(behind) if len(set(behind)) == len(behind) else None
