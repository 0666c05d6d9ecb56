"""How much of its teacher a student has kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from faqd.fidelity import KEPT, RUINED, Branch, advice, compared_with_teacher, fidelity, in_words, rounded, verdict

GENERATOR = np.random.default_rng(0)
SCORES = GENERATOR.normal(size=(64, 10)).astype(np.float32)
MAPS = GENERATOR.normal(3, 1, size=(4, 5, 6, 6)).astype(np.float32)


@pytest.mark.parametrize("wanted", [SCORES, MAPS, SCORES[:, 0], SCORES[:1], MAPS[:1], SCORES > 0])
def test_equal_outputs_keep_all(wanted: Any) -> None:
    wanted = wanted.astype(np.float32)
    assert fidelity({"y": wanted}, {"y": wanted}, {}) == {"y": 1.0}


def test_a_constant_keeps_nothing_whatever_the_offset() -> None:
    for offset in (0.0, 1000.0):
        teacher = MAPS + np.float32(offset)
        found = np.broadcast_to(teacher.mean((0, 2, 3), keepdims=True), teacher.shape)
        assert fidelity({"y": found}, {"y": teacher}, {})["y"] == pytest.approx(0, abs=1e-3)


def test_the_unit_of_an_output_does_not_count() -> None:
    noise = 0.1 * GENERATOR.normal(size=MAPS.shape)
    kept = [fidelity({"y": scale * (MAPS + noise)}, {"y": scale * MAPS}, {})["y"] for scale in (1e-3, 1.0, 1e3)]
    assert kept == pytest.approx([kept[0]] * 3) and kept[0] == pytest.approx(0.99, abs=0.003)


def test_channels_of_different_sizes_count_alike() -> None:
    """A box in pixels does not hide that all classes are gone."""
    teacher = np.concatenate([100 * MAPS[:, :4], 0.01 * np.abs(MAPS[:, 4:])], 1)
    found = teacher.copy()
    found[:, 4:] = 0
    assert fidelity({"y": found}, {"y": teacher}, {})["y"] > KEPT, "as one branch it is hidden"
    branches = {"y": (Branch(0, 4, False), Branch(4, 5, True))}
    assert fidelity({"y": found}, {"y": teacher}, branches)["y"] < RUINED


@pytest.mark.parametrize("spans", [[(0, 9)], [(0, 2), (3, 5)], [(-1, 5)], [(0, 0), (0, 5)], [(4, 5), (0, 4)], []])
def test_branches_of_another_output_are_none(spans: list[tuple[int, int]]) -> None:
    wrong = {"y": tuple(Branch(start, end, True) for start, end in spans)}
    assert fidelity({"y": MAPS + 0.1}, {"y": MAPS}, wrong) == fidelity({"y": MAPS + 0.1}, {"y": MAPS}, {})


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e38])
def test_what_is_no_number_keeps_nothing(value: float) -> None:
    found = SCORES.copy()
    found[0, 0] = value
    record = compared_with_teacher({"y": found}, {"y": SCORES}, {})
    assert record["least"] == 0 and record["verdict"] == "ruined"


def test_a_teacher_that_always_says_the_same() -> None:
    same, zero = np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32)
    assert fidelity({"y": same * np.float32(1.1)}, {"y": same}, {})["y"] == pytest.approx(0.99)
    assert fidelity({"y": zero}, {"y": zero}, {})["y"] == 1 and fidelity({"y": same}, {"y": zero}, {})["y"] == 0


def test_a_teacher_that_is_sure_of_nothing() -> None:
    teacher = np.zeros((3, 2), np.float32)
    assert fidelity({"y": teacher}, {"y": teacher}, {"y": (Branch(0, 2, True),)}) == {"y": 1.0}


def test_more_images_than_were_stored_of_the_teacher() -> None:
    record = compared_with_teacher({"y": SCORES}, {"y": SCORES[:5]}, {})
    assert record["images"] == 5 and record["top1_agreement"]["n"] == 5 and record["verdict"] == "kept"


def test_the_worst_output_decides() -> None:
    record = compared_with_teacher({"a": SCORES, "b": 0 * MAPS}, {"a": SCORES, "b": MAPS}, {})
    assert record["fidelity"]["a"] == 1 and record["least"] == record["fidelity"]["b"] and record["verdict"] == "ruined"
    assert record["top1_agreement"]["value"] == 1


@pytest.mark.parametrize(
    ("value", "word"),
    [(1.0, "kept"), (0.97, "kept"), (0.9699, "lost something"), (0.5, "lost something"), (0.49, "ruined")],
)
def test_verdicts(value: float, word: str) -> None:
    assert verdict(value) == word


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "1"), (0.99984, "0.99984"), (0.964, "0.964"), (0.5, "0.500"), (0.0, "0.000"), (1 - 1e-9, "1.000000")],
)
def test_figures_show_how_far_from_one(value: float, text: str) -> None:
    assert rounded(value) == text


def test_words() -> None:
    good = compared_with_teacher({"y": SCORES}, {"y": SCORES}, {})
    bad = compared_with_teacher({"y": 0 * SCORES}, {"y": SCORES}, {})
    first, *files = in_words({"good.onnx": good, "bad.onnx": bad})
    assert first.startswith("fidelity: ruined.") and "on 64 evaluation images" in first
    assert (
        files[0] == "  good.onnx: 1; the same class on 100.0 % (95 %: 94.3 to 100.0)" and "bad.onnx: 0.00" in files[1]
    )
    assert "faqd-train recover" in advice("ptq") and "faqd-train recover" not in advice("distilled")
