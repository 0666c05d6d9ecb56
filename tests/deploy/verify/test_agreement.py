"""Floors below which whole outputs fail, whatever every layer computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from faqd.deploy.verify.agreement import agreement_failures, float16_failures
from faqd.deploy.verify.outputs import float_snr_db
from faqd.quant import Target

IMAGES, CLASSES = 64, 10


def values(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(IMAGES, CLASSES)).astype(np.float32)


def apart(wanted: NDArray[np.float32], decibels: float) -> NDArray[np.float32]:
    """`wanted` with noise of that ratio."""
    noise = values(int(decibels) + 100)
    scale = np.sqrt(np.square(wanted).sum() / np.square(noise).sum()) * 10 ** (-decibels / 20)
    result: NDArray[np.float32] = wanted + np.float32(scale) * noise
    return result


TEACHER = values(0)
ALIKE = np.repeat(TEACHER[:1], IMAGES, 0)
STUDENT = apart(TEACHER, 20)


def test_probabilities_next_to_zero_are_judged_by_what_a_sigmoid_can_do() -> None:
    wanted = np.full((4, 1, 8, 8), 3e-8, np.float32)
    near, far = wanted + np.float32(1e-7), wanted + np.float32(2e-6)
    assert float_snr_db(near, wanted, True) is None
    ratio = float_snr_db(far, wanted, True)
    assert ratio is not None and ratio < 0
    logits = float_snr_db(near, wanted, False)
    assert logits is not None and logits < 0


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (STUDENT, ""),
        (apart(TEACHER, -15), ""),  # a bad student, but a student
        (ALIKE, "is the same for all 64 images"),
        (-STUDENT, "nothing of the teacher's left"),
        (values(3) - 0.2 * TEACHER, "nothing of the teacher's left"),
    ],
    ids=["good", "bad", "constant", "turned round", "unrelated"],
)
def test_outputs_beside_the_teachers(found: NDArray[np.float32], told: str) -> None:
    outputs: dict[Target, Any] = {"onnxruntime": {"y": found}}
    failures = agreement_failures(outputs, {"y": TEACHER}, "nearest")["onnxruntime"]
    assert told in " ".join(failures) and bool(failures) == bool(told)


def test_what_tells_nothing_fails_nothing() -> None:
    outputs: dict[Target, Any] = {"tensorrt": {"y": -STUDENT[:4], "z": ALIKE, "own": STUDENT}}
    teacher = {"y": TEACHER, "z": ALIKE}
    assert agreement_failures(outputs, teacher, None) == {"tensorrt": []}


@pytest.mark.parametrize(
    ("student_db", "found_db", "fails", "flavours_fail"),
    [
        (20, 18, False, False),
        (20, 15, True, False),
        (20, 11, True, True),
        (60, 31, False, False),
        (60, 28, True, True),
        (2, 4, False, False),
        (2, 2, True, True),
    ],
)
@pytest.mark.parametrize("rounding", ["nearest", "ceil"])
def test_forms_of_one_student(
    student_db: float, found_db: float, fails: bool, flavours_fail: bool, rounding: str
) -> None:
    tensorrt = apart(TEACHER, student_db)
    outputs: dict[Target, Any] = {"tensorrt": {"y": tensorrt}, "onnxruntime": {"y": apart(tensorrt, found_db)}}
    apart_by = {"snr_db": {"y": found_db}}
    failures = agreement_failures(outputs, {"y": TEACHER}, rounding, as_trained=apart_by, between_flavours=apart_by)
    assert bool(float16_failures(outputs["tensorrt"], {"y": TEACHER}, apart_by)) == fails
    assert bool(failures["tensorrt"]) == fails
    assert bool(failures["onnxruntime"]) == (flavours_fail and rounding == "nearest")
    outputs = {"onnxruntime": {"y": tensorrt}}
    alone = agreement_failures(outputs, {"y": TEACHER}, rounding, as_trained=apart_by)
    assert bool(alone["onnxruntime"]) == (fails and rounding == "nearest")
