"""The cases of the self-test as they travel with the package: tiny ONNX files, inputs, and what must come out.

They are made where onnx is installed (tests/fixtures/selftest_networks.py) and read here with numpy alone, without
pickle.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.errors import UserError

CASES_FILE = Path(__file__).with_name("selftest_cases.npz")
FORMAT = "faqd-selftest-cases"
VERSION = 1

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Case:
    """shows: what it is for. relied_on: whether faqd's own export needs it to hold. int8: the layers that should run
    in INT8. steps: per output the distance of two neighbouring codes, in which errors are counted."""

    name: str
    shows: str
    relied_on: bool
    int8: tuple[str, ...]
    steps: dict[str, float]
    onnx: bytes
    inputs: Arrays
    expected: Arrays


def load_cases(path: Path = CASES_FILE) -> tuple[list[Case], str]:
    """All cases in order, and the SHA-256 of their file; UserError where the installation lacks it or it is damaged."""
    try:
        data = path.read_bytes()
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = dict(file)
        index = json.loads(arrays["index"].tobytes())
        if (index["format"], index["version"]) != (FORMAT, VERSION):
            raise ValueError(f"{index['format']} version {index['version']}, expected {FORMAT} {VERSION}")
        return [_case(entry, arrays) for entry in index["cases"]], hashlib.sha256(data).hexdigest()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: the cases of the self-test cannot be read ({error}); install faqd again.") from error


def _case(entry: dict[str, Any], arrays: Arrays) -> Case:
    return Case(
        name=entry["name"],
        shows=entry["shows"],
        relied_on=entry["relied_on"],
        int8=tuple(entry["int8"]),
        steps=entry["steps"],
        onnx=arrays[entry["onnx"]].tobytes(),
        inputs={name: arrays[key] for name, key in entry["inputs"].items()},
        expected={name: arrays[key] for name, key in entry["expected"].items()},
    )
