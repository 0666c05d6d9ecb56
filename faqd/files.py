"""Files that are whole or absent: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faqd.errors import UserError


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder; it replaces `path` if the block ends well, else it goes.

    A folder that stands at `path` is replaced by a folder in two renames, so that a reader never sees half of one;
    it is never replaced by a file. A device or a pipe, such as /dev/null, is written to and stays what it is. An
    OSError of the block, such as a full disk, names `path`.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / path.name
            yield whole
            path.write_bytes(whole.read_bytes())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{_HERE}{os.getpid()}.partial")
    for stale in {temporary, *_of_dead_processes(path)}:
        remove(stale)
    try:
        yield temporary
        _put_in_place(temporary, path)
    except OSError as error:
        at = str(error.filename or path)
        error.filename = at.replace(str(temporary), str(path))
        if isinstance(error, FileNotFoundError) and at == str(temporary):
            raise UserError(f"{path}: no file can be made there; choose another place.") from None
        raise
    finally:
        remove(temporary)


def refuse_unwritable(path: Path) -> None:
    """UserError where a file cannot be written: to be asked before the work whose result it will hold."""
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if path.exists() and not path.is_file() and not path.is_dir():
        return
    if path.is_dir() or not folder.is_dir():
        found = f"{path} is a folder" if path.is_dir() else f"{folder} is a file"
        raise UserError(f"{path}: no file can be written there, {found}; choose another name.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{path}: no permission to write into {folder}; choose another place.")


def refuse_unmakeable(path: Path) -> None:
    """UserError where no folder can be made, or filled: to be asked before the work whose results it will hold. Some
    folders, such as /proc, say that they can be written into and let nothing be made there."""
    folder = path
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=folder):
            pass
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise UserError(f"{path}: no folder can be made there ({why.lower()}); choose another place.") from None


def _put_in_place(temporary: Path, path: Path) -> None:
    if not path.is_dir():
        temporary.replace(path)
        return
    if not temporary.is_dir():
        raise UserError(f"{path}: is a folder, and a file is to be written there; give another name.")
    retired = path.with_name(f".{path.name}.{_HERE}{os.getpid()}.old")
    remove(retired)
    path.rename(retired)
    temporary.rename(path)
    remove(retired)


_HERE = f"{platform.node() or 'here'}-"
"""Numbers of processes are those of one machine, or container: others may share the folder."""


def _of_dead_processes(path: Path) -> list[Path]:
    """What processes that were killed here left half-written of `path`."""
    start = f".{path.name}.{_HERE}"
    name = re.escape(start) + r"(\d+)\.(partial|old)"
    entries = path.parent.glob(f"{glob.escape(start)}*")
    found = [(each, match) for each in entries if (match := re.fullmatch(name, each.name))]
    return [each for each, match in found if not _is_alive(int(match[1]))]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def leftovers(folder: Path) -> list[Path]:
    """What a killed process left half-written in `folder`."""
    return [*folder.glob(".*.partial"), *folder.glob(".*.old")]


def remove(path: Path) -> None:
    """Delete a file or a folder tree; absent is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with written_beside(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The JSON in `path`; UserError where there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refused)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except RecursionError:
        raise UserError(f"{path}: not a JSON of ours, it is nested too deep; write it again.") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); the file is damaged, write it again.") from None


def _refused(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream: Any) -> str:
    # Python 3.10, the version of JetPack 6, has no hashlib.file_digest.
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
