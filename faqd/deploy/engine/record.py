"""The record beside an engine: what it is, what it was made from, and where it runs."""

from __future__ import annotations

import hashlib
import platform
import warnings
from pathlib import Path
from typing import Any

from faqd.bundle import STUDENT_TENSORRT
from faqd.deploy.cuda.interface import Device
from faqd.deploy.engine.trt import TITLES, TensorRT, release
from faqd.errors import UserError
from faqd.files import read_json
from faqd.schema import Many, Maybe, unprintable, wrong

AMPERE = (8, 0)
RTX_LEAST = AMPERE
"""What TensorRT-RTX builds for where no target is named, as build-engine does."""
RTX_DOCUMENTED = ("8.0", "8.6", "8.9", "12.0", "12.1")

FORMAT = "faqd-engine"
VERSION = 1


def record_path(engine: Path) -> Path:
    return engine.with_name(f"{engine.name}.json")


def read_record(engine: Path) -> dict[str, Any]:
    """The record beside an engine; UserError where it is missing, damaged, or from a newer faqd."""
    path = record_path(engine)
    if not path.is_file():
        raise UserError(f"{engine}: no record {path.name} beside it. {rebuild(engine)}")
    try:
        record = read_json(path)
    except UserError as error:
        raise UserError(f"{error} {rebuild(engine)}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT or not isinstance(record.get("engine"), dict):
        raise UserError(f"{path}: not the record of an engine. {rebuild(engine)}")
    if not _is_whole(record):
        raise UserError(f"{path}: the record is damaged. {rebuild(engine)}")
    if record.get("version") != VERSION:
        raise UserError(
            f"{path}: record version {record.get('version')!r}, this faqd reads {VERSION}. {rebuild(engine)}"
        )
    return record


_READ = {
    "onnx": {"sha256": str},
    "layers_read_from": Maybe(str),
    "int8": {"products": Many({"node": str, "int8": Maybe(bool)})},
}


def _is_whole(record: dict[str, Any]) -> bool:
    """Whether what is read below is there: GPU, platform and options may be missing, half of one may not."""
    needed = {"gpu": ("name", "compute_capability", "cuda"), "platform": ("system", "architecture"), "options": ()}
    parts = {"builder": ("name", "version"), **{name: keys for name, keys in needed.items() if record.get(name)}}
    found = {name: record.get(name) for name in parts}
    if unprintable(record) is not None or next(wrong(record, {k: r for k, r in _READ.items() if k in record}), None):
        return False
    return all(
        isinstance(part, dict) and all(isinstance(part.get(key), str) and part[key] for key in parts[name])
        for name, part in found.items()
    )


def record_of(path: Path, plan: bytes, trust: bool) -> dict[str, Any]:
    """The record of exactly these bytes; empty where there is none and the engine is trusted without."""
    if trust and not record_path(path).is_file():
        return {}
    record = read_record(path)
    if record["engine"].get("sha256") == hashlib.sha256(plan).hexdigest():
        return record
    if trust:
        return {}
    raise UserError(
        f"{path}: not the engine that its record {record_path(path).name} speaks of (SHA-256 differs). An engine is "
        f"code, so it is not loaded. {rebuild(path)} If you know where it comes from: --trust."
    )


def check_version(path: Path, record: dict[str, Any], trt: TensorRT) -> None:
    """UserError where another builder, or another version of it, made the engine, or another kind of system."""
    for complaint in (wrong_version(record, trt), wrong_system(record)):
        if complaint is not None:
            raise UserError(f"{path}: {complaint} {rebuild(path)}")


def check_gpu(path: Path, record: dict[str, Any], device: Device) -> None:
    """UserError where the engine was made for another kind of GPU, a warning where for another of its kind."""
    complaint = wrong_gpu(record, device)
    if complaint is not None:
        raise UserError(f"{path}: {complaint} {rebuild(path)}")
    if (doubt := other_gpu(record, device)) is not None:
        warnings.warn(f"{path.name}: {doubt}", stacklevel=3)


# Each of these is a sentence, or None where nothing is to be said. A record without an entry is not held against it:
# an engine may be trusted without one.


def wrong_version(record: dict[str, Any], trt: TensorRT) -> str | None:
    builder = record.get("builder")
    if not builder:
        return None
    name, version = str(builder["name"]), str(builder["version"])
    built = release(version)
    if name == trt.name and (built == trt.release or (_option(record, "version_compatible") and _newer(built, trt))):
        return None
    return (
        f"built with {TITLES.get(name, name)} {version}, and this machine has {trt}; an engine runs only on the "
        "version that built it."
    )


def _newer(built: tuple[int, ...], trt: TensorRT) -> bool:
    """A version-compatible engine runs on what came after its builder: the same major version, and 10 on 11."""
    majors = built[:1], trt.release[:1]
    return built < trt.release and (majors[0] == majors[1] or majors == ((10,), (11,)))


def wrong_system(record: dict[str, Any]) -> str | None:
    built = record.get("platform")
    if not built or _is_rtx(record):
        return None  # TensorRT-RTX compiles its kernels where the engine is loaded.
    here = {"system": platform.system(), "architecture": platform.machine()}
    if built == here:
        return None
    return (
        f"built on {built['system']} {built['architecture']}, and this machine is {here['system']} "
        f"{here['architecture']}; an engine stays with its kind."
    )


def wrong_gpu(record: dict[str, Any], device: Device) -> str | None:
    here = _capability(device.compute_capability)
    if _is_rtx(record):
        if here >= RTX_LEAST:
            return None
        return (
            f"a portable engine of TensorRT-RTX runs on compute capability {_dotted(RTX_LEAST)} and above, and "
            f"{device.name} has {device.compute_capability}."
        )
    built = record.get("gpu")
    if not built or built["compute_capability"] == device.compute_capability:
        return None
    at = f"built on {built['name']} (compute capability {built['compute_capability']})"
    if _option(record, "hardware_compatibility") == "ampere+":
        if here >= AMPERE:
            return None
        at += f" for {_dotted(AMPERE)} and above"
    return f"{at}, and this machine has {device.name} ({device.compute_capability})."


def other_gpu(record: dict[str, Any], device: Device) -> str | None:
    """What a GPU that does run the engine has against it."""
    if _is_rtx(record):
        if device.compute_capability in RTX_DOCUMENTED:
            return None
        return (
            f"TensorRT-RTX is documented for compute capability {', '.join(RTX_DOCUMENTED)}, and {device.name} has "
            f"{device.compute_capability}: nobody has said that it runs there."
        )
    built = record.get("gpu")
    if not built or built["name"] == device.name:
        return None
    return f"built on {built['name']}, runs on {device.name}: its kernels were chosen for the other GPU."


def older_driver(record: dict[str, Any], device: Device) -> str | None:
    built = record.get("gpu")
    if not built or release(str(built["cuda"])) <= release(device.cuda):
        return None
    return f"built where the driver knew CUDA {built['cuda']}; the driver here knows {device.cuda}: update it."


def _is_rtx(record: dict[str, Any]) -> bool:
    return (record.get("builder") or {}).get("name") == "tensorrt_rtx"


def _option(record: dict[str, Any], name: str) -> Any:
    return (record.get("options") or {}).get(name)


def _capability(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _dotted(capability: tuple[int, ...]) -> str:
    return ".".join(map(str, capability))


def rebuild(engine: Path) -> str:
    """How to make an engine again, as a sentence."""
    all_ = "" if engine.name == engine_name(STUDENT_TENSORRT) else " --all"
    return f"Build it on this machine: `faqd-deploy build-engine {engine.parent}{all_}`."


def engine_name(onnx: str) -> str:
    """The file name of the engine of an ONNX file of the bundle."""
    return f"{onnx.removesuffix('.onnx')}.engine"
