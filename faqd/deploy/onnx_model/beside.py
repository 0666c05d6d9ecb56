"""Tensors that an ONNX file keeps in other files: only in its own folder, and no more than it says."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import onnx

from faqd.deploy.onnx_model.scan import MAX_BYTES
from faqd.errors import UserError
from faqd.files import sha256


def file_beside(path: Path, location: str) -> Path:
    """The file that `location` is to the ONNX file at `path`; UserError where it lies elsewhere, or is none."""
    name, folder = PurePosixPath(location), path.resolve().parent
    if not location or name.is_absolute() or ".." in name.parts:
        raise UserError(f"{path}: keeps tensors in {location!r}, outside of its folder; put that file beside it.")
    found = folder / name
    if not found.resolve().is_relative_to(folder):
        raise UserError(
            f"{path}: keeps tensors in {location!r}, a link that leads out of its folder; put a copy there."
        )
    if not found.is_file():
        raise UserError(f"{path}: keeps tensors in {location!r}, and there is no such file beside it; copy both.")
    return found


def joined_sha256(path: Path, locations: Sequence[str]) -> str:
    """Of the file and of those that it keeps tensors in."""
    own = sha256(path)
    if not locations:
        return own
    return hashlib.sha256("".join([own, *(sha256(file_beside(path, each)) for each in locations)]).encode()).hexdigest()


def join(path: Path, model: onnx.ModelProto) -> None:
    """Bring the tensors that lie beside the file at `path` into the model."""
    total = 0
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        given = {entry.key: entry.value for entry in tensor.external_data}
        where = file_beside(path, given.get("location", ""))
        length = math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        offset, asked = (
            _number(path, given.get(key, usual)) for key, usual in (("offset", "0"), ("length", str(length)))
        )
        total += length
        if asked != length or offset + length > where.stat().st_size or total > MAX_BYTES:
            raise UserError(
                f"{path}: tensor {tensor.name!r} has {length:,} bytes, and {where.name} has not that many at "
                f"{offset:,}; the two files are not of one export."
            )
        with where.open("rb") as file:
            file.seek(offset)
            tensor.raw_data = file.read(length)
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.DEFAULT


def _number(path: Path, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise UserError(f"{path}: says {text!r} for a place in another file; it is damaged.")
    return int(text)
