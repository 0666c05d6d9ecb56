"""The model of many devices, and that what it is held against runs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from faqd.benchmarks.studies import large_folder
from faqd.benchmarks.studies.scaling_model import Assumed, Parts, hours, on_cores, on_gpus, tables, to_json
from tests.repository.test_walls import ROOT

PARTS = Parts(decode=0.008, teacher=0.05, student=0.2, affinity=0.02, fixed=0.1, gradient_bytes=4 * 10**7)
ASSUMED = Assumed(100.0, 0.03, 8, 8, 50e9, 10e9, 20e-6)


def test_processes_share_images_and_not_what_an_iteration_costs_by_itself() -> None:
    # (0.008 + 0.27) * 16 + 0.1
    assert on_cores(PARTS, 16, 1, 2, 0.0) == pytest.approx(4.548)
    assert on_cores(PARTS, 16, 2, 2, 0.5) == pytest.approx(4.448 / 2 + 0.1 + 0.5)
    # Four on two cores get half of one each, their fixed part too.
    assert on_cores(PARTS, 16, 4, 2, 0.0) == pytest.approx(4.448 / 2 + 0.2)


@pytest.mark.parametrize(
    ("gpus", "batch", "other", "part", "seconds"),
    [
        (1, 64, {}, "decode", 0.064),
        (1, 64, {}, "compute", (0.27 * 64 + 0.1) / 100),
        (1, 64, {}, "exchange", 0.0),
        (8, 64, {}, "compute", 0.03),
        (8, 64, {}, "exchange", 14 * 20e-6 + 14 / 8 * 4e7 / 50e9),
        (64, 64, {}, "exchange", 126 * 20e-6 + 126 / 64 * 4e7 / 10e9),
        (64, 64, {"launch_s": 0.0}, "compute", 0.0037),
        (8, 512, {"decoders": 1}, "iteration", 0.512),
    ],
)
def test_a_share_of_a_batch_on_a_gpu(gpus: int, batch: int, other: dict[str, Any], part: str, seconds: float) -> None:
    assert on_gpus(PARTS, replace(ASSUMED, **other), batch, gpus)[part] == pytest.approx(seconds)


def test_tables_have_a_row_for_each_that_is_asked() -> None:
    row = {"processes": 2, "cpu_s": {"least": 2.4}, "wall_s": {"least": 5.0}, "exchange_s": 0.5}
    asked = [(1, 64), (64, 4096)]
    text = tables({**to_json(PARTS, ASSUMED), "measured": [row], "cores": 2, "batch": 16, "asked": asked})
    assert "| 2 | 2.40 | 2.32 | -3 % | 2.82 | 5.00 |" in text
    assert "| student, of an image | 200.0 |" in text
    assert "| 64 | 4096 | 64.0 | 173.8 | " in text
    assert hours(0.18, 64, 1_280_000) == pytest.approx(1.0)


def test_a_process_times_its_own_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_folder, "FILES", 24)
    large_folder.make_files(tmp_path / "files")
    asked = {"network": "resnet8", "pixels": 32, "batch": 4, "times": 1, "parts": True}
    asked |= {"folder": str(tmp_path / "files"), "target": str(tmp_path / "found.json")}
    line = [sys.executable, "-m", "faqd.benchmarks.studies.scaling_process", json.dumps(asked)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == {"iteration", "iteration_cpu", "parameters", "decode_cpu", "teacher_cpu", "affinity_cpu"}
    assert all(len(values) == 1 and values[0] > 0 for values in found.values())
