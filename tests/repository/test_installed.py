"""What an installation without any extra can do. The file needs nothing beside it: CI runs it far from the checkout."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import click
import pytest

from faqd.benchmarks.cli import bench_command
from faqd.bundle import write_manifest
from faqd.cli import cli as faqd_cli
from faqd.deploy.cli import cli as deploy_cli
from faqd.train.cli import cli as train_cli

TRAINING = ("torch", "safetensors", "PIL", "sklearn")
ONNX = ("onnx", "onnx_ir", "onnxruntime", "onnxscript")
DEVICE = ("cuda", "pycuda", "tensorrt", "tensorrt_rtx")

# On a board: an engine is built, loaded, run and benched with these.
ON_A_BOARD = ("board", "cuda", "engine", "runtime")
BENCH = ("backends", "measure", "record", "report")

TOOLS: dict[str, click.Command] = {
    "faqd": faqd_cli,
    "faqd-train": train_cli,
    "faqd-deploy": deploy_cli,
    "faqd-bench": bench_command,
}
LINES = [
    [tool, *subcommand]
    for tool, command in TOOLS.items()
    for subcommand in [[], *([name] for name in (command.commands if isinstance(command, click.Group) else ()))]
]


def python(code: str, *, without: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter in which the packages `without` cannot be imported."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({without!r}))\n"
    return subprocess.run([sys.executable, "-W", "error", "-c", blocked + code], capture_output=True, text=True)


def modules(package: str) -> list[str]:
    """The modules of a folder of the package, without those of its subfolders."""
    names = (entry.name for entry in importlib.resources.files(package).iterdir())
    return sorted(f"{package}.{name[:-3]}" for name in names if name.endswith(".py") and not name.startswith("__"))


@pytest.mark.parametrize("package", ["faqd", "faqd.calib"])
def test_the_core_and_calib_import_with_numpy_and_click_alone(package: str) -> None:
    assert modules(package)
    result = python(f"import {', '.join(modules(package))}", without=TRAINING + ONNX + DEVICE)
    assert result.returncode == 0, result.stderr


def test_what_runs_on_a_board_imports_without_torch_onnx_and_images() -> None:
    packages = [f"faqd.deploy.{name}" for name in ON_A_BOARD] + [f"faqd.benchmarks.{name}" for name in BENCH]
    names = [name for package in ("faqd.benchmarks", *packages) for name in modules(package)]
    names += ["faqd.deploy.cli", "faqd.deploy.onnx_model.scan"]
    names.remove("faqd.benchmarks.backends.sessions")  # onnxruntime is its job
    names.remove("faqd.benchmarks.measure.eval_data")  # pictures are its job, and what a teacher makes of them
    result = python(f"import {', '.join(names)}", without=TRAINING + ONNX + DEVICE)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_every_help_works(line: list[str]) -> None:
    script = Path(sysconfig.get_path("scripts")) / line[0]
    code = (
        f"import runpy; sys.argv = {[str(script), *line[1:], '--help']!r}\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    result = python(code, without=TRAINING + ONNX + DEVICE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"Usage: {' '.join(line)} ")


@pytest.mark.parametrize("package", ["faqd", "faqd.train", "faqd.deploy", "faqd.benchmarks", "faqd.demo"])
def test_a_tool_is_also_a_module(package: str) -> None:
    code = f"import runpy; sys.argv[1:] = ['--help']; runpy.run_module({package!r}, run_name='__main__')"
    result = python(code, without=TRAINING + ONNX + DEVICE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Usage: ")


@pytest.mark.parametrize(
    ("line", "extra"),
    [
        ("faqd-train teacher --recipe digits-teacher --out run", "train"),
        ("faqd-deploy ptq --teacher net.py:build --data digits --out bundle", "train"),
    ],
)
def test_a_missing_library_is_named_with_its_cure(line: str, extra: str, tmp_path: Path) -> None:
    tool, *arguments = line.split()
    code = (
        f"import os, runpy; os.chdir({str(tmp_path)!r}); sys.argv = {[tool, *arguments]!r}\n"
        f"runpy.run_path({str(Path(sysconfig.get_path('scripts')) / tool)!r}, run_name='__main__')"
    )
    result = python(code, without=TRAINING + ONNX)
    assert result.returncode == 2
    assert re.search(rf"pip install '\S+\[{extra}\]'", result.stderr), result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_recipes_are_listed_without_torch() -> None:
    code = "from faqd.train.cli import main; sys.argv[1:] = ['recipes']; main()"
    result = python(code, without=TRAINING + ONNX + DEVICE)
    assert (result.returncode, result.stderr) == (0, "")
    assert "digits-teacher" in result.stdout and "reference-code" in result.stdout


def test_a_bundle_is_read_and_a_changed_one_refused(tmp_path: Path) -> None:
    (tmp_path / "teacher.onnx").write_bytes(bytes.fromhex("3a020a00"))  # a graph of one node
    facts = {
        "name": "tiny 8/8",
        "kind": "ptq",
        "weight_bits": 8,
        "act_bits": 8,
        "target": "tensorrt",
        "layers": [],
        "size": dict.fromkeys(("parameters", "float32_bytes", "int8_bytes", "packed_bytes"), 1024),
        "architecture": "tiny",
        "preprocess": {"height": 8, "width": 8, "mean": [0.5], "std": [0.5], "resize": "stretch", "channels": "grey"},
        "classes": None,
        "input": {"name": "input", "shape": ["batch", 1, 8, 8]},
        "outputs": [{"name": "logits", "shape": ["batch", 10]}],
        "teacher": {"name": "tiny", "sha256": "0" * 64},
    }
    write_manifest(tmp_path, facts, {"teacher.onnx": "0" * 64})
    code = f"from faqd.deploy.cli import main; sys.argv[1:] = ['inspect', {str(tmp_path)!r}]; main()"
    result = python(code, without=TRAINING + ONNX + DEVICE)
    assert (result.returncode, result.stderr) == (0, "")
    assert "bundle tiny 8/8 (ptq)" in result.stdout
    (tmp_path / "teacher.onnx").write_bytes(b"other weights")
    result = python(code, without=TRAINING + ONNX + DEVICE)
    assert result.returncode == 2
    assert "teacher.onnx: changed since the bundle was written" in result.stderr


@pytest.mark.parametrize("without", [TRAINING + ONNX, TRAINING + ONNX + DEVICE], ids=["device extra", "base"])
def test_the_doctor_works_without_anything(without: tuple[str, ...], tmp_path: Path) -> None:
    code = "from faqd.deploy.cli import main; sys.argv[1:] = {!r}; main()"
    result = python(code.format(["doctor"]), without=without)
    assert result.returncode in (0, 1), result.stderr
    assert "run engines" in result.stdout and "Traceback" not in result.stderr
    engine = tmp_path / "net.engine"
    engine.write_bytes(b"plan")
    record = {
        "format": "faqd-engine",
        "version": 1,
        "engine": {"sha256": hashlib.sha256(b"plan").hexdigest()},
        "builder": {"name": "tensorrt", "version": "8.5.0"},
    }
    engine.with_name("net.engine.json").write_text(json.dumps(record))
    result = python(code.format(["doctor", str(engine)]), without=without)
    assert result.returncode == 1, result.stderr
    assert "8.5.0" in result.stdout and "error: " in result.stderr


def test_a_board_gets_its_commands() -> None:
    assert {"build-engine", "doctor", "selftest"} <= deploy_cli.commands.keys()


def test_a_recorded_run_is_shown_judged_and_compared(tmp_path: Path) -> None:
    """With neither a GPU nor onnxruntime: the record is all that table, report, gates and comparison need."""
    run, page = tmp_path / "run.json", tmp_path / "run.html"
    run.write_text(json.dumps(RECORD))
    code = "from faqd.benchmarks.cli import main; sys.argv[1:] = {!r}; main()"
    shown = python(code.format(["--from", str(run), "--report", str(page)]), without=TRAINING + ONNX + DEVICE)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "student 8/8" in shown.stdout and "0.250" in shown.stdout
    assert "student 8/8" in page.read_text(encoding="utf-8")
    for gate, code_wanted in (("0.3", 0), ("0.2", 1)):
        line = ["--from", str(run), "--max-p99-ms", gate]
        assert python(code.format(line), without=TRAINING + ONNX + DEVICE).returncode == code_wanted
    compared = python(code.format(["--compare", str(run), str(run)]), without=TRAINING + ONNX + DEVICE)
    assert compared.returncode == 0 and "within noise" in compared.stdout


def _share(count: int) -> dict[str, Any]:
    return {
        "value": count / 100,
        "low": count / 100 - 0.05,
        "high": min(1.0, count / 100 + 0.05),
        "count": count,
        "n": 100,
    }


def _network(role: str, **changes: Any) -> dict[str, Any]:
    accuracy: dict[str, Any] = dict.fromkeys(
        ("top1", "top5", "gap_to_teacher", "ratio_to_teacher", "tiers", "agreement", "kl_to_teacher_nats", "snr_db")
    )
    entry: dict[str, Any] = {"id": role, "role": role, "bundle": 0, "name": f"{role} 8/8", "kind": "float"}
    entry |= {"weight_bits": 8, "act_bits": 8, "file_bytes": 1024, "latency": [], "speed_up": []}
    empty = ("size", "own_float", "loaded", "metric", "layers", "energy", "sweep", "sustained")
    return {**entry, **dict.fromkeys(empty), "accuracy": accuracy | {"top1": _share(95)}, **changes}


_CLOCKS = dict.fromkeys(("gpu_mhz", "memory_mhz", "cpu_mhz", "power_mode", "power_w", "power_limit_w"))
_LATENCY = {
    "batch": 1,
    "samples": 1000,
    **dict.fromkeys(("min_ms", "median_ms", "mean_ms", "max_ms"), 0.25),
    "coefficient_of_variation": 0.01,
    "percentiles_ms": {"90": 0.25, "95": 0.25, "99": 0.25},
    "throughput_queries_per_s": 4000.0,
    "throughput_images_per_s": 4000.0,
    "round_medians_ms": [0.25] * 10,
    "distribution_ms": [0.25] * 101,
    "parts": None,
    "one_ahead": None,
    "cuda_graph": None,
    "warnings": [],
}
_STUDENT = _network("student", kind="distilled", latency=[_LATENCY])
_STUDENT["accuracy"] |= {"agreement": _share(97), "kl_to_teacher_nats": 0.01, "snr_db": {"logits": 30.0}}
_STUDENT["accuracy"] |= {
    "gap_to_teacher": {"value": 0.0, "low": -0.01, "high": 0.01, "n": 100},
    "ratio_to_teacher": 1.0,
}
RECORD = {
    "format": "faqd-bench",
    "version": 2,
    "faqd": "0.1.0",
    "command": ["faqd-bench", "bundle"],
    "switches": {
        **dict.fromkeys(("preset", "cuda_graph", "spin_wait", "transfers")),
        "backend": "onnxruntime",
        "batch": [1],
        "percentiles": [90.0, 95.0, 99.0],
        "duration_s": 3.0,
        "warm_up_ms": 200.0,
        "rounds": 10,
        "skip_latency": False,
    },
    "backend": {"name": "onnxruntime", "device": "CPU", "threads": 1, "onnxruntime": "1.32.0", "why": "asked for"},
    "environment": {
        **dict.fromkeys(("cpu", "os", "kernel", "machine", "python", "numpy"), "here"),
        "board": None,
        "time_utc": "2026-11-01T12:00:00+00:00",
    },
    "clocks": {
        "status": "read",
        "sources": [],
        "before_latency": _CLOCKS | {"temperature_c": {}},
        "after_latency": _CLOCKS | {"temperature_c": {}},
    },
    "evaluation": {"images": 100, "labels": True, "classification": True, "sha256": "0" * 64},
    "metric": None,
    "energy": {"status": "no energy data", "reason": "no power rail", "rail": None, "source": None},
    "bundles": [
        {"name": "student 8/8", "folder": "bundle", "kind": "ptq", "verify": "passed", "manifest_sha256": "0" * 64}
    ],
    "networks": [_network("teacher", name="teacher"), _STUDENT],
    "gates": [],
    "notes": [],
}


def test_what_is_not_python_comes_along() -> None:
    for package, name in (
        ("faqd", "py.typed"),
        ("faqd.benchmarks.report", "report.html"),
        ("faqd.deploy.board", "selftest_cases.npz"),
    ):
        assert importlib.resources.files(package).joinpath(name).is_file()


@pytest.mark.parametrize("name", ["quantize", "train", "deploy", "calib", "benchmarks"])
def test_the_links_are_not_installed_as_packages(name: str, tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=tmp_path, capture_output=True, text=True)
    assert "ModuleNotFoundError" in result.stderr
