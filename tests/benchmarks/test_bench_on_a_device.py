"""faqd-bench on engines, on a GPU made of Python: switches, parts of a query, exports, profile, memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faqd.benchmarks import bench
from faqd.benchmarks.measure import accuracy, energy, hwmon, steps
from faqd.benchmarks.measure.clocks import Clocks
from faqd.benchmarks.report.html import page_from_result
from faqd.deploy.runtime.runtime import Engine
from tests.benchmarks.test_bench import call
from tests.benchmarks.test_report import DARK, LIGHT, assert_figures_equal, needs_chromium, probed, read
from tests.fixtures.boards import ORIN_NANO, board
from tests.fixtures.fake_bundle_engines import MOST, gpu, make_engines
from tests.fixtures.fake_gpu import FakeCuda
from tests.fixtures.tiny_bundles import make_bundle

QUICK = ("--duration", "0.02", "--rounds", "2", "--warm-up", "0", "--batch", "2,4")
ALL = ("student.tensorrt", "student.float.fp16", "teacher.fp16")
TEACHER, TEACHER_FP16, STUDENT, FLOAT = range(4)
"""Of the networks of a record."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engines(tmp_path_factory.mktemp("engines") / "bundle", *ALL)


def record(monkeypatch: pytest.MonkeyPatch, folder: Path, target: Path, *options: str) -> dict[str, Any]:
    with gpu(monkeypatch) as cuda:
        timing = () if "--skip-latency" in options else QUICK
        assert call(monkeypatch, folder, *timing, "--json", target, *options) == 0
        assert cuda.held() == {}
    found: dict[str, Any] = json.loads(target.read_text())
    return found


@pytest.mark.parametrize(
    ("options", "preset", "states"),
    [
        ((), "trtexec11", (True, True, False)),
        (("--preset", "trtexec10"), "trtexec10", (False, False, True)),
        (("--preset", "trtexec10", "--use-cuda-graph", "--no-data-transfers"), "trtexec10", (True, False, False)),
        (("--no-cuda-graph", "--no-spin-wait", "--include-data-transfers"), "trtexec11", (False, False, True)),
    ],
)
def test_every_switch_is_followed_and_recorded(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    preset: str,
    states: tuple[bool, bool, bool],
) -> None:
    found = record(monkeypatch, folder, tmp_path / "r.json", *options)
    switches = found["switches"]
    assert switches["preset"] == preset
    assert tuple(switches[name] for name in ("cuda_graph", "spin_wait", "transfers")) == states
    student = found["networks"][STUDENT]
    latency = student["latency"][0]
    assert latency["cuda_graph"] == states[0]
    assert (latency["parts"]["h2d"]["median_ms"] > 0) == states[2]
    assert latency["submission"] == "closed_loop" and latency["one_ahead"]["samples"] >= 10
    assert latency["median_ms"] == sum(latency["parts"][part]["median_ms"] for part in ("h2d", "compute", "d2h"))
    assert student["loaded"]["device_memory_bytes"] == 4096 and student["loaded"]["load_ms"] > 0
    assert student["loaded"]["first_inference_ms"] > 0
    assert found["backend"]["device"] == "Fake GPU" and found["backend"]["tensorrt"] == "TensorRT 10.13.3"
    state = "on" if states[0] else "off"
    printed = capsys.readouterr().out
    assert f"{preset}: CUDA graph {state}" in " ".join(printed.split()) and "one ahead" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_streams_compute_side_by_side_and_only_ahead(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[tuple[int, int]] = []
    pipeline = Engine.pipeline

    def counted(self: Engine, feeds: Any, **options: Any) -> Any:
        made.append((next(iter(feeds.values())).shape[0], options["slots"]))
        return pipeline(self, feeds, **options)

    monkeypatch.setattr(Engine, "pipeline", counted)
    found = record(monkeypatch, folder, tmp_path / "r.json", "--inf-streams", "3", "--preset", "trtexec10")
    assert [made.count(one) for one in ((2, 1), (2, 2))] == [3, 9], "three networks, each with three streams ahead"
    assert found["switches"]["inf_streams"] == 3
    latency = found["networks"][STUDENT]["latency"][0]
    assert latency["one_ahead"]["samples"] >= 10 and latency["one_ahead"]["parts"]["h2d"]["median_ms"] > 0
    assert any("With 3 streams" in note for note in found["notes"]) and "3 streams ahead" in " ".join(
        capsys.readouterr().out.split()
    )
    assert record(monkeypatch, folder, tmp_path / "r.json")["switches"]["inf_streams"] == 1


def test_zero_copy_takes_the_place_of_copies(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with gpu(monkeypatch):
        assert call(monkeypatch, folder, *QUICK, "--zero-copy") == 2
    assert "share the host's memory" in capsys.readouterr().err
    monkeypatch.setattr(FakeCuda, "shares_memory", lambda self: True)
    found = record(monkeypatch, folder, tmp_path / "r.json", "--zero-copy", "--preset", "trtexec10")
    assert (found["switches"]["zero_copy"], found["switches"]["transfers"]) == (True, False)
    assert found["networks"][STUDENT]["latency"][0]["parts"]["h2d"]["median_ms"] == 0
    assert "transfers off, zero copy" in " ".join(capsys.readouterr().out.split())
    with gpu(monkeypatch):
        assert call(monkeypatch, folder, *QUICK, "--zero-copy", "--include-data-transfers") == 2
    assert "leave out --include-data-transfers" in capsys.readouterr().err


def test_exports_are_trtexecs_and_the_profile_knows_its_layers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports = ("--export-times", str(tmp_path / "t.json"), "--export-profile", str(tmp_path / "p.json"))
    found = record(monkeypatch, folder, tmp_path / "r.json", "--no-cuda-graph", "--sweep", *exports)
    times = json.loads((tmp_path / "t.json").read_text())
    student = found["networks"][STUDENT]
    assert len(times) == student["latency"][0]["one_ahead"]["samples"], "trtexec keeps one query ahead"
    assert times[0]["latencyMs"] == times[0]["computeMs"] > 0
    profile = json.loads((tmp_path / "p.json").read_text())
    assert profile[0] == {"count": 50}
    assert [(layer["name"], layer["averageMs"], layer["medianMs"]) for layer in profile[1:]] == [
        ("reformat", 0.25, 0.25),
        ("conv", 0.5, 0.5),
    ]
    assert [layer["kind"] for layer in student["layers"]["layers"]] == ["conversion", "int8"]
    assert student["layers"]["total_ms"] == 0.75
    sweep = student["sweep"]
    assert sweep["submission"] == "one_ahead" and sweep["points"][-1]["batch"] <= MOST
    html = page_from_result(found)
    assert_figures_equal(html, found)
    assert all(title in html for title in ("Parts of a query", "Throughput against batch", "Time per layer"))


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(1200, LIGHT), (390, DARK)])
def test_the_page_of_a_device_in_a_browser(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, scheme: int
) -> None:
    """With every section that there is, power and sustained load from a board's /sys among them."""
    root = board(tmp_path / "root", ORIN_NANO)
    monkeypatch.setattr(bench, "Clocks", lambda gpu: Clocks(gpu, root))
    monkeypatch.setattr(hwmon, "HWMON", root / "sys/class/hwmon")
    monkeypatch.setattr(energy, "UPDATES", 1)
    monkeypatch.setattr(energy, "IDLE_S", 0.1)
    more = ("--sweep", "--dump-profile", "--sustained", "0.02", "--energy-duration", "0.1")
    found = record(monkeypatch, folder, tmp_path / "r.json", *more)
    student = found["networks"][STUDENT]
    assert found["energy"] == {"status": "measured", "reason": None, "rail": "VDD_IN", "source": "hwmon INA3221"}
    assert student["energy"]["load_w"] == pytest.approx(6.0) and "not above its idle" in student["energy"]["reason"]
    student["energy"] |= {"energy_per_image_mj": 1.25, "energy_per_query_mj": 2.5, "reason": None}
    assert student["sustained"]["windows"][0]["power_mode"] == "MAXN_SUPER"
    probe = probed(page_from_result(found), tmp_path, width, scheme)
    assert_figures_equal(probe["dom"], found)
    places = {path for path, _, _ in read(probe["dom"]).figures}
    for part in (
        "latency/0/parts/compute/median_ms",
        "latency/0/one_ahead/throughput_queries_per_s",
        "sweep/points/0/throughput_images_per_s",
        "energy/energy_per_image_mj",
        "layers/layers/1/mean_ms",
        "sustained/windows/0/gpu_mhz",
    ):
        assert f"networks/{STUDENT}/{part}" in places
    assert probe["scroll"] <= width and probe["content"] <= width + 0.5 and probe["small"] >= 11


def test_a_graph_that_cannot_be_captured_is_said_in_the_record(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gpu(monkeypatch, fails={"capture"}), pytest.warns(UserWarning, match="no CUDA graph"):
        assert call(monkeypatch, folder, *QUICK, "--json", tmp_path / "r.json") == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["switches"]["cuda_graph"] and found["networks"][STUDENT]["latency"][0]["cuda_graph"] is False
    assert any("No CUDA graph could be captured" in note for note in found["notes"])


def test_an_engine_that_is_not_its_records_needs_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_engines(tmp_path / "bundle")
    (folder / "student.tensorrt.engine").write_bytes(b"other")
    with gpu(monkeypatch):
        assert call(monkeypatch, folder, "--skip-latency") == 2
        assert "--trust" in capsys.readouterr().err
        assert call(monkeypatch, folder, "--skip-latency", "--trust") == 0


def test_what_is_not_built_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_engines(tmp_path / "bundle")
    found = record(monkeypatch, folder, tmp_path / "r.json")
    assert sum("build-engine" in note and "--all" in note for note in found["notes"]) == 2
    teacher, teacher_fp16, student, _ = found["networks"]
    assert teacher["latency"] == teacher_fp16["latency"] == [] and student["latency"]
    assert teacher["accuracy"] and teacher_fp16["accuracy"] is None


def test_the_baselines_are_fp16_and_judged_by_their_engines(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = record(monkeypatch, folder, tmp_path / "r.json")
    teacher, half, student, own = found["networks"]
    assert [entry["id"] for entry in found["networks"]] == ["teacher", "teacher_fp16", "student-0", "float-0"]
    assert [entry["weight_bits"] for entry in found["networks"]] == [32, 16, 8, 16]
    assert teacher["latency"] == [] and teacher["loaded"] is None, "the FP32 teacher is its stored outputs"
    assert half["name"] == "tiny teacher FP16" and half["latency"] and own["latency"]
    for entry in (half, student, own):
        assert entry["accuracy"]["top1"]["n"] == 120 and entry["accuracy"]["agreement"]["value"] > 0.9
        assert entry["accuracy"]["gap_to_teacher"] is not None
    assert {ratio["baseline"] for ratio in student["speed_up"]} == {"float-0", "teacher_fp16"}
    printed = capsys.readouterr().out
    assert "teacher in FP16" in printed and "float in FP16" in printed and "16/16" in printed
    html = page_from_result(found)
    assert "tiny teacher FP16" in html and "teacher in FP16" in html and "other student" not in html
    accuracy = record(monkeypatch, folder, tmp_path / "a.json", "--skip-latency")["networks"][TEACHER_FP16]["accuracy"]
    assert accuracy == half["accuracy"]


def test_a_bundle_without_an_fp16_teacher_is_benched_with_the_fp32_one_and_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_engines(tmp_path / "bundle", "student.tensorrt", "teacher", fp16_teacher=False)
    found = record(monkeypatch, folder, tmp_path / "r.json")
    teacher = found["networks"][TEACHER]
    assert teacher["weight_bits"] == 32 and teacher["latency"]
    assert "teacher" in {ratio["baseline"] for ratio in found["networks"][1]["speed_up"]}
    assert any("holds no teacher.fp16.onnx" in note and "FP32" in note for note in found["notes"])


def test_a_baseline_that_overflows_has_no_accuracy_and_the_students_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged(outputs: Any, teacher: Any, labels: Any, name: str, branches: Any = None) -> dict[str, Any]:
        if name.endswith("FP16"):
            outputs = {key: values * np.inf for key, values in outputs.items()}
        return accuracy.judge(outputs, teacher, labels, name, branches)

    monkeypatch.setattr(steps, "judge", judged)
    found = record(monkeypatch, folder, tmp_path / "r.json")
    assert found["networks"][TEACHER_FP16]["accuracy"] is None and found["networks"][STUDENT]["accuracy"]
    assert any("tiny teacher FP16" in note and "not finite" in note for note in found["notes"])


@pytest.mark.parametrize(
    "option",
    [
        "--preset=trtexec10",
        "--use-cuda-graph",
        "--no-spin-wait",
        "--no-data-transfers",
        "--inf-streams=2",
        "--zero-copy",
    ],
)
def test_switches_of_a_gpu_are_refused_on_the_cpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert call(monkeypatch, folder, "--backend", "onnxruntime", option) == 2
    assert "has no CUDA graph, no copies" in capsys.readouterr().err


def test_without_onnxruntime_the_reason_is_what_keeps_the_engines_from_running(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for module in ("faqd.benchmarks.backends.sessions", "faqd.deploy.onnx_model.session"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr("faqd.deploy.cuda.cuda.device_or_none", lambda backend=None: (None, "no NVIDIA driver found"))
    assert call(monkeypatch, folder) == 2
    said = "no GPU that can be used from here (no NVIDIA driver found). To measure on the CPU instead: "
    assert said in capsys.readouterr().err
    assert call(monkeypatch, folder, "--backend", "onnxruntime") == 2
    assert "this command needs onnxruntime" in capsys.readouterr().err
    bare = make_bundle(tmp_path / "bare").folder
    with gpu(monkeypatch):
        assert call(monkeypatch, bare) == 2
    assert f"`faqd-deploy build-engine {bare}` makes it. To measure" in capsys.readouterr().err
