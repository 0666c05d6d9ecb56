"""`--eval-data`: images of the user's own that evaluate, apart from those that are learned from; few images at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from faqd.benchmarks.measure.user_metric import load_metric
from faqd.bundle import load_bundle
from faqd.errors import UserError
from faqd.train.data.datasets import load_dataset
from faqd.train.data.options import DataOptions
from faqd.train.data.split import Split, split_by_content
from tests.fixtures.toy_runs import PLAIN, User, faqd_deploy, faqd_train, new_user, succeeds

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8)
OTHERS = np.random.default_rng(1).integers(0, 256, (20, 8, 8, 3), np.uint8)
NAMES = [f"class {index}" for index in range(10)]


def npz(path: Path, pixels: Any, **arrays: Any) -> str:
    np.savez(path, images=pixels, **arrays)
    return f"npz:{path}"


def folder(path: Path, pixels: Any, *classes: str) -> str:
    for index, image in enumerate(pixels):
        place = path / classes[index % len(classes)] if classes else path
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{index}.png")
    return f"folder:{path}"


SOURCES: dict[str, Callable[[Path, Any], str]] = {"npz": lambda path, x: npz(path / "e.npz", x), "folder": folder}


def options_of(source: str, evaluation: str | None, *, labels: bool = False) -> DataOptions:
    return DataOptions(source, image_size=(8, 8), mean="none", std="none", evaluation=evaluation, labels=labels)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("of_training", SOURCES)
def test_all_of_it_evaluates_and_all_of_the_rest_is_learned_from(kind: str, of_training: str, tmp_path: Path) -> None:
    source = SOURCES[of_training](tmp_path / "heap" if of_training == "folder" else tmp_path, PIXELS)
    options = options_of(
        source, SOURCES[kind](tmp_path / "held" if kind == "folder" else mkdir(tmp_path / "a"), OTHERS)
    )
    dataset = load_dataset(options, with_labels=False)
    assert images(dataset.eval) == {image.tobytes() for image in OTHERS} and dataset.eval.labels is None
    assert images(dataset.train) | images(dataset.select) == {image.tobytes() for image in PIXELS}
    assert len(dataset.train) + len(dataset.select) == len(PIXELS)
    alone = load_dataset(replace(options, evaluation=None), with_labels=False)
    assert len(alone.eval) and len(alone.train) < len(dataset.train)


def mkdir(path: Path) -> Path:
    path.mkdir()
    return path


def images(split: Split) -> set[bytes]:
    return {image.tobytes() for image in split.images}


def test_labels_are_those_of_evaluation_alone(tmp_path: Path) -> None:
    heap = folder(tmp_path / "heap", PIXELS)  # without subfolders
    options = options_of(heap, folder(tmp_path / "held", OTHERS, "b", "a"), labels=True)
    dataset = load_dataset(options, with_labels="eval")
    assert dataset.train.labels is None and dataset.classes == ("a", "b")
    assert dataset.eval.labels is not None
    by_image = {image.tobytes(): index % 2 for index, image in enumerate(OTHERS)}
    assert [1 - by_image[image.tobytes()] for image in dataset.eval.images] == dataset.eval.labels.tolist()
    assert load_dataset(options, with_labels=False).eval.labels is None
    with pytest.raises(UserError, match="images lie in the folder itself"):
        load_dataset(options, with_labels=True)


def test_classes_are_numbered_as_those_that_are_learned(tmp_path: Path) -> None:
    heap = folder(tmp_path / "heap", PIXELS, "a", "b", "c")
    options = options_of(heap, folder(tmp_path / "held", OTHERS, "c", "a"), labels=True)
    dataset = load_dataset(options, with_labels=True)
    assert dataset.classes == ("a", "b", "c") and dataset.eval.labels is not None
    assert set(dataset.eval.labels.tolist()) == {0, 2}
    unknown = folder(tmp_path / "unknown", OTHERS, "a", "d")
    with pytest.raises(UserError, match=r"labels of the class d, which folder:.*heap has not"):
        load_dataset(replace(options, evaluation=unknown), with_labels=True)


def test_an_image_that_evaluates_is_not_learned_from(tmp_path: Path) -> None:
    both = np.concatenate([OTHERS, PIXELS[:7]])
    said: list[str] = []
    options = options_of(npz(tmp_path / "a.npz", PIXELS), npz(tmp_path / "b.npz", both))
    dataset = load_dataset(options, with_labels=False, say=said.append)
    learned = images(dataset.train) | images(dataset.select)
    assert len(dataset.eval) == 27 and learned.isdisjoint(images(dataset.eval)) and len(learned) == 53
    assert said == [
        f"--eval-data {options.evaluation}: 7 of its images are in {options.source} too, and only evaluate."
    ]


@pytest.mark.parametrize(
    ("evaluation", "says"),
    [
        ("digits", "expected one of npz:PATH, folder:PATH"),
        ("npz:nothing.npz", "no such file"),
        ("same", "has the images of"),
    ],
)
def test_what_cannot_evaluate_is_refused(evaluation: str, says: str, tmp_path: Path) -> None:
    source = npz(tmp_path / "a.npz", PIXELS)
    with pytest.raises(UserError, match=says):
        load_dataset(options_of(source, source if evaluation == "same" else evaluation), with_labels=False)


@pytest.mark.parametrize("count", range(3, 31))
def test_few_images_never_leave_a_part_empty(count: int) -> None:
    for seed in range(20):
        pool = Split(np.random.default_rng(seed).integers(0, 256, (count, 2, 2, 1), np.uint8), np.arange(count))
        parts = split_by_content(pool, 0.1, 0.1)
        assert min(map(len, parts)) >= 1 and sum(map(len, parts)) == count
        labels = [label for part in parts if part.labels is not None for label in part.labels]
        assert sorted(labels) == list(range(count))


def test_equal_images_stay_together_however_few() -> None:
    pool = Split(np.repeat(PIXELS[:4, :2, :2], 3, axis=0), None)
    parts = [images(part) for part in split_by_content(pool, 0.1, 0.1)]
    assert sum(map(len, parts)) == 4
    with pytest.raises(UserError, match="12 images, 2 of them different, are too few for 3 parts"):
        split_by_content(Split(np.repeat(PIXELS[:2], 6, axis=0), None), 0.1, 0.1)


# The command line ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


def test_ptq_measures_on_it_with_its_labels(user: User, tmp_path: Path) -> None:
    heap = npz(tmp_path / "heap.npz", PIXELS)
    held = npz(tmp_path / "held.npz", OTHERS, labels=np.arange(20) % 10, classes=np.array(NAMES))
    line = ("ptq", *user.teacher, *PLAIN, "--data", heap)
    told = succeeds(faqd_deploy(*line, "--eval-data", held, "--calibration-images", 16, "--out", tmp_path / "bundle"))
    said = re.search(r"([\d]+) to train or calibrate on, ([\d]+) to validate, 20 for evaluation; (.+?)\.", told.stderr)
    assert said is not None and said[3] == "labels of 10 classes, for evaluation alone"
    assert int(said[1]) + int(said[2]) == len(PIXELS)
    bundle = load_bundle(tmp_path / "bundle")
    evaluation = bundle.evaluation()
    assert len(evaluation.images) == 20 and evaluation.labels is not None and bundle.manifest["classes"] == NAMES


def test_a_run_remembers_it_and_export_can_take_another(user: User, tmp_path: Path) -> None:
    heap, held = npz(tmp_path / "heap.npz", PIXELS), npz(tmp_path / "held.npz", OTHERS, labels=np.arange(20) % 10)
    line = ("distill", *user.teacher, *PLAIN, "--data", heap)
    for name, more in (("with", ("--eval-data", held)), ("without", ())):
        succeeds(faqd_train(*line, *more, "--steps", 2, "--batch-size", 8, "--out", tmp_path / name))
    record = json.loads((tmp_path / "with" / "run.json").read_text())
    assert record["data"]["evaluation"] == held
    assert json.loads(succeeds(faqd_train("eval", tmp_path / "with", "--json", "-")).stdout)["images"] == 20
    succeeds(faqd_deploy("export", tmp_path / "with", "--out", tmp_path / "a"))
    assert len(load_bundle(tmp_path / "a").evaluation().images) == 20
    mixed = npz(tmp_path / "mixed.npz", np.concatenate([OTHERS, PIXELS]))
    told = succeeds(faqd_deploy("export", tmp_path / "without", "--eval-data", mixed, "--out", tmp_path / "b"))
    left = len(load_bundle(tmp_path / "b").evaluation().images)
    assert 20 <= left < 40
    assert f"{80 - left} of its images were learned from, and do not evaluate." in " ".join(told.stderr.split())


# Names and sizes ------------------------------------------------------------------------------------------------------


def turned(folder: Path) -> Path:
    """Pictures of several sizes, one of which lies on its side until its EXIF orientation is obeyed."""
    for index in range(24):
        image = Image.fromarray(np.full((10 + index, 40, 3), index, np.uint8))
        exif = Image.Exif()
        exif[274] = 6 if index % 2 else 1
        (folder / "below").mkdir(parents=True, exist_ok=True)
        image.save(folder / ("below" if index % 3 else "") / f"{index}.png", exif=exif)
    return folder


METRIC = """
def found(outputs, found):
    right = [name.endswith(f"{index}.png") for name, index in zip(found["names"], found["images"][:, 0, 0, 0])]
    return {"right": sum(right) / len(right), "images": len(right), "wide": float((found["sizes"][:, 1] == 40).mean())}
"""


@pytest.mark.parametrize("own", [True, False], ids=["eval-data", "a tenth"])
def test_a_metric_knows_which_file_an_image_was(own: bool, user: User, tmp_path: Path) -> None:
    pictures = turned(tmp_path / "pictures")
    heap = ("--data", npz(tmp_path / "heap.npz", PIXELS), "--eval-data") if own else ("--data",)
    line = ("ptq", *user.teacher, *PLAIN, *heap, f"folder:{pictures}", "--image-size", 8, "--out", tmp_path / "bundle")
    succeeds(faqd_deploy(*line))
    data = load_bundle(tmp_path / "bundle").evaluation()
    assert data.names is not None and data.sizes is not None and (len(data.names) == 24) == own
    for name, size in zip(data.names, data.sizes, strict=True):
        index = int(Path(name).stem)
        assert (pictures / name).is_file()
        assert tuple(size) == ((40, 10 + index) if index % 2 else (10 + index, 40))
    (tmp_path / "metric.py").write_text(METRIC)
    measured = load_metric(f"{tmp_path / 'metric.py'}:found").of(
        data.teacher, data, load_bundle(tmp_path / "bundle"), "x"
    )
    assert measured["right"] == 1 and measured["images"] == len(data.names)
    assert measured["wide"] == float((data.sizes[:, 1] == 40).mean())


def test_an_npz_file_has_no_names(user: User, tmp_path: Path) -> None:
    line = ("ptq", *user.teacher, *PLAIN, "--data", npz(tmp_path / "heap.npz", PIXELS), "--out", tmp_path / "bundle")
    succeeds(faqd_deploy(*line))
    data = load_bundle(tmp_path / "bundle").evaluation()
    assert data.names is None and data.sizes is None
