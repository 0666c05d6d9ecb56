"""Files of tensors and nothing else: safetensors, and archives whose checksums hold."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from faqd.errors import UserError, first_line
from faqd.files import written_beside

_PIECE = 2**20


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; UserError if it is damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or cut short ({first_line(error)}); copy or write it again.") from error


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Of the safetensors file that `write_tensors` would write."""
    return hashlib.sha256(_bytes_of(tensors)).hexdigest()


_STATED = "faqd"
"""The one key: safetensors writes several in any order."""


def stated_in(path: Path) -> str | None:
    """What a safetensors file says beside its tensors."""
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get(_STATED)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], stated: str | None = None) -> None:
    """A safetensors file, whole or absent, and an OSError where it cannot be written. stated: what it says beside."""
    with written_beside(path) as temporary:
        # safetensors' own writer turns a full disk into an error that does not say so.
        temporary.write_bytes(_bytes_of(tensors, stated))


def _bytes_of(tensors: Mapping[str, Tensor], stated: str | None = None) -> bytes:
    # Clones, because safetensors refuses tensors that share memory and a network may have one module in two places.
    plain = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    return safetensors_bytes(plain, None if stated is None else {_STATED: stated})


def damaged_member(archive: zipfile.ZipFile) -> str | None:
    """A member of an archive that is not what its checksum says, which torch's reader does not ask.

    A checksum of 0 says nothing: torch.save writes that where it is told to compute none.
    """
    return next((info.filename for info in archive.infolist() if info.CRC and not _is_whole(archive, info)), None)


def _is_whole(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(member) as stream:
            while stream.read(_PIECE):
                pass
    except (zipfile.BadZipFile, zlib.error):
        return False
    return True
