"""One Parquet or Arrow file whose rows are read in groups; which of its columns holds images."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from faqd.errors import UserError, first_line
from faqd.train.data.listed_files import State
from faqd.train.data.sources.stored import LocalFile, StoredFile, failed

Kind = Literal["parquet", "arrow"]
HELD = 2
"""Row groups that a process has in memory: neighbours are often asked for one after another, and where one ends threads
read the next. Many writers make them as large as 100 MB."""
OPEN = 64
"""Files that a process has open."""
_reading = threading.Lock()
"""Threads that want neighbours read their row group once, and pyarrow's readers are one thread's at a time."""


@dataclass(frozen=True)
class TableFile:
    """rows: where each row group begins, and the end of the last one."""

    kind: Kind
    file: StoredFile
    state: State
    rows: tuple[int, ...]

    @property
    def groups(self) -> range:
        return range(len(self.rows) - 1)

    def images(self, group: int, column: str) -> Any:
        """Of a row group, as they are stored: an array of bytes. OSError where they cannot be read."""
        with _reading:
            self._refuse_changed()
            return _images(self, group, column)

    def values(self, column: str, field: str | None = None) -> Iterator[Any]:
        """All rows of a column, or of a field of it, group by group. UserError where they cannot be read."""
        for group in self.groups:
            try:
                with _reading:
                    self._refuse_changed()
                    yield from _column(self, group, column, field).to_pylist()
            except OSError as error:
                raise UserError(f"{self.file.place}: cannot be read ({error.strerror}).") from None

    def _refuse_changed(self) -> None:
        """OSError where rows would be of another file; to read a map of one that was cut off ends the process."""
        if self.file.state() != self.state:
            raise failed(self.file.place, "it was changed")


def opened(kind: Kind, file: StoredFile) -> tuple[TableFile, pa.Schema]:
    """UserError where it is no such file."""
    try:
        state = file.state()
        reader = _reader(kind, file, state)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{file.place}: not a readable {kind} file ({first_line(error)}); write or fetch it again."
        ) from None
    rows = [0]
    for count in reader.counts:
        rows.append(rows[-1] + count)
    return TableFile(kind, file, state, tuple(rows)), reader.schema


def largest_group(table: TableFile, column: str) -> int:
    """Bytes of a column in the largest row group of a parquet file."""
    about = _reader(table.kind, table.file, table.state).about
    sizes = [0]
    for group in table.groups:
        pieces = (about.row_group(group).column(place) for place in range(about.num_columns))
        sizes.append(sum(p.total_uncompressed_size for p in pieces if p.path_in_schema.split(".")[0] == column))
    return max(sizes)


@lru_cache(maxsize=OPEN)
def _reader(kind: Kind, file: StoredFile, state: State) -> _Parquet | _Arrow:
    """state: a file that changed is another one."""
    return _Parquet(file) if kind == "parquet" else _Arrow(file)


@lru_cache(maxsize=HELD)
def _images(table: TableFile, group: int, column: str) -> Any:
    kind = _reader(table.kind, table.file, table.state).schema.field(column).type
    return _column(table, group, column, "bytes" if pa.types.is_struct(kind) else None)


def _column(table: TableFile, group: int, column: str, field: str | None) -> Any:
    try:
        found = _reader(table.kind, table.file, table.state).column(group, column, field)
    except (pa.ArrowException, KeyError) as error:
        raise failed(table.file.place, first_line(error)) from error
    return found if field is None else pc.struct_field(found, field)


class _Parquet:
    def __init__(self, file: StoredFile) -> None:
        # Read and not mapped: of a map of a file that is cut off meanwhile the process dies.
        self._file = pq.ParquetFile(pa.OSFile(file.place) if isinstance(file, LocalFile) else file.open())
        self.schema: pa.Schema = self._file.schema_arrow
        self.about = self._file.metadata
        self.counts = [self.about.row_group(group).num_rows for group in range(self.about.num_row_groups)]

    def column(self, group: int, column: str, field: str | None) -> Any:
        path = column if field is None else f"{column}.{field}"
        return self._file.read_row_group(group, columns=[path], use_threads=False).column(column)


class _Arrow:
    about: Any = None

    def __init__(self, file: StoredFile) -> None:
        if not isinstance(file, LocalFile):
            raise UserError(
                f"arrow:{file.place}: an arrow file is read in parts on this machine alone; fetch it, or give parquet:."
            )
        # Nothing of a mapped file is read but what is asked for.
        stream = pa.memory_map(file.place)
        try:
            reader = pa.ipc.open_file(stream)
            self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except pa.ArrowInvalid:
            # A stream, as `datasets` writes it.
            stream.seek(0)
            reader = pa.ipc.open_stream(stream)
            self._batches = list(reader)
        self.schema: pa.Schema = reader.schema
        self.counts = [batch.num_rows for batch in self._batches]

    def column(self, group: int, column: str, field: str | None) -> Any:
        return self._batches[group].column(column)


def image_column(title: str, schema: pa.Schema) -> str:
    """The one that holds images; UserError where none does, or several."""
    columns = [field.name for field in schema if _is_images(field.type)]
    if len(columns) == 1:
        return str(columns[0])
    if columns:
        raise UserError(
            f"{title}: {len(columns)} columns may hold images ({', '.join(columns)}); say which, as "
            f"{title}#{columns[0]}."
        )
    raise UserError(
        f"{title}: no column of images, which are bytes, or a struct with bytes in it; its columns: "
        f"{columns_in_words(schema)}."
    )


def refuse_other_column(file: StoredFile, schema: pa.Schema, column: str) -> None:
    """UserError where there is no such column, or it holds no images."""
    if schema.get_field_index(column) < 0:
        raise UserError(f"{file.place}: no column {column!r}; its columns: {columns_in_words(schema)}.")
    if not _is_images(schema.field(column).type):
        raise UserError(
            f"{file.place}: the column {column!r} is {schema.field(column).type}, expected the bytes of image "
            f"files, or a struct with bytes in it; its columns: {columns_in_words(schema)}."
        )


def columns_in_words(schema: pa.Schema) -> str:
    shown: list[str] = [f"{field.name} ({field.type})" for field in schema][:8]
    return ", ".join(shown) + ", …" * (len(schema) > len(shown))


def _is_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_images(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
