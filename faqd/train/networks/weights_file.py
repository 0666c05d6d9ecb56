"""A file of weights by what is in it, whatever its name: tensors are read, all else is called what it is."""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from faqd.errors import UserError, first_line
from faqd.train.networks.tensor_files import damaged_member, read_tensors

_OPERATIONS = 10_000
_HEAD = 512
"""So many bytes tell what a file is."""
_KINDS: tuple[tuple[bytes, str], ...] = (
    (rb"version https://git-lfs\.github\.com", "a pointer of Git LFS, not the weights themselves; run `git lfs pull`"),
    (rb"(?:\.\./)*\.?(?:git/annex|/annex)/", "a pointer of git-annex, not the weights themselves; run `git annex get`"),
    (
        rb"(?i:(?:\xef\xbb\xbf)?\s*<(?:!doctype|html|head|\?xml|error|!--))",
        "a web page; download the file itself",
    ),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes; save the weights from torch"),
    (rb"\x93NUMPY", "a numpy array; save the weights from torch"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF", "a picture or a sound; give the file of the weights"),
    (rb"%PDF", "a PDF document; give the file of the weights"),
    (rb"\x7fELF|MZ|#!", "a program; give the file of the weights"),
    (rb"\xff\xfe|\xfe\xff", "a text in UTF-16; give the file of the weights"),
    (rb"(?s:.{4}TFL3)", "a TensorFlow Lite file; save the weights from torch"),
    (rb"(?s:.{257}ustar)", "a tar archive; unpack it first"),
    (rb'(?s:\s*\{.*"weight_map")', "the index of weights in several files; load them and save one state dict"),
    (rb"GGUF", "a GGUF file, whose weights are quantized; give the float weights"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd|Rar!", "a compressed file; unpack it first"),
    (rb"\x08[\x01-\x20][\x12\x1a\x22\x2a\x32\x3a]", "an ONNX file by its first bytes; give the weights that torch has"),
)
"""What begins so, in words."""
_PARTS = (
    "a checkpoint of torch.distributed, in parts; make it one file: "
    "torch.distributed.checkpoint.format_utils.dcp_to_torch_save(FOLDER, 'weights.pth')"
)
_PLAIN = "torch.save(network.state_dict(), 'weights.pth')"


def read_weights_file(path: Path) -> Mapping[Any, Any]:
    """What a safetensors file holds, or a file of torch.save that has tensors and plain Python values only.

    UserError for everything else that gets such names, and where there is nothing in it.
    """
    if path.is_dir() or path.suffix == ".distcp":
        raise UserError(
            f"{path}: {_PARTS if _is_distributed(path) else 'a folder; name the file in it that has the weights'}."
        )
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: neither a file nor a folder; give a file of weights.")
    if not path.is_file():
        raise UserError(f"{path}: no such weights file.")
    with path.open("rb") as stream:
        head = stream.read(_HEAD)
    if not head:
        raise UserError(f"{path}: empty, 0 bytes; copy it again.")
    kind = _kind(path, head)
    if kind is not None:
        raise UserError(f"{path}: {kind}.")
    loaded = read_tensors(path) if _is_safetensors(head) else _from_torch(path, head)
    if isinstance(loaded, (list, tuple)) and any(isinstance(value, Mapping) for value in loaded):
        loaded = dict(enumerate(loaded))
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path}: holds a {type(loaded).__name__}, expected a state dict.")
    if not loaded:
        raise UserError(f"{path}: holds no tensor, an empty state dict; save the trained weights: {_PLAIN}.")
    return loaded


def _is_distributed(path: Path) -> bool:
    """Whether a path is of a checkpoint that several processes wrote."""
    return path.suffix == ".distcp" or any(path.glob("*.distcp"))


def _kind(path: Path, head: bytes) -> str | None:
    """What other thing than weights a file is, and what to do; None for one that may have them."""
    if zipfile.is_zipfile(path):
        return _kind_of_archive(path)
    return next((words for begin, words in _KINDS if re.match(begin, head)), None)


def _kind_of_archive(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        members = archive.namelist()
        if damaged := damaged_member(archive):
            return f"damaged, {damaged} is not what was written; copy it again"
    inside = {name.partition("/")[2] for name in members}
    if "constants.pkl" in inside:
        return (
            "a TorchScript archive, which holds code; save only its tensors: "
            f"torch.save(torch.jit.load('{path.name}').state_dict(), 'weights.pth')"
        )
    if "models/model.json" in inside or "serialized_exported_program.json" in members:
        return (
            "a program of torch.export, which holds a network beside its weights; save only its tensors: "
            f"torch.save(torch.export.load('{path.name}').state_dict, 'weights.pth')"
        )
    if any(name.endswith(".npy") for name in members):
        return "an npz file of numpy arrays; save the weights from torch"
    if "data.pkl" not in inside and "data.pkl" not in members:
        return f"a zip archive, of {members[0]} and so on; unpack it first" if members else "an empty zip archive"
    return None


def _is_safetensors(head: bytes) -> bool:
    """The length of a header in eight bytes, and that header, which is JSON."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def _from_torch(path: Path, head: bytes) -> Any:
    try:
        # Opened here: torch takes a path by its suffix.
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on damaged files; they end below
            return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: {_of_classes(str(error), path, head)}.") from error
    # A damaged file makes torch's readers raise almost anything: RuntimeError, EOFError, KeyError, struct.error.
    except Exception as error:
        if text := _text(head):
            raise UserError(f"{path}: a text, which begins with {text!r}; give the file of the weights.") from error
        raise UserError(
            f"{path}: not a readable torch file; it is damaged or cut short ({first_line(error)}). Copy it again."
        ) from error


def _of_classes(message: str, path: Path, head: bytes) -> str:
    """Why torch's reader of plain tensors stopped, by what it says, and what to do."""
    wants = re.search(r"GLOBAL ([\w.]+)", message)
    name = wants[1] if wants else _first_class(path)
    if "Uninitialized" in message:
        return (
            "weights of a lazy module that never ran, which have no size yet; save them after the network has run once "
            "and was trained"
        )
    if not name and (text := _text(head)):
        return f"a text, which begins with {text!r}; give the file of the weights"
    what = f"it holds pickled classes ({name})" if name else "it is damaged, or it holds pickled classes"
    return (
        f"cannot be read as plain tensors; {what}, which could run code. Where the network was trained, save only its "
        f"tensors: {_PLAIN}"
    )


def _first_class(path: Path) -> str:
    """The first class that a plain pickle wants; nothing of it is run."""
    words: list[str] = []
    try:
        with path.open("rb") as stream:
            for operation, argument, _ in islice(pickletools.genops(stream), _OPERATIONS):
                if operation.name == "GLOBAL":
                    return str(argument).replace(" ", ".")
                if operation.name == "STACK_GLOBAL":
                    return ".".join(words[-2:])
                words += [argument] if isinstance(argument, str) else []
    except Exception:  # of what is no pickle, anything
        pass
    return ""


def _text(head: bytes) -> str:
    """The beginning of a text; nothing where the bytes are none."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # else a letter that is cut in two
            return ""
        text = head[: error.start].decode()
    return text[:40] if all(letter.isprintable() or letter.isspace() for letter in text) else ""
