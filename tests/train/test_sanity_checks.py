"""Inputs that are legal and make no sense: each ends in its sentence before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from faqd.errors import UserError
from faqd.preprocess import Preprocess
from faqd.quantize.capture.capture import capture
from faqd.train.data.datasets import Augmentation, Dataset, load_dataset
from faqd.train.data.options import DataOptions
from faqd.train.data.sanity_checks import (
    refuse_kl_of_one,
    refuse_one_class,
    warn_of_images,
    warn_of_taps,
    warn_of_teacher,
)
from faqd.train.data.split import Split
from tests.fixtures.toy_runs import User, faqd_train, new_user


def dataset(
    pixels: Any = None, mean: float = 0.5, std: float = 0.25, labels: Any = None, classes: tuple[str, ...] | None = None
) -> Dataset:
    drawn = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8) if pixels is None else pixels
    split = Split(drawn, labels)
    record = Preprocess(8, 8, (mean,) * 3, (std,) * 3)
    return Dataset("folder:here", record, classes, split, split, split, Augmentation(), ())


class Returns(nn.Module):
    def __init__(self, returned: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.norm, self.returned = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), returned
        self.norm.running_mean = torch.full((4,), 0.1)

    def forward(self, x: Tensor) -> Any:
        return self.returned(self.norm(self.first(x)).mean((2, 3)), x)


def told_of_images(given: Dataset) -> list[str]:
    said: list[str] = []
    warn_of_images(given, said.append)
    return said


def told_of_teacher(network: nn.Module) -> list[str]:
    said: list[str] = []
    warn_of_teacher(network.eval(), "net.py:build", dataset(), said.append)
    return said


ONE = np.random.default_rng(1).integers(0, 256, (1, 8, 8, 3), np.uint8)
IMAGES: dict[str, tuple[Dataset, str]] = {
    "many equal": (dataset(np.concatenate([ONE] * 20 + [ONE // 2, ONE // 3])), "only 3 of 22 training images"),
    "of one colour": (
        dataset(np.broadcast_to(10 * np.arange(24, dtype=np.uint8)[:, None, None, None], (24, 8, 8, 3))),
        "one",
    ),
    "masks of 15 labels": (dataset(np.random.default_rng(2).integers(0, 15, (24, 8, 8, 3), np.uint8)), "nearly black"),
    "hardly more than zero": (dataset(mean=0.0, std=255.0), "reaches only ±0.00392"),
    "far from zero": (dataset(mean=0.0, std=1 / 255), "reaches up to ±255"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images_are_told_of(kind: str) -> None:
    given, words = IMAGES[kind]
    (said,) = told_of_images(given)
    assert words in said


def test_equal_images_are_refused_and_ordinary_ones_pass() -> None:
    with pytest.raises(UserError, match="all of 24 training images are equal"):
        told_of_images(dataset(np.repeat(ONE, 24, 0)))
    assert told_of_images(dataset()) == []


UNTOUCHED = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.Flatten())
TEACHERS: dict[str, tuple[nn.Module, str]] = {
    "new statistics": (UNTOUCHED, "batch norm 1 and 1 more have the statistics of a new one"),
    "one constant output": (Returns(lambda y, x: {"a": y, "b": 0 * y + 3}), "its output b"),
    "without a name": (Returns(lambda y, x: {"": y, "b": y}), "what it returns at [''] is called _ in every file"),
    "named like the input": (Returns(lambda y, x: {"input": y, "b": y}), "['input'] is called input_1 in every file"),
}


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_teacher_is_told_of(kind: str) -> None:
    network, words = TEACHERS[kind]
    (said,) = told_of_teacher(network)
    assert words in said


SENSELESS: dict[str, tuple[nn.Module, str]] = {
    "all constant": (Returns(lambda y, x: (0 * y, 0 * y + 3)), "are the same for 16 different training images"),
    "NaN in one output": (Returns(lambda y, x: {"a": y, "b": y / 0 * 0}), "its output b holds NaN or infinite values"),
    "enormous": (Returns(lambda y, x: {"a": y, "b": y * 1e30}), "its output b reaches .*e.(29|30), whose square"),
    "vanishing": (Returns(lambda y, x: y * 1e-30), "its output logits reaches .*e-3.*, whose square"),
    "infinite": (Returns(lambda y, x: y / 0), "its output logits holds NaN or infinite values for 16 of 16"),
}


@pytest.mark.parametrize("kind", SENSELESS)
def test_a_teacher_without_sense_is_refused(kind: str) -> None:
    network, words = SENSELESS[kind]
    with pytest.raises(UserError, match=words):
        told_of_teacher(network)


def test_an_ordinary_teacher_passes() -> None:
    assert told_of_teacher(Returns(lambda y, x: y)) == []


def test_a_constant_map_at_a_tap_is_told_of() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    nn.init.zeros_(network[2].get_parameter("weight"))
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    traced = capture(network, x[:2])
    said: list[str] = []
    warn_of_taps(traced, [node.name for node in traced.graph.nodes if node.target in ("1", "3")], x, said.append)
    assert len(said) == 1 and said[0].startswith("feature layer 3: the teacher's map has one value")


def test_kl_of_one_value_and_labels_of_one_class_are_refused() -> None:
    refuse_kl_of_one({"a": (2, 3, 1), "b": (2, 2)})
    with pytest.raises(UserError, match=r"the output b has one value.*--logit mse"):
        refuse_kl_of_one({"a": (2, 3), "b": (2, 1, 8, 8)})
    with pytest.raises(UserError, match="--label-weight: all 24 training labels of folder:here are of one class, cat"):
        refuse_one_class(dataset(labels=np.ones(24, np.int64), classes=("dog", "cat")), "--label-weight")
    refuse_one_class(dataset(labels=np.arange(24) % 2), "--label-weight")


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


@pytest.mark.parametrize(
    ("option", "value"), [("--std", "58.395,57.12,57.375"), ("--mean", "123.675,116.28,103.53"), ("--mean", "-2,0,0")]
)
def test_units_of_pixels_are_refused(user: User, option: str, value: str, tmp_path: Path) -> None:
    told = user.distill(tmp_path / "out", "--mean", "0,0,0", "--std", "1,1,1", option, value)
    assert told.code == 2 and f"error: {option} (" in told.stderr and "divide --mean and --std by 255" in told.stderr


def test_the_command_line_asks_before_it_trains(user: User, tmp_path: Path) -> None:
    told = user.distill(tmp_path / "out", "--std", "0.001,0.001,0.001", "--mean", "0,0,0", "--steps", 1)
    assert "net.py:build: batch norm features.1 and 1 more have the statistics of a new one" in told.stderr
    assert "is --std too small?" in told.stderr
    images, labels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8), np.zeros(60, np.int64)
    np.savez(tmp_path / "one.npz", images=images, labels=labels)
    data = ("--data", f"npz:{tmp_path / 'one.npz'}", "--mean", "none", "--std", "none", "--out", tmp_path / "one")
    told = faqd_train("teacher", "--arch", "resnet8", *data)
    assert told.code == 2 and "are of one class, 0" in told.stderr and not (tmp_path / "one").exists()


def test_published_data_raise_no_warning() -> None:
    assert told_of_images(load_dataset(DataOptions("digits"), with_labels=False)) == []
