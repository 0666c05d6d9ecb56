"""What this builder and this GPU really do with the networks that export writes: legal, in INT8, numerically right.

Every case is built as any engine is, and run on the GPU where there is one. Without a GPU only the build half is done,
and the result says so.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import tempfile
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd import __version__
from faqd.deploy.board.cases import Case, load_cases
from faqd.deploy.cuda.cuda import device_or_none
from faqd.deploy.engine.build import engine_from_onnx, new_builder
from faqd.deploy.engine.options import BuildOptions
from faqd.deploy.engine.trt import builder_here, heard
from faqd.deploy.runtime.runtime import load_engine
from faqd.errors import UserError

FORMAT = "faqd-selftest"
VERSION = 1

WITHIN_STEPS = 1.0
EQUAL_SHARE = 0.99
"""Outputs are right if none is off by more than one step, and so many are off by less than half of one."""

Say = Callable[[str], None]
Run = Callable[[Path, dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]
"""An engine file and its inputs to its outputs."""


def selftest(cases: str | None, backend: str | None, say: Say) -> dict[str, Any]:
    """Build, run and compare the cases whose name matches the regular expression `cases`; returns the record.

    backend: the CUDA binding. UserError where there is no TensorRT, or no case of that name.
    """
    every, sha256 = load_cases()
    chosen = _chosen(every, cases)
    device, why = device_or_none(backend)
    trt, remark = builder_here(device is not None)
    with heard(trt) as (log, messages):
        new_builder(trt, log, messages)  # Where none starts, that is one sentence and not one per case.
    if remark:
        say(remark)
    if device is None:
        say(f"{trt} builds {len(chosen)} cases; none is run: {why}")
    else:
        say(f"{trt} builds {len(chosen)} cases, {device.name} runs them.")
    cuda: dict[str, str] = {}
    results = []
    with tempfile.TemporaryDirectory(prefix="faqd-selftest-") as folder:
        for case in chosen:
            result = tried(case, Path(folder), None if device is None else _runner(backend, cuda))
            results.append(result)
            say(line(result))
    gpu = None if device is None else vars(device)
    return {
        "format": FORMAT,
        "version": VERSION,
        "faqd": __version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "builder": {"name": trt.name, "version": trt.version},
        "typing": "strong" if trt.strongly_typed else "weak",
        "gpu": gpu,
        "no_gpu_because": why or None,
        "cuda_backend": cuda.get("backend"),
        "machine": machine(),
        "cases_sha256": sha256,
        "summary": summary(results),
        "cases": results,
    }


def _chosen(every: list[Case], pattern: str | None) -> list[Case]:
    try:
        chosen = [case for case in every if re.search(pattern or "", case.name)]
    except re.error as error:
        raise UserError(f"--cases {pattern}: not a regular expression ({error}).") from None
    if not chosen:
        raise UserError(f"--cases {pattern}: matches none of {', '.join(case.name for case in every)}.")
    return chosen


def _runner(backend: str | None, facts: dict[str, str]) -> Run:
    def run(engine: Path, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        with load_engine(engine, backend=backend) as loaded:
            facts["backend"] = loaded.cuda.name
            return loaded.run(inputs)

    return run


def tried(case: Case, folder: Path, run: Run | None) -> dict[str, Any]:
    """The result of one case. Its files go into `folder`. run: None where nothing can be run."""
    result: dict[str, Any] = {
        "name": case.name,
        "shows": case.shows,
        "relied_on": case.relied_on,
        "outcome": "refused",
        "message": None,
        "warnings": [],
        "layers": [],
        "not_int8": [],
        "unknown": [],
        "outputs": [],
        "build_s": None,
    }
    onnx, engine = folder / f"{case.name}.onnx", folder / f"{case.name}.engine"
    onnx.write_bytes(case.onnx)
    try:
        record = engine_from_onnx(onnx, engine, BuildOptions(), lambda text: None)
    except UserError as error:
        return result | {"message": _without_folder(str(error), folder)}
    found = {product["node"]: product["int8"] for product in record["int8"]["products"]}
    result["layers"] = [{"name": name, "int8": int8, "expected": name in case.int8} for name, int8 in found.items()]
    result["not_int8"] = [name for name in case.int8 if found.get(name) is False]
    result["unknown"] = [name for name in case.int8 if found.get(name) is None]
    result["warnings"], result["build_s"] = record["warnings"], record["build_s"]
    result["outcome"] = "float" if result["not_int8"] else "built"
    if run is None:
        return result
    try:
        outputs = run(engine, case.inputs)
    except UserError as error:
        return result | {"outcome": "failed", "message": _without_folder(str(error), folder)}
    result["outputs"] = [compared(name, outputs[name], case) for name in case.expected]
    if not all(output["right"] for output in result["outputs"]):
        result["outcome"] = "wrong"
    elif not result["not_int8"]:
        result["outcome"] = "right"
    return result


OUTCOMES = {
    "right": "built, in INT8, and the outputs are right",
    "built": "built, in INT8; not run",
    "float": "built, but a layer that should run in INT8 does not",
    "refused": "not built",
    "failed": "built, and running it failed",
    "wrong": "built and run, with wrong outputs",
}


def compared(name: str, found: NDArray[Any], case: Case) -> dict[str, Any]:
    """One output against what must come out; errors count in steps, the distance of two codes."""
    expected = case.expected[name].astype(np.float64)
    if found.shape != expected.shape:
        facts = {"equal_share": 0.0, "max_steps": None, "snr_db": None, "right": False}
        return {"name": name, "found_shape": list(found.shape), "expected_shape": list(expected.shape), **facts}
    steps = np.abs(found.astype(np.float64) - expected) / case.steps[name]
    equal = float(np.mean(steps < 0.5))
    worst = float(steps.max())
    # A comparison with nan is false: an output that is no number is wrong.
    right = bool(worst <= WITHIN_STEPS * 1.001 and equal >= EQUAL_SHARE)
    return {
        "name": name,
        "elements": expected.size,
        "equal_share": equal,
        "max_steps": worst if math.isfinite(worst) else None,
        "snr_db": _snr_db(expected, found),
        "right": right,
    }


def _snr_db(expected: NDArray[np.float64], found: NDArray[Any]) -> float | None:
    """Signal to noise in dB; None where there is no noise at all, or the outputs are no numbers."""
    noise = float(np.square(found.astype(np.float64) - expected).sum())
    if not math.isfinite(noise) or noise == 0:
        return None
    signal = float(np.square(expected).sum())
    return 10 * math.log10(signal / noise) if signal else None


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """How many cases came out how, and which of those that faqd relies on did not hold."""
    outcomes = [result["outcome"] for result in results]
    return {
        "cases": len(results),
        "outcomes": {name: outcomes.count(name) for name in OUTCOMES if name in outcomes},
        "run": any(result["outputs"] for result in results),
        "broken": [r["name"] for r in results if r["relied_on"] and r["outcome"] not in ("right", "built")],
    }


def conclusion(record: dict[str, Any]) -> str:
    """The whole for people, in one sentence."""
    counts = ", ".join(f"{count} {name}" for name, count in record["summary"]["outcomes"].items())
    builder = f"{record['builder']['name']} {record['builder']['version']}"
    where = record["gpu"]["name"] if record["gpu"] else "no GPU: only the build half"
    return f"{builder}, {where}: {record['summary']['cases']} cases, {counts}."


def line(result: dict[str, Any]) -> str:
    """One case for people."""
    text = f"{result['name']}: {OUTCOMES[result['outcome']]}"
    if result["not_int8"]:
        text += f" (float: {', '.join(result['not_int8'])})"
    if result["unknown"]:
        text += f" (the builder does not tell the type of {', '.join(result['unknown'])})"
    wrong = [output for output in result["outputs"] if not output["right"]]
    for output in wrong:
        worst = "no number" if output["max_steps"] is None else f"up to {output['max_steps']:.1f} steps off"
        text += f" ({output['name']}: {output['equal_share']:.1%} equal, {worst})"
    if result["message"]:
        text += f" ({result['message']})"
    return text if result["relied_on"] else f"{text} [for information]"


def machine() -> dict[str, str | None]:
    """What the numbers belong to beside the GPU; no name of machine or user."""
    return {
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "board": _text("/proc/device-tree/model"),
        "jetson_linux": _text("/etc/nv_tegra_release"),
    }


def _text(path: str) -> str | None:
    with contextlib.suppress(OSError):
        return next(iter(Path(path).read_text(errors="replace").replace("\0", "").splitlines()), None)
    return None


def _without_folder(text: str, folder: Path) -> str:
    """The temporary folder is nobody's business."""
    return text.replace(f"{folder}{os.sep}", "")
