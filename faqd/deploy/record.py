"""The record beside an engine: what it is, what it was made from, and where it runs."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

from faqd.bundle import STUDENT_TENSORRT
from faqd.deploy.cuda_interface import Device
from faqd.deploy.trt import TensorRT, release
from faqd.errors import UserError
from faqd.files import read_json

FORMAT = "faqd-engine"
VERSION = 1


def record_path(engine: Path) -> Path:
    return engine.with_name(f"{engine.name}.json")


def read_record(engine: Path) -> dict[str, Any]:
    """The record beside an engine; UserError where it is missing, damaged, or from a newer faqd."""
    path = record_path(engine)
    if not path.is_file():
        raise UserError(f"{engine}: no record {path.name} beside it. {rebuild(engine)}")
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT or not isinstance(record.get("engine"), dict):
        raise UserError(f"{path}: not the record of an engine. {rebuild(engine)}")
    if record.get("version") != VERSION:
        raise UserError(f"{path}: record version {record.get('version')}, this faqd reads {VERSION}. {rebuild(engine)}")
    return record


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
    """UserError where another builder, or another version of it, made the engine."""
    builder = record.get("builder") or {}
    if not builder:
        return
    if builder.get("name") != trt.name or release(str(builder.get("version"))) != trt.release:
        raise UserError(
            f"{path}: built with {builder.get('name')} {builder.get('version')}, and this machine has "
            f"{trt.name} {trt.version}; an engine runs only on the version that built it. {rebuild(path)}"
        )


def check_gpu(path: Path, record: dict[str, Any], device: Device) -> None:
    """UserError where the engine was made for another kind of GPU."""
    built = record.get("gpu") or {}
    if not built or record["builder"]["name"] == "tensorrt_rtx":
        return  # TensorRT-RTX compiles its kernels where the engine is loaded.
    if built["compute_capability"] != device.compute_capability:
        raise UserError(
            f"{path}: built on {built['name']} (compute capability {built['compute_capability']}), and this machine "
            f"has {device.name} ({device.compute_capability}). {rebuild(path)}"
        )
    if built["name"] != device.name:
        warnings.warn(
            f"{path.name}: built on {built['name']}, runs on {device.name}: its kernels were chosen for the other GPU.",
            stacklevel=3,
        )


def rebuild(engine: Path) -> str:
    """How to make an engine again, as a sentence."""
    all_ = "" if engine.name == engine_name(STUDENT_TENSORRT) else " --all"
    return f"Build it on this machine: `faqd-deploy build-engine {engine.parent}{all_}`."


def engine_name(onnx: str) -> str:
    """The file name of the engine of an ONNX file of the bundle."""
    return f"{onnx.removesuffix('.onnx')}.engine"
