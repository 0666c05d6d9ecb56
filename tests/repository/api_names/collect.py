"""Writes names.txt beside this file: what the Python bindings of each TensorRT version really offer.

    python tests/repository/api_names/collect.py

needs pip, gcc, a Python 3.11 and, for TensorRT-RTX, the package tensorrt-rtx. The bindings come from the index as
wheels without the libraries, which are several GB; each is imported in a process of its own, against stand-in
libraries that export the symbols it asks for. Nothing of TensorRT is run: classes, members, and the return types that
the bindings state in their docstrings are there as soon as the import succeeds.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

BINDINGS = ("10.3.0", "10.7.0", "10.12.0.36", "10.13.3.9.post1", "10.16.1.11", "11.0.0.114", "11.4.0.106")
PYTHON = "3.11"
PLATFORMS = ("manylinux_2_17_x86_64", "manylinux_2_28_x86_64")
NAMES = Path(__file__).with_name("names.txt")

# Hundreds of lines that this project has no use for: what plugins are made of, and the layers one by one.
LEFT_OUT = re.compile(r"Plugin|QuickPlugin|^I\w+Layer$|^(?:Loop|Tensor)?(?:DimensionOperation|Weights)$")
KEPT = ("ILayer",)

Names = dict[str, str]
"""`Class.member`, or the class alone, to the class that it returns or holds (empty if none, or not of TensorRT)."""


def main() -> None:
    tables = {}
    for version in BINDINGS:
        with tempfile.TemporaryDirectory() as folder:
            tables[".".join(version.split(".")[:2])] = names_of(bindings(version, Path(folder)))
    rtx = importlib.import_module("tensorrt_rtx")
    tables["rtx-" + ".".join(rtx.__version__.split(".")[:2])] = names_in(rtx)
    versions = [*BINDINGS, f"TensorRT-RTX {rtx.__version__}"]
    NAMES.write_text(listing(tables, versions), encoding="utf-8")


def bindings(version: str, folder: Path) -> Path:
    """A folder from which `tensorrt_bindings` of that version can be imported, stand-ins included."""
    wanted = ["--python-version", PYTHON, "--implementation", "cp", "--abi", f"cp{PYTHON.replace('.', '')}"]
    wanted += ["--abi", "none", *(word for name in PLATFORMS for word in ("--platform", name))]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", *wanted]
    subprocess.run([*pip, "--dest", str(folder), f"tensorrt-cu12-bindings=={version}"], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    extension = next(folder.glob("tensorrt_bindings/*.so"))
    dynamic = output("readelf", "--dynamic", str(extension))
    stand_in = folder / "stand_in.c"
    undefined = output("nm", "--dynamic", "--undefined-only", str(extension))
    symbols = re.findall(r" U (create\w+_INTERNAL|get\w*(?:Plugin|NvOnnx)\w+|init\w+)$", undefined, re.MULTILINE)
    stand_in.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols))
    for library in re.findall(r"\[(libnv\w+\.so\.\d+)\]", dynamic):
        subprocess.run(
            ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", folder / library, stand_in], check=True
        )
    return folder


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def names_of(folder: Path) -> Names:
    """names_in() of the bindings in `folder`, in a process that finds the stand-ins."""
    code = "import json, collect, tensorrt_bindings; print(json.dumps(collect.names_in(tensorrt_bindings)))"
    paths = f"{folder}:{Path(__file__).parent}"
    environment = {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": paths}
    command = [sys.executable, "-W", "ignore", "-c", code]
    names: Names = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
    return names


def names_in(module: Any) -> Names:
    found: Names = {}
    for name, value in vars(module).items():
        if inspect.isclass(value) and not name.startswith("_") and (name in KEPT or not LEFT_OUT.search(name)):
            found[name] = ""
            found |= {f"{name}.{member}": held for member, held in members(value).items()}
    classes = found.keys()
    return {name: held if held in classes else "" for name, held in found.items()}


def members(of: type) -> Names:
    found = {}
    for name in dir(of):
        if not name.startswith("_"):
            value = inspect.getattr_static(of, name)
            text = getattr(getattr(value, "fget", None) or getattr(of, name), "__doc__", None) or ""
            returned = re.search(r"-> (?:List\[|Optional\[|list\[)?[\w.]*?(\w+)\]?(?: \| None)?$", text, re.MULTILINE)
            constant = type(value).__module__.startswith("tensorrt")
            found[name] = type(value).__name__ if constant else returned[1] if returned else ""
    return found


def listing(tables: dict[str, Names], versions: list[str]) -> str:
    every = " ".join(tables)
    lines = [
        f"# The Python API of {', '.join(versions)}; written by tests/repository/api_names/collect.py.",
        "# NAME, then `-> CLASS` that it returns or holds, then the versions that have it where not all do.",
        f"# versions: {every}",
    ]
    for name in sorted(set().union(*tables.values())):
        have = " ".join(version for version, table in tables.items() if name in table)
        held = next((table[name] for table in reversed(tables.values()) if table.get(name)), "")
        lines.append(name + (f" -> {held}" if held else "") + ("" if have == every else f" | {have}"))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
