"""Before they work, `distill` and `ptq` say what they took the data and the networks for."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
from torch import nn

from faqd.train.loop.progress import FIRST_LINE_S, LINE_EVERY_S, reporting
from faqd.train.recipes import Training
from faqd.train.run.understood import network_in_words, training_in_words
from tests.fixtures.toy_runs import faqd_deploy, new_user, succeeds


def test_both_say_size_normalisation_splits_and_norms_before_anything_else(tmp_path: Path) -> None:
    user = new_user(tmp_path)
    seen = ("--mean", "0.4,0.5,0.6", "--std", "0.2,0.25,0.3", "--image-size", "12x10", "--resize", "crop")
    distilled = succeeds(user.distill(tmp_path / "run", *seen, "--steps", 3, "--batch-size", 8))
    quantized = succeeds(faqd_deploy("ptq", *user.teacher, *user.data, *seen, "--out", tmp_path / "bundle"))
    for said in (distilled.stderr, quantized.stderr):
        data, images, teacher = said.splitlines()[:3]
        assert data.endswith(
            "12 x 10 pixels (other sizes: crop), rgb, (pixel / 255 - mean) / std with mean 0.4, 0.5, 0.6 and std "
            "0.2, 0.25, 0.3."
        )
        train, select, evaluation = (int(word) for word in images.split() if word.isdecimal())
        assert train + select + evaluation == len(list((user.folder / "images").iterdir())) and images.endswith(
            "no labels."
        )
        assert teacher.endswith("3 layers (convolutions, linear), 2 batch norms.")
    assert "training: 3 iterations of 8 images, " in distilled.stderr
    assert "batch norm: the statistics of the trained network" in distilled.stderr
    assert f"8/8 bits, scales chosen on {train} training images." in quantized.stderr


def test_labels_that_distill_does_not_read_are_not_denied(tmp_path: Path) -> None:
    user = new_user(tmp_path)
    for index, path in enumerate(sorted((user.folder / "images").iterdir())[:9]):
        folder = tmp_path / "judged" / str(index % 3)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    judged = ("--eval-data", f"folder:{tmp_path / 'judged'}", "--labels", "--steps", 1)
    said = succeeds(user.distill(tmp_path / "run", *judged)).stderr
    assert "9 for evaluation; labels are left to `eval` and `export`." in said


def test_what_training_does_to_batch_norms() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert network_in_words(network, "n").endswith("1 layer (convolutions, linear), 1 batch norm.")
    said = {part: list(training_in_words(network, Training(1, 8, 0.1, frozen_norm=part), 5, 9)) for part in (0, 0.1, 1)}
    assert all("5 iterations of 8 images, learning rate 0.1" in first for first, _ in said.values())
    assert said[0][1] == "batch norm: statistics of each batch; estimated again with the final weights."
    assert "fixed for the last 10 %" in said[0.1][1] and "leaves as they are" in said[1][1]
    assert len(list(training_in_words(network[0], Training(1, 8, 0.1), 5, 8))) == 1
    first, _ = training_in_words(network[0], Training(1, 8, 0.1), 5, 7)
    assert first == "--batch-size 8: there are 7 training images; each iteration sees them all."


def test_the_pace_is_told_after_a_few_iterations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    told = {}
    with reporting(["a"], 100) as report:
        for iteration in range(1, 101):
            now[0] += 0.5
            report(iteration, {})
            told[iteration] = capsys.readouterr().err
    lines = [iteration for iteration, text in told.items() if text]
    first = math.ceil(FIRST_LINE_S / 0.5)
    assert lines == [*range(first, 100, int(LINE_EVERY_S / 0.5)), 100]
    assert told[first] == "a: iteration 4/100, 0.5 s each, 48 s left\n"
