"""The benchmark of onnxruntime's CPU kernels: what it compares is what it says, and its record is complete."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from faqd.benchmarks.measure.latency import Length, Times
from faqd.benchmarks.studies import onnxruntime_cpu
from faqd.benchmarks.studies.onnxruntime_cpu import (
    FLOAT,
    LABELS,
    STATIC,
    STUDENTS,
    measure,
    record,
    saturating,
    targets,
    write_variants,
)
from faqd.cpu import adds_pairs_in_int16, instruction_sets
from faqd.deploy.onnx_model.session import OnnxSession
from faqd.deploy.runtime.pipeline import QueryTimes


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_variants("resnet20", tmp_path_factory.mktemp("variants"))


def test_all_variants_are_one_network(files: dict[str, Path]) -> None:
    x = np.random.default_rng(0).standard_normal((4, 3, 32, 32), np.float32)
    found = {}
    for label, path in files.items():
        session = OnnxSession(path)
        found[label] = session.run({session.inputs[0]: x})[session.outputs[0]]
    assert set(found) == {FLOAT, *STATIC, *STUDENTS}
    for label in (*STATIC, "8/8", "8/8 --target onnxruntime"):
        noise = np.square(found[label] - found[FLOAT]).sum() / np.square(found[FLOAT]).sum()
        assert 0 < noise < 0.1
    assert not np.array_equal(found["4/4"], found["8/8"])


def test_the_record_holds_every_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_cpu, "instruction_sets", lambda: ["avx2", "avx512", "avx512-vnni"])
    entry = record("resnet20", 1, *measure("resnet20", 1, Length(0.2, 10.0, 1, 2), 1))
    rows = {row["variant"]: row for row in entry["variants"]}
    assert len(rows[FLOAT]["round_medians_ms"]) == 2 and "speed_up_over_float" not in rows[FLOAT]
    claims = targets([entry])
    assert {claim["bound"] for claim in claims} == {2.0, 0.98} and len(claims) == 2 * len(STUDENTS)
    assert all(claim["met"] == (claim["found"] >= claim["bound"]) for claim in claims)


def lasting(ms: float) -> Times:
    return Times(((QueryTimes(0.0, ms, 0.0, 0.0, 0.0, ms, ms, 0.0),),), (0.0,), ms / 1e3)


def test_what_saturates_here_is_no_rival(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert saturating(files) == [] or adds_pairs_in_int16(instruction_sets())
    monkeypatch.setattr(onnxruntime_cpu, "instruction_sets", lambda: ["avx2"])
    assert saturating(files) == ["quantize_static, u8s8"]
    times = {label: lasting(1.0 if label == "quantize_static, u8s8" else 2.0) for label in LABELS}
    times["quantize_static, defaults"] = lasting(1.5)
    assert record("resnet20", 1, times, saturating(files))["rival"] == "quantize_static, defaults"
    assert record("resnet20", 1, times)["rival"] == "quantize_static, u8s8"
    assert {claim["bound"] for claim in targets([record("resnet20", 1, times)])} == {0.98}
