"""What installs a library that is missing: the extra of faqd that brings it, from where faqd itself came."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

from faqd import __version__

EXTRA_OF = {
    "torch": "train",
    "safetensors": "train",
    "PIL": "images",
    "sklearn": "train",
    "fsspec": "train",
    "pyarrow": "parquet",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnx_ir": "onnx",
    "onnxruntime": "onnx",
    "cuda": "device",
    "pycocotools": "detection",
    "tensorboard": "tensorboard",
}
"""By the name that is imported."""


def install(extra: str) -> str:
    """A line for a shell that brings an extra, as "pip install './faqd[onnx]'".

    No index has faqd, so the line names the checkout or the wheel that it was installed from, and pip as this Python
    has it.
    """
    return f"{_pip()} install {_quoted(f'{_origin()}[{extra}]')}"


def _origin() -> str:
    """The checkout that runs, else the wheel or checkout that pip has written down, else the wheel by its name."""
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "setup.cfg").is_file():
        return _from_here(checkout)
    wheel = f"faqd-{__version__}-py3-none-any.whl"
    try:
        told = json.loads(metadata.distribution("faqd").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return wheel
    place = urlsplit(str(told.get("url", "")))
    path = Path(unquote(place.path))
    return _from_here(path) if place.scheme == "file" and path.exists() else wheel


def _from_here(path: Path) -> str:
    """A path as pip takes it for one: relative where it is near, and never a bare name, which would be a project's."""
    here = Path.cwd()
    if path == here:
        return "."
    return f"./{path.relative_to(here)}" if path.is_relative_to(here) else str(path)


def _pip() -> str:
    found = shutil.which("pip")
    if found is not None and Path(found).parent == Path(sys.executable).parent:
        return "pip"
    python = Path(sys.executable)
    near = python.is_relative_to(Path.cwd())
    return f"{shlex.quote(os.path.relpath(python) if near else str(python))} -m pip"


def _quoted(text: str) -> str:
    return shlex.quote(text) if "'" in text else f"'{text}'"
