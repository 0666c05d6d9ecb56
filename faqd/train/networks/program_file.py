"""A network with its weights in one file, as torch.export.save writes it: no Python of the user's is needed.

torch's own reader runs what such a file may hold: pickled objects, compiled libraries, sizes as Python expressions. So
the archive is looked through first, and nothing but tensors and torch's own operators is read.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from faqd.errors import UserError, first_line
from faqd.quantize.capture.program import as_plain_modules, quiet
from faqd.train.networks.tensor_files import damaged_member

SUFFIX = ".pt2"
_MEMBERS = re.compile(
    r"data/(weights|constants)/[\w.-]+|data/sample_inputs/[\w.-]+\.pt|models/[\w.-]+\.json|extra/.*"
    r"|archive_format|archive_version|byteorder|\.data/[\w.-]+"
)
_TARGETS = re.compile(
    r"torch\.ops\.aten\.\w+\.\w+|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)|_operator\.\w+"
    r"|math\.\w+|torch\.sym_\w+"
)
_SYMBOLS = re.compile(
    r"'?[su]\d+'?|[A-Z]\w*|positive|nonnegative|integer|int_oo|oo|"
    r"\d+(\.\d+)?|[-+*/%(), <>=!&|~]+"
)
"""What sizes are made of: symbols, functions of sympy, numbers and signs, and no attribute of anything."""


def read_program(path: Path) -> nn.Module:
    """The network of a file of torch.export.save. UserError where it is none, is damaged, or holds anything but tensors
    and torch's own operators."""
    network: nn.Module = as_plain_modules(_loaded(path))
    return network


def program_input(path: Path) -> tuple[int, tuple[int, int]] | None:
    """(channels, (H, W)) of the images that such a program takes; None where it leaves one of them free. UserError as
    `read_program` has it."""
    program = _loaded(path)
    names = program.graph_signature.user_inputs
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    shapes = [tuple(node.meta["val"].shape) for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    if len(shapes) != 1 or len(shapes[0]) != 4 or not all(isinstance(size, int) for size in shapes[0][1:]):
        return None
    _, channels, height, width = shapes[0]
    return channels, (height, width)


def _loaded(path: Path) -> torch.export.ExportedProgram:
    try:
        with zipfile.ZipFile(path) as archive:
            _refuse_all_but_tensors(path, archive)
    except UserError:
        raise
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, NotImplementedError, OSError) as error:
        raise UserError(f"{path}: no program of torch.export.save, or damaged ({first_line(error)}).") from error
    try:
        with quiet(), _tensors_only():
            return torch.export.load(path)
    except Exception as error:  # a file of another version of torch, or one that is damaged, may raise almost anything
        raise UserError(
            f"{path}: torch {torch.__version__} cannot read this program "
            f"({first_line(error) or type(error).__name__}); export it again with this version."
        ) from error


def _refuse_all_but_tensors(path: Path, archive: zipfile.ZipFile) -> None:
    if damaged := damaged_member(archive):
        raise UserError(f"{path}: damaged, {damaged} is not what was written; copy it again.")
    if "serialized_exported_program.json" in archive.namelist():
        raise UserError(f"{path}: written by an older torch; export it again with torch {torch.__version__}.")
    names = {member: member.partition("/")[2] for member in archive.namelist()}
    if not any(name.startswith("models/") for name in names.values()):
        raise UserError(f"{path}: holds no program; torch.export.save writes one.")
    for member, name in names.items():
        if not _MEMBERS.fullmatch(name):
            raise UserError(f"{path}: holds {member}, which is neither a tensor nor a graph; only such files are read.")
        if name.startswith("models/"):
            _refuse_code(path, json.loads(archive.read(member)))
        if name.startswith("data/") and name.endswith(".json"):
            for key, entry in json.loads(archive.read(member))["config"].items():
                if not re.fullmatch(r"(weight|tensor)_\d+", str(entry["path_name"])):
                    raise UserError(f"{path}: its {key} is a pickled object and no tensor; only tensors are read.")


def _refuse_code(path: Path, value: Any) -> None:
    """UserError for an operator that is not torch's own, and for an expression that is no arithmetic of sizes."""
    for key, text in _texts(value):
        if key == "target" and not _TARGETS.fullmatch(text):
            raise UserError(f"{path}: calls {text}, which is none of torch's own operators (aten).")
        if key == "expr_str" and _SYMBOLS.sub("", text):
            raise UserError(f"{path}: has {text!r} for a size, which is no arithmetic of sizes.")


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _texts(entry, name)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry, key)
    elif isinstance(value, str):
        yield key, value


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Lets torch.load unpickle nothing but tensors, whatever torch's reader asks of it."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
