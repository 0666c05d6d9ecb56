"""faqd-bench as a whole on the GPU of this machine: bundles in, engines built, record, exports, page and gates out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faqd.benchmarks.cli import bench_command
from faqd.benchmarks.record.schema import complaint
from faqd.deploy.cuda import cuda

pytest.importorskip("torch", reason="the bundle is made with torch (pip install 'faqd[train]')")
pytest.importorskip("onnx", reason="the bundle is made with onnx (pip install 'faqd[onnx]')")

from tests.fixtures.toy_runs import Outcome, faqd_deploy, new_user, outcome_of, succeeds

DEVICE, WHY = cuda.device_or_none()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE is None, reason=f"no GPU: {WHY}")]

QUICK = ("--duration", 0.2, "--rounds", 5, "--batch", "1,4", "--energy-duration", 0.5)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A PTQ bundle with the engines of its student, its unquantized student and its teacher."""
    user = new_user(tmp_path_factory.mktemp("user"))
    folder = user.folder / "bundle"
    succeeds(faqd_deploy("ptq", *user.teacher, *user.data, "--calibration-images", 32, "--out", folder))
    succeeds(faqd_deploy("build-engine", folder, "--all"))
    yield folder


def bench(bundle: Path, *options: object) -> Outcome:
    return outcome_of(bench_command, (bundle, *QUICK, *options))


def record(bundle: Path, target: Path, *options: object) -> dict[str, Any]:
    succeeds(bench(bundle, "--backend", "engine", "--json", target, *options))
    found: dict[str, Any] = json.loads(target.read_text())
    return found


@pytest.mark.parametrize("preset", ["trtexec10", "trtexec11"])
def test_all_engines_are_timed_judged_and_recorded(bundle: Path, tmp_path: Path, preset: str) -> None:
    exports = ("--export-times", tmp_path / "t.json", "--export-profile", tmp_path / "p.json")
    found = record(
        bundle, tmp_path / "r.json", "--preset", preset, "--sweep", *exports, "--report", tmp_path / "r.html"
    )
    assert complaint(found) is None
    assert found["backend"]["name"] == "engine" and DEVICE is not None and found["backend"]["device"] == DEVICE.name
    assert [entry["id"] for entry in found["networks"]] == ["teacher", "teacher_fp16", "student-0", "float-0"]
    teacher, half, student, own = found["networks"]
    for entry in (half, student, own):
        assert entry["accuracy"]["agreement"]["value"] > 0.9
        for latency in entry["latency"]:
            compute = latency["parts"]["compute"]["median_ms"]
            assert 0 < compute <= latency["median_ms"]
            assert (latency["parts"]["h2d"]["median_ms"] > 0) == (preset == "trtexec10")
        assert entry["sweep"]["points"] and entry["layers"]["layers"]
    assert teacher["latency"] == [] and {ratio["over"] for ratio in student["speed_up"]} == {"own_float", "teacher"}
    assert any(layer["kind"] == "int8" for layer in student["layers"]["layers"])
    times = json.loads((tmp_path / "t.json").read_text())
    assert len(times) == student["latency"][0]["one_ahead"]["samples"]
    assert json.loads((tmp_path / "p.json").read_text())[0]["count"] > 0
    assert found["energy"]["status"] == "measured" or found["energy"]["reason"]
    assert "teacher in FP16" in (tmp_path / "r.html").read_text()


def test_streams_side_by_side(bundle: Path, tmp_path: Path) -> None:
    found = record(bundle, tmp_path / "r.json", "--inf-streams", 2)
    assert found["switches"]["inf_streams"] == 2 and complaint(found) is None
    assert all(latency["one_ahead"]["samples"] >= 10 for latency in found["networks"][2]["latency"])


def test_gates_act_by_the_exit_code(bundle: Path) -> None:
    assert bench(bundle, "--max-p99-ms", 1e6, "--min-agreement", 0.5).code == 0
    slow = bench(bundle, "--max-p99-ms", 1e-6)
    assert slow.code == 1 and "is above the 1e-06 ms" in slow.stderr


@pytest.mark.parametrize("backend", ["cuda-bindings", "pycuda"])
def test_either_binding_serves_the_bench(bundle: Path, tmp_path: Path, backend: str) -> None:
    pytest.importorskip({"cuda-bindings": "cuda.bindings", "pycuda": "pycuda"}[backend])
    found = record(bundle, tmp_path / "r.json", "--cuda", backend, "--no-cuda-graph")
    assert all(latency["cuda_graph"] is False for latency in found["networks"][2]["latency"])


def test_a_changed_engine_is_refused(bundle: Path) -> None:
    engine = bundle / "student.tensorrt.engine"
    plan = engine.read_bytes()
    try:
        engine.write_bytes(plan + b"\0")
        refused = bench(bundle, "--backend", "engine")
    finally:
        engine.write_bytes(plan)
    assert refused.code == 2 and "SHA-256 differs" in refused.stderr and "--trust" in refused.stderr
