"""Tar files of images and their labels, as webdataset writes them, read in place through an index of each."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from faqd.errors import UserError, first_line
from faqd.train.data.decode import Picture, ScaledSize, decoded, size_of_picture
from faqd.train.data.listing import SUFFIXES, Names, Say
from faqd.train.data.npz_files import checked_labels
from faqd.train.data.sources.index import Index, indexed, tell_unkept, told_apart
from faqd.train.data.sources.opened import Classes, Labels, Opened
from faqd.train.data.sources.stored import StoredFile, file_name, stored_files

WHAT = "faqd index of a tar file, version 1"
LABEL = ".cls"
BLOCK = 512
"""Bytes that a tar file counts in; one of zeros is its end."""
REPORT_EVERY = 50
_COMPRESSED = {b"\x1f\x8b": "gzip -d", b"BZ": "bzip2 -d", b"\xfd7": "xz -d", b"(\xb5": "zstd -d"}
"""What begins so, and what unpacks it."""


@dataclass(frozen=True)
class Shards:
    """A `Listing`. states: (S, 2), of each file its State. shard: (N,), which of them an image is in. places: (N, 2),
    where it begins there, and how many bytes it has."""

    title: str
    files: tuple[StoredFile, ...]
    states: NDArray[np.int64]
    encoded: Names
    shard: NDArray[np.int64]
    places: NDArray[np.int64]
    is_named = True
    is_quick = False

    def __len__(self) -> int:
        return len(self.encoded)

    def name(self, index: int) -> str:
        return os.fsdecode(self.encoded[index])

    def encoded_names(self) -> Iterator[bytes]:
        return iter(self.encoded)

    def where(self, index: int) -> str:
        return f"{self.files[int(self.shard[index])].place}: {self.name(index)}"

    def sizes(self, say: Say) -> NDArray[np.int64]:
        return self.places[:, 1]

    def picture(self, index: int, scaled: ScaledSize | None = None) -> Picture | str:
        return decoded(self._content(index), scaled)

    def picture_size(self, index: int) -> tuple[int, int]:
        return size_of_picture(self._content(index))

    def _content(self, index: int) -> bytes:
        start, size = self.places[index].tolist()
        return self.files[int(self.shard[index])].read(start, size)

    def is_as_listed(self, index: int) -> bool:
        shard = int(self.shard[index])
        return self.files[shard].state() == tuple(self.states[shard].tolist())

    def in_words(self) -> str:
        digest = hashlib.sha256(self.encoded.block)
        for numbers in (self.encoded.ends, self.states, self.shard, self.places):
            digest.update(np.ascontiguousarray(numbers).data)
        return f"{len(self):,} images in {len(self.files):,} tar files, {digest.hexdigest()[:16]}"


def open_shards(pattern: str, with_labels: bool, say: Say) -> Opened:
    """The images of tar files; UserError where one is no tar file that is whole, or has no image."""
    title = f"shards:{pattern}"
    if pattern.startswith("pipe:") or pattern == "-":
        raise UserError(
            f"{title}: what a command writes can only be read from front to back, and images are read in any order; "
            "write it into tar files, and give these."
        )
    files = stored_files("shards", pattern)
    indexes: list[Index] = []
    states, unkept = [], list[str]()
    for number, file in enumerate(files, 1):
        index, state = indexed(file, WHAT, _read_through, unkept)
        indexes.append(index)
        states.append(state)
        if number % REPORT_EVERY == 0:
            say(f"{title}: {number} of {len(files)} tar files listed.")
    tell_unkept(title, unkept, say)
    names = told_apart(indexes, files)
    assert names is not None
    listing = Shards(
        title,
        tuple(files),
        np.array(states, np.int64),
        names,
        np.repeat(np.arange(len(files)), [len(index.names) for index in indexes]),
        np.concatenate([index.places for index in indexes]),
    )
    labels = np.concatenate([index.labels for index in indexes])
    return Opened(listing, *(_labels(listing, labels) if with_labels else (None, None)))


def _labels(shards: Shards, places: NDArray[np.int64]) -> tuple[Labels, Classes]:
    """What the files .cls beside the images say: the numbers of classes; None where there is none of them."""
    has_one = places[:, 0] >= 0
    if not has_one.any():
        return None, None
    if not has_one.all():
        without = shards.where(int(np.argmin(has_one)))
        raise UserError(
            f"{without}: {int((~has_one).sum()):,} of {len(places):,} images have no label ({LABEL}) beside them; give "
            "all of them one, or none."
        )
    numbers = np.empty(len(places), np.int64)
    for index, (start, size) in enumerate(places.tolist()):
        text = shards.files[shards.shard[index]].read(start, size)
        try:
            numbers[index] = int(text)
        except (ValueError, OverflowError):
            found = text[:20].decode("utf-8", "replace")
            raise UserError(
                f"{shards.where(index)}: its label ({LABEL}) is {found!r}; expected the number of a class, 0, 1, 2 "
                "and so on."
            ) from None
    return checked_labels(shards.title, numbers, None, len(places))


def _read_through(file: StoredFile) -> Index:
    """What is in a tar file, by its headers."""
    if file.state()[0] == 0:
        raise UserError(f"{file.place}: an empty file, expected a tar file; write it again, or remove it.")
    with file.open() as stream:
        _refuse_compressed(file, stream.read(2))
        stream.seek(0)
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                members = [
                    (member.name.removeprefix("./"), member.offset_data, member.size)
                    for member in tar
                    if member.isreg() and not member.issparse()
                ]
                end = tar.offset
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise UserError(
                f"{file.place}: is no tar file, or was cut off ({first_line(error)}); write or fetch it again."
            ) from None
        # Python's reader takes a cut at the end of a member, and a damaged header, for the end.
        stream.seek(end)
        if stream.read(BLOCK) != bytes(BLOCK):
            raise UserError(
                f"{file.place}: ends, or is damaged, behind {len(members):,} files, without the mark that ends a tar "
                "file; write or fetch it again."
            )
    return _index(file, members)


def _refuse_compressed(file: StoredFile, begin: bytes) -> None:
    if (unpack := _COMPRESSED.get(begin)) is not None:
        raise UserError(
            f"{file.place}: is compressed, so that it can only be read from front to back, and images are read in any "
            f"order; unpack it ({unpack} {file_name(file)}) and give the tar file. Images are compressed already."
        )


def _index(file: StoredFile, members: list[tuple[str, int, int]]) -> Index:
    """Images and the labels that belong to them: a sample is what has one name up to the first dot."""
    labels = {_sample(name): place for name, *place in members if name.endswith(LABEL) and _rest(name) == LABEL}
    images = [member for member in members if member[0].lower().endswith(SUFFIXES) and not _is_hidden(member[0])]
    # A sample of x.jpg and x.mask.png has one image.
    plain = {_sample(name) for name, *_ in images if _rest(name).lower() in SUFFIXES}
    kept = [image for image in images if _rest(image[0]).lower() in SUFFIXES or _sample(image[0]) not in plain]
    if not kept:
        raise UserError(
            f"{file.place}: no image among its {len(members):,} files; expected names that end in "
            f"{', '.join(SUFFIXES)}."
        )
    called = sorted(name for name, *_ in kept)
    if twice := [name for name, following in pairwise(called) if name == following]:
        raise UserError(f"{file.place}: holds two images called {twice[0]}; write it again with a name for each.")
    return Index(
        Names.of(os.fsencode(name) for name, *_ in kept),
        np.array([place for _, *place in kept], np.int64),
        np.array([labels.get(_sample(name), [-1, 0]) for name, *_ in kept], np.int64),
    )


def _sample(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.split(".")[0]


def _rest(name: str) -> str:
    return name.removeprefix(_sample(name))


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
