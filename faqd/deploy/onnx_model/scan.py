"""What an ONNX file that nobody vouches for must keep to before any library reads it. Standard library only.

Parsers of ONNX follow a file: they open the other files it names, allocate what it claims, recurse as deep as it nests.
This reads the protobuf wire format itself, field by field, in bounded time and memory, and refuses a file that

- is no whole protobuf message, holds no network, or is larger than a protobuf may be,
- keeps a tensor in another file, wherever that is: a file that names no other cannot lead outside its folder (that of
  a teacher may name some in its folder, see beside.py),
- claims a tensor larger than the bytes that it holds, sparse ones included,
- has names that are no UTF-8 or hold control characters, which would reach terminals and engines,
- declares an input or another tensor that no runtime could hold,
- nests networks (If, Loop, Scan), holds functions or operators that are not ONNX's own,
- has more nodes or fields than a CNN could need.

Field numbers are those of onnx.proto, which may grow but never change them. A message that occurs twice is merged by
protobuf; here every occurrence is read, so that nothing hides in the one that a parser would take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from faqd.errors import UserError
from faqd.schema import unprintable

MAX_BYTES = 2**31 - 1
"""What a protobuf may hold."""
MAX_NODES = 50_000
MAX_FIELDS = 3_000_000
"""Bounds the seconds that a scan takes."""
MAX_NAME = 4_000
MAX_ELEMENTS = 2**31
"""Of one tensor for one image: more than any builder or runtime indexes."""
OPSETS = range(7, 31)
DOMAINS = ("", "ai.onnx", "com.microsoft")
"""com.microsoft: the quantized operators that onnxruntime's tools write beside the standard ones."""

_FREE = 2**64 - 1
"""-1 in 64 bits, which is what Paddle's exporter writes for a free size."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

_ONE_FILE = (
    "faqd reads networks that are one file; save it so where it comes from, such as "
    "onnx.save(model, 'one.onnx') after onnx.load"
)


def read_scanned(path: Path, *, beside: bool = False) -> bytes:
    """The bytes of an ONNX file that a parser may be given; UserError (exit code 2) where it should not be.

    beside: stored tensors may be in other files, which the caller looks at.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"{path}: {size / 1e9:.1f} GB; an ONNX file has at most 2 GB.")
    data = path.read_bytes()
    scan(data, str(path), beside=beside)
    return data


def locations(path: Path) -> list[str]:
    """The files that an ONNX file says it keeps tensors in."""
    return scan(path.read_bytes(), str(path), beside=True)


def scan(data: bytes, where: str, *, beside: bool = False) -> list[str]:
    """The same for bytes at hand; where: how to call them in messages. Returns the other files that they name."""
    scanner = _Scanner(data, where, beside)
    if not data:
        raise scanner.damaged("it is empty")
    scanner.message(0, len(data), _MODEL)
    if not scanner.nodes:
        raise scanner.damaged("it holds no network")
    return sorted(scanner.locations)


class _Scanner:
    def __init__(self, data: bytes, where: str, beside: bool) -> None:
        self._data = data
        self._where = where
        self._beside = beside
        self.locations: set[str] = set()
        self.nodes = 0
        self._fields = 0

    def damaged(self, why: str) -> UserError:
        return self.refusal(f"not a valid ONNX file ({why}): it is damaged or no ONNX; export it again")

    def refusal(self, why: str) -> UserError:
        return UserError(f"{self._where}: {why}.")

    def message(self, begin: int, end: int, readers: dict[int, Reader]) -> None:
        """Read one message with what its fields mean; fields without a reader are skipped."""
        for field, kind, start, stop in self.fields(begin, end):
            reader = readers.get(field)
            if reader is not None and kind == _BYTES:
                reader(self, start, stop)

    def fields(self, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """(field number, wire type, where its content begins, where it ends) of each field of a message."""
        at = begin
        while at < end:
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise self.refusal(f"more than {MAX_FIELDS:,} fields; faqd takes no network as large as that")
            tag, at = self.varint(at, end)
            field, kind = tag >> 3, tag & 7
            if not 0 < field < 2**29:
                raise self.damaged("a field without a number")
            start = at
            if kind == _VARINT:
                _, at = self.varint(at, end)
            elif kind == _BYTES:
                length, start = self.varint(at, end)
                at = start + length
            elif kind in (_FIXED32, _FIXED64):
                at += 4 if kind == _FIXED32 else 8
            else:
                raise self.damaged("an unknown kind of field")
            if at > end:
                raise self.damaged("it ends within a field")
            yield field, kind, start, at

    def varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while at < end and shift < 70:
            byte = self._data[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value, at
        raise self.damaged("a number without an end")

    def text(self, start: int, stop: int) -> str:
        if stop - start > MAX_NAME:
            raise self.refusal(f"a name of {stop - start:,} bytes; faqd takes names of up to {MAX_NAME:,}")
        try:
            name = self._data[start:stop].decode()
        except UnicodeDecodeError as error:
            found = self._data[start:stop][:40]
            raise self.refusal(f"the name {found!r} is not UTF-8; export it again with readable names") from error
        if unprintable(name) is not None:
            raise self.refusal(f"the name {name[:40]!r} holds control characters; export it again with readable names")
        return name

    # What the fields of each message mean -------------------------------------------------------------------------

    def name(self, start: int, stop: int) -> None:
        self.text(start, stop)

    def graph(self, start: int, stop: int) -> None:
        self.message(start, stop, _GRAPH)

    def node(self, start: int, stop: int) -> None:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self.refusal(f"more than {MAX_NODES:,} nodes; faqd takes no network as large as that")
        self.message(start, stop, _NODE)

    def attribute(self, start: int, stop: int) -> None:
        self.message(start, stop, _ATTRIBUTE)

    def subgraph(self, start: int, stop: int) -> None:
        raise self.refusal(
            "a node holds a network of its own (If, Loop or Scan); faqd takes networks without control flow: "
            "export it without, or fold its constants first"
        )

    def function(self, start: int, stop: int) -> None:
        raise self.refusal(
            "it defines functions; inline them where it comes from (onnx.inliner.inline_local_functions)"
        )

    def training(self, start: int, stop: int) -> None:
        raise self.refusal("it holds a training graph; export the network for inference")

    def sparse(self, start: int, stop: int) -> None:
        raise self.refusal("it holds a sparse tensor; store it dense where it comes from")

    def operator_set(self, start: int, stop: int) -> None:
        domain, version = "", 0
        for field, kind, begin, end in self.fields(start, stop):
            if field == 1 and kind == _BYTES:
                domain = self.text(begin, end)
            elif field == 2 and kind == _VARINT:
                version = self.varint(begin, end)[0]
        if domain in DOMAINS[:2] and version not in OPSETS:
            raise self.refusal(f"opset {version}; faqd reads {OPSETS[0]} to {OPSETS[-1]}: export it with another")

    def domain(self, start: int, stop: int) -> None:
        if (domain := self.text(start, stop)) not in DOMAINS:
            raise self.refusal(f"has operators of the domain {domain!r}; faqd reads standard ONNX operators alone")

    def value(self, start: int, stop: int) -> None:
        self.message(start, stop, {1: _Scanner.name, 2: _Scanner.type})

    def type(self, start: int, stop: int) -> None:
        self.message(start, stop, {1: _Scanner.tensor_type})

    def tensor_type(self, start: int, stop: int) -> None:
        self.message(start, stop, {2: _Scanner.shape})

    def shape(self, start: int, stop: int) -> None:
        elements = 1
        for field, _, begin, end in self.fields(start, stop):
            sizes = self.fields(begin, end) if field == 1 else ()
            for what, kind, at, past in sizes:
                if what == 1 and kind == _VARINT:
                    size = self.varint(at, past)[0]  # a negative size reads as a huge one
                    elements *= 1 if size == _FREE else max(1, size)
        if elements > MAX_ELEMENTS:
            raise self.refusal("a tensor is declared larger than anything that runs here")

    def stored(self, start: int, stop: int) -> None:
        self.tensor(start, stop, self._beside)

    def tensor(self, start: int, stop: int, beside: bool = False) -> None:
        elements, name, elsewhere = 1, "", False
        for field, kind, begin, end in self.fields(start, stop):
            if field == 1:  # dims, one by one or packed
                at = begin
                while at < end:
                    size, at = self.varint(at, end)
                    elements *= size  # negative sizes are 64-bit two's complement: huge, and refused as such
                    if size and elements > 2**80:
                        raise self.refusal("a tensor claims an impossible size; the file is damaged or hostile")
            elif field == 8 and kind == _BYTES:
                name = self.text(begin, end)
            elif field == 13 or (field == 14 and self.varint(begin, end)[0] != 0):
                if beside:
                    elsewhere = elsewhere or field == 14
                    self.locations.update(self.location(begin, end) if field == 13 else ())
                    continue
                raise self.refusal(f"keeps tensor {name!r} in another file; {_ONE_FILE}")
        # The densest element types have four elements in a byte.
        if elements > (MAX_ELEMENTS if elsewhere else 4 * (stop - start)):
            raise self.refusal(
                f"tensor {name!r} claims {elements:,} elements in {stop - start:,} bytes; the file is damaged or "
                "hostile"
            )

    def location(self, start: int, stop: int) -> list[str]:
        """Where another file is, of an entry that says so."""
        entry = {field: self.text(begin, end) for field, kind, begin, end in self.fields(start, stop) if kind == _BYTES}
        return [entry.get(2, "")] if entry.get(1) == "location" else []


Reader = Callable[[_Scanner, int, int], None]

_MODEL: dict[int, Reader] = {
    2: _Scanner.name,
    3: _Scanner.name,
    7: _Scanner.graph,
    8: _Scanner.operator_set,
    20: _Scanner.training,
    25: _Scanner.function,
}
_GRAPH: dict[int, Reader] = {
    1: _Scanner.node,
    2: _Scanner.name,
    5: _Scanner.stored,
    11: _Scanner.value,
    12: _Scanner.value,
    13: _Scanner.value,
    15: _Scanner.sparse,
}
_NODE: dict[int, Reader] = {
    1: _Scanner.name,
    2: _Scanner.name,
    3: _Scanner.name,
    4: _Scanner.name,
    5: _Scanner.attribute,
    7: _Scanner.domain,
}
_ATTRIBUTE: dict[int, Reader] = {
    1: _Scanner.name,
    5: _Scanner.tensor,
    6: _Scanner.subgraph,
    10: _Scanner.tensor,
    11: _Scanner.subgraph,
    22: _Scanner.sparse,
    23: _Scanner.sparse,
}
