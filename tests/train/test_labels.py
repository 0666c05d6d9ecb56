"""Labels are held against the classes of the network when they are read, in `ptq` as before a training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from faqd.errors import UserError
from faqd.preprocess import Preprocess
from faqd.train.data.datasets import Augmentation, Dataset
from faqd.train.data.split import Split
from faqd.train.run.labels import refuse_other_labels, without_labels
from tests.fixtures.toy_runs import PLAIN, User, faqd_deploy, faqd_train, new_user, succeeds

PIXELS = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


def data_of(folder: Path, count: int, names: list[str] | None = None) -> tuple[object, ...]:
    labels = np.arange(200) % count
    if names is None:
        np.savez(folder / "images.npz", images=PIXELS, labels=labels)
    else:
        np.savez(folder / "images.npz", images=PIXELS, labels=labels, classes=np.array(names))
    return "--data", f"npz:{folder / 'images.npz'}", *PLAIN


@pytest.mark.parametrize(("count", "names"), [(12, None), (8, list("abcdefgh")), (12, list("abcdefghijkl"))])
def test_labels_of_other_classes_are_refused(user: User, tmp_path: Path, count: int, names: list[str] | None) -> None:
    data = data_of(tmp_path, count, names)
    for outcome in (
        faqd_deploy("ptq", *user.teacher, *data, "--out", tmp_path / "out"),
        faqd_train("distill", *user.teacher, *data, "--label-weight", 1, "--out", tmp_path / "out"),
    ):
        assert outcome.code == 2 and f"has labels of {count} classes (" in outcome.stderr, outcome.stderr
        assert "and net.py:build gives scores of 10" in outcome.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("count", "names"), [(10, None), (8, None), (10, list("abcdefghij"))])
def test_labels_that_can_be_the_networks_are_taken(
    user: User, tmp_path: Path, count: int, names: list[str] | None
) -> None:
    succeeds(faqd_deploy("ptq", *user.teacher, *data_of(tmp_path, count, names), "--out", tmp_path / "out"))
    assert "labels" in np.load(tmp_path / "out" / "eval.npz")
    shown = faqd_deploy("predict", tmp_path / "out", "--images", user.folder / "images", "--top", 10)
    words = succeeds(shown).stdout.splitlines()[0].partition(": ")[2].split(", ")
    assert sorted(word.split()[0] for word in words) == (names or [str(number) for number in range(10)])


def test_labels_that_nobody_looked_at_in_training_are_left_out_of_the_bundle(user: User, tmp_path: Path) -> None:
    line = (*user.teacher, *data_of(tmp_path, 12), "--batch-size", 16, "--steps", 2, "--out", tmp_path / "run")
    succeeds(faqd_train("distill", *line))
    said = succeeds(faqd_deploy("export", tmp_path / "run", "--out", tmp_path / "out")).stderr
    assert "The bundle is written without labels: npz:" in said and "has labels of 12 classes" in said
    assert "labels" not in np.load(tmp_path / "out" / "eval.npz")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["classes"] is None


def test_dense_and_several_outputs_have_no_classes() -> None:
    split = Split(PIXELS, np.arange(200) % 12)
    record = Preprocess(8, 8, (0.5,) * 3, (0.5,) * 3)
    dataset = Dataset("npz:x", record, tuple(map(str, range(12))), split, split, split, Augmentation(), ())
    refuse_other_labels(dataset, {"a": (2, 10, 4, 4)}, "n")
    refuse_other_labels(dataset, {"a": (2, 10), "b": (2, 10)}, "n")
    refuse_other_labels(without_labels(dataset), {"a": (2, 10)}, "n")
    with pytest.raises(UserError, match=r"12 classes .*scores of 10"):
        refuse_other_labels(dataset, {"a": (2, 10)}, "n")
