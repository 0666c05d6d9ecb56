"""The study of the defaults: rehearsed on one network, and restarted; the measures of results/defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from faqd.benchmarks.studies import defaults
from faqd.train.networks.source import user_function
from tests.fixtures.toy_runs import Outcome, new_user, outcome_of, succeeds, write_images

RESULTS = Path(__file__).parents[2] / "results" / "defaults"
METRIC = """
from PIL import Image
import numpy as np

def closeness(outputs, found):
    assert len(found["images"]) == len(found["files"]) == len(outputs["logits"])
    for file, image in zip(found["files"], found["images"]):
        assert (np.asarray(Image.open(file).convert("RGB")) == image).all()
    return -float(abs(outputs["logits"] - found["teacher"]["logits"]).max())
"""


def tried(folder: Path, *more: object) -> Outcome:
    line = (folder / "networks.json", "--out", folder / "work", "--bits", "4/4", "--steps", 4, "--json", "-")
    return outcome_of(defaults.command, (*line, *more))


def user(folder: Path, **more: object) -> None:
    new_user(folder)
    (folder / "mine.py").write_text(METRIC)
    entry = {
        "teacher": "net.py:build",
        "weights": "best.pth",
        "data": {"data": "folder:images", "mean": "none", "std": "none"},
        "metric": "mine.py:closeness",
        **more,
    }
    (folder / "networks.json").write_text(json.dumps({"toy": entry}))


def test_every_cell_is_judged_beside_ptq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user(tmp_path)
    (found,) = json.loads(succeeds(tried(tmp_path)).stdout)["cells"].values()
    assert 5 < found["images"] < 60 and found["teacher"] == {"metric": 0}
    for flavour in ("tensorrt", "onnxruntime"):
        assert found["ptq"][flavour].keys() == found["distilled"][flavour].keys() == {"distance", "metric"}
    assert found["kept"]["measure"] <= found["kept"]["untrained"] and found["recipe"]["training"]["steps"] == 4
    assert str(tmp_path) not in json.dumps(found)
    monkeypatch.setattr(defaults, "cell", lambda *_: pytest.fail("a finished cell is not made again"))
    assert json.loads(succeeds(tried(tmp_path)).stdout)["cells"] == {"toy-w4a4-s0": found}
    assert "holds a study with other options" in tried(tmp_path, "--steps", 5).stderr
    assert "--only other: not in" in tried(tmp_path, "--only", "other").stderr


def test_all_images_of_another_folder_are_judged_and_losses_compared(tmp_path: Path) -> None:
    user(tmp_path, judged_on="folder:others")
    write_images(tmp_path / "others", 20)
    cells = json.loads(succeeds(tried(tmp_path, "--logit", "default", "--logit", "kl")).stdout)["cells"]
    assert [cell["images"] for cell in cells.values()] == [20, 20]
    assert {name: cell["recipe"]["logit"] for name, cell in cells.items()} == {
        "toy-w4a4-s0": "relative",
        "toy-w4a4-s0-kl": "kl",
    }
    assert cells["toy-w4a4-s0"]["ptq"] == cells["toy-w4a4-s0-kl"]["ptq"]


def measured(name: str, outputs: dict[str, Any], found: dict[str, Any]) -> float:
    return float(user_function(f"{RESULTS / 'metrics.py'}:{name}", "metric")(outputs, found))


def two_images(folder: Path) -> list[str]:
    """One of 60x40 pixels with two boxes, of classes 3 and 0, and one of 40x60 with a box of class 3."""
    places = (folder / "images" / "val", folder / "object_detection" / "labels" / "val")
    for place in places:
        place.mkdir(parents=True)
    files = []
    labels = {"a": "3 0.25 0.25 0.2 0.2\n0 0.7 0.6 0.4 0.5\n", "b": "3 0.5 0.7 0.5 0.3\n"}
    for (name, text), size in zip(labels.items(), ((60, 40), (40, 60)), strict=True):
        Image.new("RGB", size).save(places[0] / f"{name}.png")
        (places[1] / f"{name}.txt").write_text(text)
        files.append(str(places[0] / f"{name}.png"))
    return files


def logit(share: float) -> float:
    return float(np.log(share / (1 - share)))


def fastestdet_map(boxes: list[tuple[int, int, float, float, float, float]]) -> Any:
    """A map of 10x10 places that says these (image, class, middle x, y, width, height), and nothing else."""
    values = np.full((2, 85, 10, 10), -20.0)
    values[:, 0] = 0
    for image, number, x, y, width, height in boxes:
        column, row = int(x * 10), int(y * 10)
        values[image, :5, row, column] = (
            0.9,
            np.arctanh(x * 10 - column),
            np.arctanh(y * 10 - row),
            logit(width),
            logit(height),
        )
        values[image, 5 + number, row, column] = 20
    return values


def test_ap_is_100_where_every_box_is_found_and_counts_classes_alike(tmp_path: Path) -> None:
    found = {"images": np.zeros((2, 80, 80, 3), np.uint8), "files": two_images(tmp_path)}
    right = [(0, 3, 0.25, 0.25, 0.2, 0.2), (0, 0, 0.7, 0.6, 0.4, 0.5), (1, 3, 0.5, 0.7, 0.5, 0.3)]
    assert measured("fastestdet_ap", {"logits": fastestdet_map(right)}, found) == pytest.approx(100)
    assert measured("fastestdet_ap", {"logits": fastestdet_map(right[:1] + right[2:])}, found) == pytest.approx(50)
    # One of two boxes of class 3: recalls up to a half, 51 of 101.
    assert measured("fastestdet_ap", {"logits": fastestdet_map(right[:2])}, found) == pytest.approx(
        (100 + 5100 / 101) / 2
    )
    # Wide by a quarter: an overlap of 0.8, enough for seven of ten thresholds.
    wide = [*right[:1], (0, 0, 0.7, 0.6, 0.499, 0.5), *right[2:]]
    assert measured("fastestdet_ap", {"logits": fastestdet_map(wide)}, found) == pytest.approx((100 + 70) / 2)
    assert measured("fastestdet_ap", {"logits": fastestdet_map([])}, found) == 0


def test_yolox_boxes_are_those_of_letterboxed_images(tmp_path: Path) -> None:
    found = {"images": np.zeros((2, 96, 96, 3), np.uint8), "files": two_images(tmp_path)}
    maps = {
        f"logits_{index}": np.zeros((2, 85, 96 // stride, 96 // stride)) for index, stride in enumerate((8, 16, 32))
    }
    # 60x40 becomes 96x64 below 16 rows of grey, 40x60 64x96 behind 16 columns.
    for image, number, left, top, width, height in ((0, 3, 14.4, 25.6, 19.2, 12.8), (0, 0, 48, 38.4, 38.4, 32)):
        x, y = left + width / 2, top + height / 2
        column, row = int(x // 8), int(y // 8)
        maps["logits_0"][image, :5, row, column] = x / 8 - column, y / 8 - row, np.log(width / 8), np.log(height / 8), 1
        maps["logits_0"][image, 5 + number, row, column] = 1
    maps["logits_2"][1, :5, 2, 1] = 48 / 32 - 1, 67.2 / 32 - 2, np.log(1), np.log(28.8 / 32), 1
    maps["logits_2"][1, 5 + 3, 2, 1] = 1
    assert measured("yolox_ap", maps, found) == pytest.approx(100)


def test_persons_and_text_are_counted(tmp_path: Path) -> None:
    found = {"files": two_images(tmp_path)}
    assert measured("person_top1", {"logits": np.array([[0.0, 1.0], [0.0, 1.0]])}, found) == 50
    assert measured("person_top1", {"logits": np.array([[0.0, 1.0], [1.0, 0.0]])}, found) == 100
    ours, theirs = np.array([0.1, 0.4, 0.9, 0.2]), np.array([0.1, 0.4, 0.2, 0.4])
    assert measured("text_iou", {"logits": ours}, {"teacher": {"logits": theirs}}) == pytest.approx(100 / 3)
