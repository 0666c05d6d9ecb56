"""Whether this machine can run an engine, said before it is loaded, and what to do if not."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from faqd.deploy.cuda import cuda
from faqd.deploy.cuda.interface import DRIVER, Device, driver_version
from faqd.deploy.cuda.interface import how_to_install as how_to_install_cuda
from faqd.deploy.engine.record import (
    older_driver,
    other_gpu,
    read_record,
    rebuild,
    wrong_gpu,
    wrong_system,
    wrong_version,
)
from faqd.deploy.engine.trt import NAMES, TITLES, TensorRT, by_preference, flavour
from faqd.deploy.engine.trt import how_to_install as how_to_install_tensorrt
from faqd.errors import UserError
from faqd.extras import install
from faqd.files import sha256

Status = Literal["good", "doubtful", "fails", "note"]

JETPACKS = {
    36: "JetPack 6.1 or 6.2: Python 3.10, CUDA 12.6, TensorRT 10.3",
    38: "JetPack 7.0 or 7.1: Python 3.12, CUDA 13.0, TensorRT 10.13",
    39: "JetPack 7.2 or later: Python 3.12, CUDA 13, TensorRT 10.16",
}
"""By the major version of Jetson Linux."""

_NO_GPU = "Engines run only on an NVIDIA GPU with its driver; in a container, start it with the NVIDIA runtime."


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. fails: an engine cannot run here. note: this alone decides nothing."""

    what: str
    status: Status
    found: str
    cure: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def examine(engine: Path | None) -> list[Finding]:
    """What this machine has, or whether an engine fits it; UserError where the engine or its record is missing."""
    if engine is None:
        return list(_machine())
    if engine.is_dir():
        raise UserError(f"{engine}: is a folder; name an engine in it, such as {engine / 'student.tensorrt.engine'}.")
    if not engine.is_file():
        raise UserError(f"{engine}: no such file. {rebuild(engine)}")
    return list(_fit(engine, read_record(engine)))


def lines(findings: list[Finding]) -> list[str]:
    """The findings for people, each cure below its finding."""
    width = max(len(finding.what) for finding in findings)
    told = []
    for finding in findings:
        told.append(f"{finding.status:8}  {finding.what:{width}}  {finding.found}")
        if finding.cure:
            told.append(f"{'':8}  {'':{width}}  -> {finding.cure}")
    return told


# The machine -------------------------------------------------------------------------------------------------------


def _machine() -> Iterator[Finding]:
    yield Finding("system", "note", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}")
    if (board := jetson()) is not None:
        yield Finding("Jetson", "note", board)
    yield Finding("driver", "note", driver_version() or "no kernel module of NVIDIA is loaded")
    devices = {name: cuda.device_or_none(name) for name in cuda.BACKENDS}
    for name, (device, why) in devices.items():
        yield Finding(name, "note" if device is None else "good", _reason(why) if device is None else _told(device))
    device = next((device for device, _ in devices.values() if device is not None), None)
    flavours = {name: flavour(name) for name in NAMES}
    for name, found in flavours.items():
        if isinstance(found, TensorRT):
            yield Finding(TITLES[name], "good", found.version)
        else:
            yield Finding(TITLES[name], "note", f"not usable: {found}")
    usable = [found for found in flavours.values() if isinstance(found, TensorRT)]
    yield _can_build(usable, device)
    yield _can_run(usable, device)


def _can_build(usable: list[TensorRT], device: Device | None) -> Finding:
    builders = [trt for trt in usable if trt.is_rtx or device is not None]
    if builders:
        return Finding("build engines", "good", f"with {builders[0]}")
    if usable:
        cure = f"To build and check without a GPU: {install('rtx')}"
        return Finding("build engines", "note", f"{usable[0]} builds only where there is a GPU", cure)
    return Finding("build engines", "note", "no TensorRT", how_to_install_tensorrt())


def _can_run(usable: list[TensorRT], device: Device | None) -> Finding:
    if device is None:
        cure = f"{_NO_GPU} The CUDA binding: {how_to_install_cuda()}."
        return Finding("run engines", "fails", "no GPU that can be used from here", cure)
    if not usable:
        return Finding("run engines", "fails", "no TensorRT", how_to_install_tensorrt())
    return Finding("run engines", "good", f"{usable[0]} on {device.name}")


def _reason(why: str) -> str:
    return why.removesuffix(DRIVER).strip()


def _told(device: Device) -> str:
    driver = f"driver {device.driver}, " if device.driver else ""
    return f"{device.name}, compute capability {device.compute_capability}, {driver}CUDA up to {device.cuda}"


def jetson(root: Path = Path("/")) -> str | None:
    """The board and its JetPack, None where this is no Jetson. root: where etc and proc are looked for."""
    release = root / "etc" / "nv_tegra_release"
    if not release.is_file():
        return None
    found = re.search(r"R(\d+)[^,]*, REVISION: ([\d.]+)", release.read_text(encoding="utf-8", errors="replace"))
    model = root / "proc" / "device-tree" / "model"
    board = model.read_text(encoding="utf-8", errors="replace").strip("\0\n ") if model.is_file() else "Jetson"
    if found is None:
        return board
    linux = f"{board}, Jetson Linux {found[1]}.{found[2]}"
    jetpack = JETPACKS.get(int(found[1]))
    return linux if jetpack is None else f"{linux} ({jetpack})"


# An engine ---------------------------------------------------------------------------------------------------------


def _fit(engine: Path, record: dict[str, Any]) -> Iterator[Finding]:
    cure = rebuild(engine)
    if record["engine"].get("sha256") == sha256(engine):
        yield Finding("file", "good", "the one that its record speaks of")
    else:
        yield Finding("file", "fails", "not the one that its record speaks of (SHA-256 differs)", cure)
    yield _judged("system", wrong_system(record), f"{platform.system()} {platform.machine()}", cure)
    yield _tensorrt(record, cure)
    device, why = cuda.device_or_none()
    if device is None:
        yield Finding("GPU", "fails", _reason(why), _NO_GPU)
        return
    if (doubt := other_gpu(record, device)) is not None and wrong_gpu(record, device) is None:
        yield Finding("GPU", "doubtful", doubt, cure)
    else:
        yield _judged("GPU", wrong_gpu(record, device), _told(device), cure)
    if (old := older_driver(record, device)) is not None:
        yield Finding("driver", "doubtful", old)
    else:
        yield Finding("driver", "good", device.driver or f"CUDA up to {device.cuda}")


def _tensorrt(record: dict[str, Any], cure: str) -> Finding:
    builder = record["builder"]
    name, version = builder["name"], builder["version"]
    here: list[TensorRT] = []
    reasons = []
    for one in by_preference(name):
        found = flavour(one)
        if not isinstance(found, TensorRT):
            reasons.append(f"{one}: {found}")
        elif wrong_version(record, found) is None:
            return Finding("TensorRT", "good", str(found))
        else:
            here.append(found)
    if not here:
        needs = f"needs {TITLES.get(name, name)} {version}, and none can be imported ({'; '.join(reasons)})"
        return Finding("TensorRT", "fails", needs, how_to_install_tensorrt())
    return Finding("TensorRT", "fails", str(wrong_version(record, here[0])), _same_version(name, version, cure))


def _same_version(name: str, version: str, cure: str) -> str:
    if name not in NAMES or Path("/etc/nv_tegra_release").is_file():
        return cure  # A Jetson has the TensorRT of its JetPack.
    package = name.replace("_", "-")
    return f"{cure} Or install that version: {sys.executable} -m pip install {package}=={version}"


def _judged(what: str, complaint: str | None, found: str, cure: str) -> Finding:
    if complaint is None:
        return Finding(what, "good", found)
    return Finding(what, "fails", complaint, cure)
