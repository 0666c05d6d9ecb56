"""Accuracy figures against published values and against counting by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from faqd.benchmarks.measure.accuracy import (
    PairedGap,
    judge,
    kl_to_teacher,
    paired_gap,
    snr_db,
    top_k,
)
from faqd.errors import UserError
from faqd.fidelity import agreement
from faqd.share import Share


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_the_published_one(count: int, n: int, low: float, high: float) -> None:
    assert Share(count, n).interval == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, 2635-2650, method 10.
    [((36, 12, 2, 0), 0.0569, 0.3404), ((18, 12, 2, 18), 0.0562, 0.3290), ((53, 0, 0, 1), -0.0729, 0.0729)],
)
def test_paired_interval_equals_the_published_one(cells: tuple[int, int, int, int], low: float, high: float) -> None:
    both, gained, lost, neither = cells
    gap = PairedGap(both, gained, lost, neither)
    assert gap.value == pytest.approx((gained - lost) / sum(cells))
    assert gap.interval == pytest.approx((low, high), abs=1e-4)


counts = st.integers(0, 300)


@given(counts, counts, counts, counts)
def test_intervals_hold_their_value_and_stay_in_range(both: int, gained: int, lost: int, neither: int) -> None:
    gap = PairedGap(both, gained, lost, neither)
    if gap.n == 0:
        return
    low, high = gap.interval
    assert -1 - 1e-9 <= low <= gap.value + 1e-12
    assert gap.value - 1e-12 <= high <= 1 + 1e-9
    mirrored = PairedGap(both, lost, gained, neither).interval
    assert mirrored == pytest.approx((-high, -low), abs=1e-12)
    low, high = Share(both, gap.n).interval
    assert 0 <= low <= both / gap.n <= high <= 1


def test_the_paired_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(7)
    p = np.array([0.88, 0.03, 0.05, 0.04])
    covered = 0
    for cells in generator.multinomial(360, p, size=2000):
        low, high = PairedGap(*map(int, cells)).interval
        covered += low <= p[1] - p[2] <= high
    assert 0.94 <= covered / 2000 <= 0.98


def test_top_k_and_agreement_by_hand() -> None:
    logits = np.array([[3.0, 2, 1, 0, -1, -2], [0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1]])
    assert top_k(logits, np.array([0, 0, 5]), 1).count == 1
    assert top_k(logits, np.array([0, 0, 5]), 5).count == 1
    assert top_k(logits, np.array([5, 1, 4]), 5).count == 2
    assert top_k(logits, logits.argmax(1), 1).count == 3, "ties fall as argmax has it"
    assert agreement(logits, logits[:, ::-1]).count == 1


def test_kl_and_snr_by_hand() -> None:
    teacher = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    student = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32)) + 7  # softmax ignores an offset
    by_hand = (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert kl_to_teacher(student, teacher) == pytest.approx(by_hand, rel=1e-5)
    assert kl_to_teacher(teacher, teacher) == 0.0
    reference = np.full((2, 3, 4, 4), 10.0, np.float32)
    assert snr_db(reference + 1, reference) == pytest.approx(20.0)
    assert snr_db(reference, reference) is None


def test_judge_with_labels() -> None:
    generator = np.random.default_rng(0)
    teacher = generator.normal(size=(200, 10)).astype(np.float32)
    student = teacher + generator.normal(size=(200, 10)).astype(np.float32) * 0.3
    labels = (teacher + generator.normal(size=(200, 10)) * 0.3).argmax(1).astype(np.int64)
    found = judge({"logits": student}, {"logits": teacher}, labels, "net")
    right, teacher_right = student.argmax(1) == labels, teacher.argmax(1) == labels
    assert found["top1"]["value"] == right.mean()
    assert found["top1"]["n"] == 200
    assert found["top5"]["value"] >= found["top1"]["value"]
    assert found["gap_to_teacher"]["value"] == pytest.approx(right.mean() - teacher_right.mean())
    assert found["gap_to_teacher"]["gained"] == paired_gap(right, teacher_right).gained
    assert found["ratio_to_teacher"] == pytest.approx(right.mean() / teacher_right.mean())
    assert found["snr_db"]["logits"] > 0


def test_judge_without_labels_has_agreement_kl_and_snr_alone() -> None:
    teacher = np.eye(4, dtype=np.float32)
    found = judge({"logits": teacher * 2}, {"logits": teacher}, None, "net")
    assert found["agreement"]["value"] == 1.0
    assert found["kl_to_teacher_nats"] > 0
    assert found["snr_db"]["logits"] == 0.0
    assert [found[key] for key in ("top1", "top5", "gap_to_teacher", "ratio_to_teacher")] == [None] * 4


def test_top_5_needs_more_than_five_classes() -> None:
    teacher = np.eye(5, dtype=np.float32)
    assert judge({"a": teacher}, {"a": teacher}, np.arange(5), "net")["top5"] is None


def test_dense_outputs_have_their_snr_alone_and_may_be_stored_for_fewer_images() -> None:
    dense = np.ones((6, 1, 4, 4), np.float32)
    found = judge({"map": dense * 1.1, "extra": dense}, {"map": dense[:2]}, np.zeros(6, np.int64), "net")
    assert found.pop("snr_db") == {"map": pytest.approx(20.0, abs=1e-4)}
    kept = pytest.approx(0.99, abs=1e-6)  # of a teacher that always says the same, by how large that is
    assert found.pop("fidelity") == {"by_output": {"map": kept}, "least": kept, "verdict": "kept"}
    assert set(found.values()) == {None}


@pytest.mark.parametrize(
    ("outputs", "labels", "said"),
    [
        ({"other": np.ones((3, 2))}, None, "no output 'logits'"),
        ({"logits": np.ones((3, 4))}, None, "shape"),
        ({"logits": np.ones((2, 2))}, None, "shape"),
        ({"logits": np.array([[1, 2], [np.nan, 1], [np.inf, 1]])}, None, "2 values are not finite"),
        ({"logits": np.ones((3, 2))}, np.array([0, 1, 2]), "labels from 0 to 2"),
        ({"logits": np.ones((3, 2))}, np.array([0, 1]), "2 labels"),
    ],
)
def test_what_does_not_fit_is_said(
    outputs: dict[str, NDArray[Any]],
    labels: NDArray[Any] | None,
    said: str,
) -> None:
    with pytest.raises(UserError, match=said):
        judge(outputs, {"logits": np.eye(3, 2)}, labels, "net")
