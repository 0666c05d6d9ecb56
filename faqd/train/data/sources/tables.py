"""Parquet and Arrow files with a column of images, as Hugging Face's `datasets` stores them, read in place."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from faqd.errors import UserError
from faqd.train.data.decode import Picture, ScaledSize, decoded, size_of_picture
from faqd.train.data.listing import Names, Say
from faqd.train.data.npz_files import checked_labels
from faqd.train.data.sources.index import Index, indexed, tell_unkept, told_apart
from faqd.train.data.sources.opened import Classes, Labels, Opened
from faqd.train.data.sources.stored import StoredFile, stored_files
from faqd.train.data.sources.table_file import (
    Kind,
    TableFile,
    columns_in_words,
    image_column,
    largest_group,
    opened,
    refuse_other_column,
)

LABEL = "label"
"""The column of class numbers, unless another one is named."""
LARGE_GROUP = 2**24
"""Bytes of images in a row group: one is read for each image that an iteration sees, and so many take longer than to
decode and scale it."""


@dataclass(frozen=True)
class Tables:
    """A `Listing`. column: of the images. first: the number of the first image of each file, and the end of the last.
    encoded: names, None where there are none that tell images apart."""

    kind: Kind
    title: str
    column: str
    files: tuple[TableFile, ...]
    first: tuple[int, ...]
    encoded: Names | None
    is_quick = False

    @property
    def is_named(self) -> bool:
        return self.encoded is not None

    def __len__(self) -> int:
        return self.first[-1]

    def name(self, index: int) -> str:
        return f"row {index}" if self.encoded is None else os.fsdecode(self.encoded[index])

    def encoded_names(self) -> Iterator[bytes]:
        if self.encoded is not None:
            return iter(self.encoded)
        return (self.name(index).encode() for index in range(len(self)))

    def where(self, index: int) -> str:
        table, row = self._place(index)
        return f"{table.file.place}: row {row}"

    def sizes(self, say: Say) -> NDArray[np.int64]:
        unkept: list[str] = []
        what = f"faqd index of a {self.kind} file, version 1, column {self.column}"
        found = []
        for number, table in enumerate(self.files, 1):
            index, _ = indexed(table.file, what, partial(self._read_through, table), unkept)
            found.append(index.places[:, 1])
            say(f"{self.title}: sizes of the images in {number} of {len(self.files)} files are known.")
        tell_unkept(self.title, unkept, say)
        return np.concatenate(found)

    def _read_through(self, table: TableFile, _: StoredFile) -> Index:
        lengths = [pc.fill_null(pc.binary_length(table.images(group, self.column)), 0) for group in table.groups]
        sizes = np.concatenate([np.empty(0, np.int64), *(length.to_numpy().astype(np.int64) for length in lengths)])
        nothing = np.zeros((len(sizes), 2), np.int64)
        return Index(Names.of([b""] * len(sizes)), np.stack([nothing[:, 0], sizes], 1), nothing)

    def picture(self, index: int, scaled: ScaledSize | None = None) -> Picture | str:
        content = self._content(index)
        return "have no bytes in their row" if content is None else decoded(content, scaled)

    def picture_size(self, index: int) -> tuple[int, int]:
        return size_of_picture(self._content(index) or b"")

    def _content(self, index: int) -> bytes | None:
        table, row = self._place(index)
        group = bisect_right(table.rows, row) - 1
        content: bytes | None = table.images(group, self.column)[row - table.rows[group]].as_py()
        return content

    def _place(self, index: int) -> tuple[TableFile, int]:
        place = bisect_right(self.first, index) - 1
        return self.files[place], index - self.first[place]

    def is_as_listed(self, index: int) -> bool:
        table, _ = self._place(index)
        return table.file.state() == table.state

    def in_words(self) -> str:
        facts = (self.column, self.first, [table.state for table in self.files])
        digest = hashlib.sha256(repr(facts).encode())
        digest.update(b"" if self.encoded is None else self.encoded.block)
        return f"{len(self):,} rows in {len(self.files):,} {self.kind} files, {digest.hexdigest()[:16]}"


def open_tables(kind: Kind, where: str, with_labels: bool, say: Say) -> Opened:
    """The images of `FILES`, `FILES#IMAGES` or `FILES#IMAGES,LABELS`; UserError where there is no such column."""
    pattern, _, columns = where.partition("#")
    image, _, label = columns.partition(",")
    title = f"{kind}:{pattern}"
    files = stored_files(kind, pattern)
    found = [opened(kind, file) for file in files]
    column = image or image_column(title, found[0][1])
    for file, (_, schema) in zip(files, found, strict=True):
        refuse_other_column(file, schema, column)
    first = np.cumsum([0, *(table.rows[-1] for table, _ in found)]).tolist()
    if not first[-1]:
        raise UserError(f"{title}: no row in {'it' if len(files) == 1 else 'them'}, expected images.")
    if kind == "parquet" and (size := max(largest_group(table, column) for table, _ in found)) > LARGE_GROUP:
        say(
            f"{title}: a row group has up to {size / 2**20:,.0f} MiB of images, and is read whole for each of them "
            "where they do not stay in memory; write it again with row_group_size=100, or as shards."
        )
    names = _names(files, found, column)
    tables = Tables(kind, title, column, tuple(table for table, _ in found), tuple(first), names)
    return Opened(tables, *(_labels(tables, [schema for _, schema in found], label) if with_labels else (None, None)))


def _names(files: list[StoredFile], found: list[tuple[TableFile, pa.Schema]], column: str) -> Names | None:
    """What the images say of their files; None where one says nothing, or two the same."""
    indexes = []
    nothing = np.empty((0, 2), np.int64)
    for table, schema in found:
        kind = schema.field(column).type
        if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
            return None
        names = list(table.values(column, "path"))
        if not all(isinstance(name, str) and name for name in names):
            return None
        indexes.append(Index(Names.of(map(os.fsencode, names)), nothing, nothing))
    return told_apart(indexes, files)


def _labels(tables: Tables, schemas: list[pa.Schema], label: str) -> tuple[Labels, Classes]:
    """Of a column of integers; None where none is there and none was asked for."""
    column = label or LABEL
    places = [schema.get_field_index(column) for schema in schemas]
    if max(places) < 0 and not label:
        return None, None
    for table, schema, place in zip(tables.files, schemas, places, strict=True):
        if place < 0 or not pa.types.is_integer(schema.field(place).type):
            found = "no column" if place < 0 else f"{schema.field(place).type} in the column"
            raise UserError(
                f"{table.file.place}: {found} {column!r}, expected integers, the numbers of classes; its columns: "
                f"{columns_in_words(schema)}."
            )
    values = [value for table in tables.files for value in table.values(column)]
    if None in values:
        raise UserError(
            f"{tables.title}: rows without a value in the column {column!r}; give all of them one, or none."
        )
    names = _class_names(schemas[0], column)
    return checked_labels(tables.title, np.array(values), None if names is None else np.array(names), len(values))


def _class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """What `datasets` writes of a column of classes."""
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
