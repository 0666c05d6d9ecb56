"""nvidia-ml-py as it is installed: without NVML's library, and really called on one that is compiled here."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests" / "fixtures" / "fake_nvml.c"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pynvml") is None, reason="nvidia-ml-py is not installed (pip install 'faqd[nvml]')"
)
SCRIPT = """
import json
from pathlib import Path
from faqd.benchmarks.measure.clocks import Clocks
from faqd.benchmarks.measure.energy import find_meter
nowhere = Path("/nowhere")
meter, why = find_meter("Some GPU", root=nowhere)
clocks = Clocks("Some GPU", nowhere)
found = {"why": why, "clocks": clocks.read(), **clocks.to_json()}
if meter is not None:
    found |= {"watts": meter.watts(), "joules": [meter.joules(), meter.joules()], "rail": meter.name}
print(json.dumps(found))
"""


def asked(library: Path | None, kind: str = "") -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FAKE_NVML": kind}
    environment |= {"LD_LIBRARY_PATH": str(library)} if library else {}
    command = [sys.executable, "-W", "error", "-c", SCRIPT]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libnvidia-ml.so.1."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is needed to make the NVML that these tests call")
    folder = tmp_path_factory.mktemp("nvml")
    target = folder / "libnvidia-ml.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", str(target), str(SOURCE)], check=True)
    return folder


def test_without_the_library_of_the_driver_the_reason_is_nvmls_own() -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has NVIDIA's driver, and so its NVML")
    found = asked(None)
    reason = "NVML cannot be asked here: NVML Shared Library Not Found"
    assert found["why"] == f"no power rail under /sys/class/hwmon; {reason}"
    assert found["status"] == f"no clocks and no temperatures under /sys; {reason}"


def test_power_energy_clocks_and_temperature_come_in_our_units(library: Path) -> None:
    found = asked(library)
    assert (found["why"], found["status"], found["rail"]) == ("", "read", "GPU board")
    assert found["watts"] == 70.0
    before, after = found["joules"]
    assert after - before == pytest.approx(0.5)
    assert found["clocks"] | {"cpu_mhz": None} == {
        "gpu_mhz": 2040.0,
        "memory_mhz": 6251.0,
        "cpu_mhz": None,
        "temperature_c": {"GPU": 61.0},
        "power_mode": None,
        "power_w": 70.0,
        "power_limit_w": 72.0,
    }


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("none", "NVML cannot be asked here: Driver Not Loaded"),
        ("orin", "NVML does not tell the power of Some GPU (it answers NotSupported)"),
    ],
)
def test_what_nvml_does_not_tell_is_no_energy_data_with_its_reason(library: Path, kind: str, reason: str) -> None:
    found = asked(library, kind)
    assert reason in found["why"] and "watts" not in found
    assert all(not value for value in found["clocks"].values())
