"""The examples of whole tasks: a detector judged by COCO's mean average precision, a segmenter by mean IoU."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from faqd.benchmarks.cli import bench_command
from faqd.benchmarks.measure.user_metric import load_metric
from faqd.preprocess import Preprocess, Resize
from faqd.user_file import importable
from tests.fixtures.toy_runs import faqd_deploy, outcome_of, succeeds, write_images
from tests.repository.test_walls import ROOT

DETECTOR, SEGMENTER = ROOT / "examples/detector", ROOT / "examples/segmenter"
RESIZES: tuple[Resize, ...] = ("stretch", "crop", "letterbox")
SIDE = 64
QUICK = ("--duration", "0.02", "--rounds", "2", "--warm-up", "0", "--batch", "1", "--backend", "onnxruntime")
with importable(DETECTOR):
    from detections import detections, in_picture
with importable(SEGMENTER):
    from mean_iou import as_seen


def prepared(resize: Resize, height: int = SIDE, width: int = SIDE) -> Preprocess:
    return Preprocess(height, width, (0.0,) * 3, (1.0,) * 3, resize)


def yolox_of(boxes: NDArray[Any], classes: NDArray[Any], count: int = 2, stride: int = 8) -> NDArray[np.float32]:
    """What a perfect YOLOX of one stride gives for boxes (K, 4) in pixels of its input, (1, 5 + count, h, w)."""
    maps = np.zeros((1, 5 + count, SIDE // stride, SIDE // stride), np.float32)
    for box, number in zip(boxes, classes, strict=True):
        middle, extent = (box[:2] + box[2:]) / 2 / stride, (box[2:] - box[:2]) / stride
        column, row = np.minimum(middle, SIDE // stride - 1).astype(int)
        maps[0, :4, row, column] = [*(middle - [column, row]), *np.log(extent)]
        maps[0, [4, 5 + number], row, column] = 0.9
    return maps


BOXES, CLASSES = np.array([[4.0, 8, 20, 30], [30, 34, 62, 50]]), np.array([1, 0])


def of_ultralytics() -> NDArray[np.float32]:
    values = np.zeros((1, 6, 9), np.float32)
    for place, (box, number) in enumerate(zip(BOXES, CLASSES, strict=True)):
        values[0, :4, place] = [*(box[:2] + box[2:]) / 2, *(box[2:] - box[:2])]
        values[0, 4 + number, place] = 0.81
        values[0, :, place + 4] = values[0, :, place] * [1, 1, 1.02, 1, 0.9, 0.9]  # the same object again
    return values


HEADS: dict[str, Mapping[str, NDArray[np.float32]]] = {
    "yolox": {"a": yolox_of(BOXES[:1], CLASSES[:1]), "b": yolox_of(BOXES[1:], CLASSES[1:], stride=16)},
    "ultralytics": {"output0": of_ultralytics()},
    "without suppression": {
        "output0": np.array([[[*BOXES[1], 0.81, 0], [0, 0, 9, 9, 0, 1], [*BOXES[0], 0.81, 1]]], np.float32)
    },
}


@pytest.mark.parametrize("head", HEADS)
def test_boxes_of_every_head_that_is_known(head: str) -> None:
    (found,) = detections(HEADS[head], (SIDE, SIDE))
    order = np.argsort(found.boxes[:, 0])
    np.testing.assert_allclose(found.boxes[order], BOXES, atol=1e-4)
    assert found.classes[order].tolist() == CLASSES.tolist() and np.allclose(found.scores, 0.81)


def test_another_head_is_no_surprise() -> None:
    with pytest.raises(ValueError, match=r"logits \(1, 10\) are of no head"):
        detections({"logits": np.zeros((1, 10))}, (SIDE, SIDE))


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize(("height", "width"), [(96, 150), (150, 96), (64, 64), (40, 61)])
def test_boxes_go_back_into_the_picture(resize: Resize, height: int, width: int) -> None:
    picture = np.zeros((height, width, 3), np.uint8)
    top, left, bottom, right = int(0.4 * height), int(0.4 * width), int(0.62 * height), int(0.6 * width)
    picture[top:bottom, left:right] = 255
    preprocess = prepared(resize)
    rows, columns = np.nonzero(preprocess.fit(picture)[..., 0] > 180)
    seen = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], float)
    (found,) = in_picture(seen, (height, width), preprocess.to_json())
    np.testing.assert_allclose(found, [left, top, right, bottom], atol=0.6 * max(height, width) / SIDE + 0.6)


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize(("height", "width"), [(97, 150), (150, 96), (40, 61)])
def test_a_mask_is_seen_as_its_picture_is(resize: Resize, height: int, width: int) -> None:
    mask = np.zeros((height, width), np.uint8)
    mask[height // 3 : height // 2, width // 3 :] = 1
    preprocess = prepared(resize, 48, 64)
    seen = as_seen(mask, preprocess)
    picture = preprocess.fit(np.repeat(mask[..., None] * 255, 3, 2))[..., 0]
    known = seen < 2
    assert seen.shape == (48, 64) and (known.all() == (resize != "letterbox" or known.all()))
    assert np.mean((picture > 127)[known] == seen[known].astype(bool)) > 0.97
    assert resize != "letterbox" or (picture[~known] == 114).all()


def pictures(folder: Path) -> tuple[list[str], list[tuple[int, int]]]:
    draw = np.random.default_rng(0)
    sizes = [(96, 128), (128, 96), (64, 64), (80, 100)] * 4
    folder.mkdir()
    for number, size in enumerate(sizes):
        Image.fromarray(draw.integers(0, 255, (*size, 3), np.uint8)).save(folder / f"{number:02}.png")
    return [f"{number:02}.png" for number in range(len(sizes))], sizes


def test_mean_average_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = load_metric(f"{DETECTOR / 'coco_map.py'}:metric").function
    names, sizes = pictures(tmp_path / "images")
    preprocess = prepared("letterbox")
    labels = tmp_path / "labels"
    labels.mkdir()
    annotations: list[dict[str, Any]] = []
    outputs = []
    for number, (name, (height, width)) in enumerate(zip(names, sizes, strict=True)):
        boxes = in_picture(BOXES, (height, width), preprocess.to_json())
        lines = []
        for box, kind in zip(boxes, CLASSES, strict=True):
            middle, extent = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
            lines.append(f"{kind} {middle[0] / width} {middle[1] / height} {extent[0] / width} {extent[1] / height}")
            entry = {"id": len(annotations) + 1, "image_id": 100 + number, "category_id": [1, 90][kind]}
            bbox = [float(value) for value in (*box[:2], *extent)]
            annotations.append({**entry, "bbox": bbox, "area": float(extent.prod()), "iscrowd": 0})
        (labels / f"{Path(name).stem}.txt").write_text("\n".join(lines))
        outputs.append(yolox_of(BOXES, CLASSES))
    listed = [
        {"id": 100 + n, "file_name": name, "height": size[0], "width": size[1]}
        for n, (name, size) in enumerate(zip(names, sizes, strict=True))
    ]
    known = {"images": listed, "annotations": annotations, "categories": [{"id": 1}, {"id": 90}]}
    (tmp_path / "instances.json").write_text(json.dumps(known))
    found = {
        "images": np.zeros((len(names), SIDE, SIDE, 3), np.uint8),
        "names": np.array(names),
        "sizes": np.array(sizes),
        "preprocess": preprocess.to_json(),
    }
    right = np.concatenate(outputs)
    half = right.copy()
    half[: len(names) // 2, 4] = 0  # nothing is found in every second picture
    for where in (labels, tmp_path / "instances.json"):
        monkeypatch.setenv("COCO_ANNOTATIONS", str(where))
        assert metric({"y": right}, found) == {"AP": pytest.approx(100), "AP50": pytest.approx(100)}
        assert metric({"y": half}, found)["AP"] == pytest.approx(50, abs=1)
        assert metric({"y": np.zeros_like(right)}, found) == {"AP": 0.0, "AP50": 0.0}
        missed, seen = np.arange(len(names)).reshape(2, -1)
        for drawn, expected in (((seen, seen), 100), ((missed, missed), 0), ((seen, seen, missed), 200 / 3)):
            rows = np.concatenate(drawn)  # a picture that was drawn twice counts twice
            of_these = {key: value[rows] if isinstance(value, np.ndarray) else value for key, value in found.items()}
            assert metric({"y": half[rows]}, of_these)["AP"] == pytest.approx(expected, abs=1)
    with pytest.raises(ValueError, match=r"knows no picture other\.png"):
        metric({"y": right}, {**found, "names": np.array(["other.png", *names[1:]])})


NETWORKS = """
import torch
from torch import nn

def detector():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.boxes, self.sure = body, nn.Conv2d(16, 4, 1), nn.Conv2d(16, 3, 1)
        def forward(self, x):
            x = self.body(x)
            return torch.cat([self.boxes(x), self.sure(x).sigmoid()], 1)
    return Net()

def segmenter():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 3, 1))
"""


@pytest.mark.parametrize("task", ["detector", "segmenter"])
def test_from_pictures_to_a_figure_and_pictures_again(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, sizes = pictures(tmp_path / "images")
    (tmp_path / "net.py").write_text(NETWORKS)
    known = tmp_path / "known"
    known.mkdir()
    for name, size in zip(names, sizes, strict=True):
        if task == "detector":
            (known / f"{Path(name).stem}.txt").write_text("1 0.5 0.5 0.25 0.5\n")
        else:
            Image.fromarray(np.random.default_rng(0).integers(0, 3, size, np.uint8)).save(known / name)
    torch.save(runpy.run_path(str(tmp_path / "net.py"))[task]().state_dict(), tmp_path / "net.pth")
    learned = write_images(tmp_path / "unlabelled", 24, SIDE)
    data = ("--data", f"folder:{learned}", "--eval-data", f"folder:{tmp_path / 'images'}")
    seen = ("--image-size", SIDE, "--resize", "letterbox", "--mean", "none", "--std", "none")
    bundle = tmp_path / "bundle"
    teacher = ("--teacher", f"{tmp_path / 'net.py'}:{task}", "--teacher-weights", tmp_path / "net.pth")
    succeeds(faqd_deploy("ptq", *teacher, *data, *seen, "--out", bundle))
    spec = f"{DETECTOR / 'coco_map.py' if task == 'detector' else SEGMENTER / 'mean_iou.py'}:metric"
    variable = {"detector": "COCO_ANNOTATIONS", "segmenter": "MASKS"}[task]
    line = (bundle, "--metric", spec, *QUICK, "--json", tmp_path / "bench.json")
    monkeypatch.delenv(variable, raising=False)
    missing = outcome_of(bench_command, line)
    assert missing.code == 2 and f"set {variable} to" in missing.stderr
    monkeypatch.setenv(variable, str(known))
    assert {"detector": "AP50", "segmenter": "mean IoU"}[task] in succeeds(outcome_of(bench_command, line)).stdout
    drawn = tmp_path / "drawn"
    script = DETECTOR / "boxes.py" if task == "detector" else SEGMENTER / "mean_iou.py"
    shown = [tmp_path / "images" / name for name in names[:2]]
    done = subprocess.run([sys.executable, script, bundle, drawn, *shown], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in names[:2]:
        with Image.open(drawn / name) as picture:
            left, right = np.split(np.asarray(picture), 2, axis=1)
            assert left.std() > 10 and left.shape == right.shape
