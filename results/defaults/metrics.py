"""What the networks of networks.json are for, measured: (outputs, found) -> a number, the larger the better.

found["files"] are the judged images, COCO's, as .../images/PART/NAME.jpg; the boxes of each lie in
.../object_detection/labels/PART/NAME.txt, a line `class x y width height` for each in shares of the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]
Boxes = tuple[Array, Array, Array]
"""Corners (N, 4) as left, top, right, bottom; classes (N,); scores (N,)."""

PERSON = 0
LEAST_PERSON = 0.005
"""Of the image: Visual Wake Words has no smaller persons."""
TEXT = 0.3
"""From here on PP-OCR's map says text."""
OVERLAPS = np.arange(0.5, 1.0, 0.05)
RECALLS = np.linspace(0, 1, 101)
MOST_BOXES, MOST_CANDIDATES, LEAST_SCORE = 100, 3000, 0.01


def yolox_ap(outputs: Mapping[str, Array], found: Mapping[str, Any]) -> float:
    """COCO's AP in %. Three maps (N, 85, H, W): box, objectness, 80 classes, probabilities but for the box."""
    size = found["images"].shape[1]
    cells = []
    for values in outputs.values():
        stride = size / values.shape[2]
        middle = (values[:, :2] + _grid(values)) * stride
        half = np.exp(np.minimum(values[:, 2:4], 20)) * stride / 2
        cells.append(_cells(np.concatenate([middle - half, middle + half, values[:, 4:5] * values[:, 5:]], 1)))
    truth = [_letterboxed(boxes, file, size) for boxes, file in zip(_labels(found), found["files"], strict=True)]
    return average_precision([_kept(image, 0.65) for image in np.concatenate(cells, 1)], truth)


def fastestdet_ap(outputs: Mapping[str, Array], found: Mapping[str, Any]) -> float:
    """COCO's AP in %. A map (N, 85, H, W): objectness as a probability, box, logits of 80 classes."""
    (values,) = outputs.values()
    _, _, height, width = values.shape
    sizes = np.array([width, height]).reshape(1, 2, 1, 1)
    middle = (np.tanh(values[:, 1:3]) + _grid(values)) / sizes
    half = _sigmoid(values[:, 3:5]) / 2
    # As published, but that every class of a cell may be one, not the likeliest alone.
    scores = values[:, :1].clip(0, 1) ** 0.6 * _softmax(values[:, 5:]) ** 0.4
    cells = _cells(np.concatenate([middle - half, middle + half, scores], 1))
    return average_precision([_kept(image, 0.45) for image in cells], list(_labels(found)))


def person_top1(outputs: Mapping[str, Array], found: Mapping[str, Any]) -> float:
    """How many images in % are told right, with a person or without."""
    (scores,) = outputs.values()
    persons = [
        bool(((boxes[:, 2:] - boxes[:, :2]).prod(1)[classes == PERSON] >= LEAST_PERSON).any())
        for boxes, classes, _ in _labels(found)
    ]
    return float((scores.argmax(1) == np.array(persons)).mean() * 100)


def text_iou(outputs: Mapping[str, Array], found: Mapping[str, Any]) -> float:
    """Pixels that are text for student and teacher, in % of those that are for one of them."""
    (ours,), (theirs,) = ([values > TEXT for values in each.values()] for each in (outputs, found["teacher"]))
    return float((ours & theirs).sum() / max(1, (ours | theirs).sum()) * 100)


def text(outputs: Mapping[str, Array], found: Mapping[str, Any]) -> dict[str, float]:
    """The same for `faqd-bench --metric`, which takes figures by name."""
    return {"text_iou": text_iou(outputs, found)}


def average_precision(found: list[Boxes], truth: list[Boxes]) -> float:
    """COCO's AP in %: mean over classes that are there, and over overlaps of 0.5 to 0.95, of the precision at 101
    recalls. An item of both lists for each image."""
    classes = np.unique(np.concatenate([classes for _, classes, _ in truth]))
    return float(np.mean([_precision_of(number, found, truth) for number in classes]) * 100)


def _precision_of(number: int, found: list[Boxes], truth: list[Boxes]) -> float:
    scores, hits, wanted = [], [], 0
    for (boxes, classes, confidence), (there, of, _) in zip(found, truth, strict=True):
        order = np.argsort(-confidence[classes == number], kind="stable")
        scores.append(confidence[classes == number][order])
        hits.append(_hits(boxes[classes == number][order], there[of == number]))
        wanted += int((of == number).sum())
    order = np.argsort(-np.concatenate(scores), kind="stable")
    right = np.concatenate(hits, 1)[:, order].cumsum(1)
    precision = right / np.arange(1, len(order) + 1)
    # At every recall the best precision that is reached there or beyond.
    best = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    best = np.concatenate([best, np.zeros((len(OVERLAPS), 1))], 1)
    return float(np.mean([row[np.searchsorted(r, RECALLS)] for row, r in zip(best, right / wanted, strict=True)]))


def _hits(boxes: Array, truth: Array) -> Array:
    """Which boxes, the surest first, are right, for each of OVERLAPS: no true box counts twice."""
    overlap = _overlap(boxes, truth)
    hits = np.zeros((len(OVERLAPS), len(boxes)), bool)
    for least, hit in zip(OVERLAPS, hits, strict=True):
        free = np.ones(len(truth), bool)
        for box in range(len(boxes) if len(truth) else 0):
            best = np.where(free, overlap[box], -1).argmax()
            if free[best] and overlap[box, best] >= least:
                free[best], hit[box] = False, True
    return hits


def _kept(cells: Array, most: float) -> Boxes:
    """What is left of one image's cells (boxes, then scores of the classes), where those of a class that overlap by
    more than `most` are one."""
    cell, classes = np.nonzero(cells[:, 4:] > LEAST_SCORE)
    scores = cells[cell, classes + 4]
    order = np.argsort(-scores, kind="stable")[:MOST_CANDIDATES]
    boxes, classes, scores = cells[cell[order], :4], classes[order], scores[order]
    kept: list[int] = []
    left = np.arange(len(scores))
    while len(left) and len(kept) < MOST_BOXES:
        first, left = int(left[0]), left[1:]
        kept.append(first)
        same = (classes[left] == classes[first]) & (_overlap(boxes[first : first + 1], boxes[left])[0] > most)
        left = left[~same]
    return boxes[kept], classes[kept], scores[kept]


def _overlap(some: Array, others: Array) -> Array:
    """Intersection over union, (some, others)."""
    low = np.maximum(some[:, None, :2], others[None, :, :2])
    high = np.minimum(some[:, None, 2:], others[None, :, 2:])
    common = (high - low).clip(0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (some, others)]
    return np.asarray(common / np.maximum(areas[0][:, None] + areas[1][None] - common, 1e-12))


def _labels(found: Mapping[str, Any]) -> Iterator[Boxes]:
    """The true boxes of every image, in shares of it."""
    for file in map(Path, found["files"]):
        lines = file.parents[2] / "object_detection" / "labels" / file.parent.name / f"{file.stem}.txt"
        text = lines.read_text(encoding="utf-8") if lines.is_file() else ""  # an image without boxes has none
        rows = np.array([line.split() for line in text.splitlines()], float).reshape(-1, 5)
        middle, half = rows[:, 1:3], rows[:, 3:] / 2
        yield np.concatenate([middle - half, middle + half], 1), rows[:, 0].astype(int), np.ones(len(rows))


def _letterboxed(boxes: Boxes, file: str, size: int) -> Boxes:
    """In pixels of the square image with grey borders that the network sees."""
    with Image.open(file) as image:
        sizes = np.array(image.size)
    scaled = np.rint(sizes * (size / sizes.max()))
    corners = boxes[0].reshape(-1, 2, 2) * scaled + (size - scaled) // 2
    return corners.reshape(-1, 4), boxes[1], boxes[2]


def _grid(values: Array) -> Array:
    """Column and row of every place of a map, (1, 2, H, W)."""
    rows, columns = np.indices(values.shape[2:])
    return np.stack([columns, rows])[None]


def _cells(values: Array) -> Array:
    """(N, C, H, W) as (N, places, C)."""
    return values.reshape(*values.shape[:2], -1).transpose(0, 2, 1)


def _sigmoid(values: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-values)))


def _softmax(values: Array) -> Array:
    powers = np.exp(values - values.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))
