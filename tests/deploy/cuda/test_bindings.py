"""Both CUDA bindings as they are installed, really called, on a driver that is compiled here and needs no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
SOURCE = ROOT / "tests" / "fixtures" / "fake_driver.c"
BACKENDS = ("cuda-bindings", "pycuda")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1; in it, besides what the fake driver can, every call that pycuda is linked to."""
    if not shutil.which("gcc") or not shutil.which("nm"):
        pytest.skip("gcc and nm are needed to make the driver that these tests call")
    folder = tmp_path_factory.mktemp("driver")
    known = set(re.findall(r"\b(cu[A-Z]\w*)\(", SOURCE.read_text()))
    rest = folder / "rest.c"
    rest.write_text("\n".join(f"int {name}(void) {{ return 801; }}" for name in sorted(linked() - known)))
    library = folder / "libcuda.so.1"
    soname = "-Wl,-soname,libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-w", soname, "-o", str(library), str(SOURCE), str(rest), "-ldl"]
    subprocess.run(command, check=True)
    return folder


def linked() -> set[str]:
    package = importlib.util.find_spec("pycuda")
    if package is None or package.origin is None:
        return set()
    (module,) = Path(package.origin).parent.glob("_driver*.so")
    symbols = subprocess.run(["nm", "-D", "--undefined-only", module], capture_output=True, text=True, check=True)
    return set(re.findall(r" U (cu[A-Z]\w*)", symbols.stdout))


def life(backend: str, driver: Path) -> dict[str, Any]:
    package = {"cuda-bindings": "cuda", "pycuda": "pycuda"}[backend]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{backend} is not installed")
    environment = os.environ | {"LD_LIBRARY_PATH": str(driver), "PYTHONPATH": str(ROOT)}
    script = ROOT / "tests" / "fixtures" / "binding_life.py"
    command = [sys.executable, "-W", "error", str(script), backend]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_binding_does_all_that_is_asked_and_gives_everything_back(backend: str, driver: Path) -> None:
    found = life(backend, driver)
    assert found["name"] == backend
    assert found["device"] == {
        "name": "Fake GPU",
        "compute_capability": "8.7",
        "memory_bytes": 1 << 33,
        "cuda": "13.0",
    }
    assert found["life"] == {"came_back": True, "ms": 2.0, "stream": True, "mapped": True}
    assert (found["held"], found["after_all"]) == (0, 0)
    assert re.match(r"CUDA: cuMemAlloc failed: .*out of memory\. Take a smaller batch", found["too_much"])
    if backend == "cuda-bindings":
        assert found["graph"] == [True, True, True]
    else:
        assert found["graph"].startswith("pycuda has no CUDA graphs: use cuda-bindings")
