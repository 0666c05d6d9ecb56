"""The benchmark of onnxruntime's CPU kernels: what it compares is what it says, and its record is complete."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from faqd.benchmarks.latency import Length
from faqd.benchmarks.lowering.onnxruntime_cpu import FLOAT, STATIC, STUDENTS, measure, record, targets, write_variants
from faqd.deploy.onnx_session import OnnxSession


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_variants("resnet20", tmp_path_factory.mktemp("variants"))


def test_all_variants_are_one_network(files: dict[str, Path]) -> None:
    x = np.random.default_rng(0).standard_normal((4, 3, 32, 32), np.float32)
    found = {}
    for label, path in files.items():
        session = OnnxSession(path)
        found[label] = session.run({session.inputs[0]: x})[session.outputs[0]]
    assert set(found) == {FLOAT, STATIC, *STUDENTS}
    for label in (STATIC, "8/8", "8/8 --target onnxruntime"):
        noise = np.square(found[label] - found[FLOAT]).sum() / np.square(found[FLOAT]).sum()
        assert 0 < noise < 0.1
    assert not np.array_equal(found["4/4"], found["8/8"])


def test_the_record_holds_every_claim() -> None:
    entry = record("resnet20", 1, measure("resnet20", 1, Length(0.2, 10.0, 1, 2), 1))
    rows = {row["variant"]: row for row in entry["variants"]}
    assert len(rows[FLOAT]["round_medians_ms"]) == 2 and "speed_up_over_float" not in rows[FLOAT]
    claims = targets([entry])
    assert {claim["bound"] for claim in claims} == {2.0, 0.98} and len(claims) == 2 * len(STUDENTS)
    assert all(claim["met"] == (claim["found"] >= claim["bound"]) for claim in claims)
