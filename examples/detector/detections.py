"""From a detector's raw outputs to boxes: decoding and suppression, in numpy, the same for float and INT8.

Known are the heads of YOLOX (a map (N, 5 + classes, H, W) for each stride: box, objectness, classes), of Ultralytics
(one output (N, 4 + classes, places): middle, width and height in pixels, classes) and of the ones that need no
suppression (one output (N, boxes, 6): corners in pixels, score, class).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LEAST_SCORE, MOST_OVERLAP = 0.01, 0.65
MOST_BOXES, MOST_CANDIDATES = 100, 3000
LARGEST_EXPONENT = 20


@dataclass(frozen=True)
class Detections:
    """Of one image, the surest first. boxes: (K, 4), left, top, right, bottom in pixels of the network's input.
    scores, classes: (K,)."""

    boxes: Array
    scores: Array
    classes: Array


def detections(outputs: Mapping[str, Array], side: tuple[int, int]) -> list[Detections]:
    """outputs: by name, (N, ...). side: height and width of the network's input. ValueError for another head."""
    values = [np.asarray(value, np.float32) for value in outputs.values()]
    if all(value.ndim == 4 and value.shape[1] > 5 for value in values):
        cells = np.concatenate([_yolox(value, side) for value in values], 1)
    elif len(values) == 1 and values[0].ndim == 3 and values[0].shape[2] == 6:
        return [_without_suppression(rows) for rows in values[0]]
    elif len(values) == 1 and values[0].ndim == 3 and values[0].shape[1] > 4:
        cells = _ultralytics(values[0])
    else:
        shapes = ", ".join(f"{name} {value.shape}" for name, value in outputs.items())
        raise ValueError(f"outputs {shapes} are of no head that is known here; write how yours is decoded.")
    return [_suppressed(image) for image in cells]


def in_picture(boxes: Array, picture: tuple[int, int], preprocess: Mapping[str, Any]) -> Array:
    """Boxes in pixels of the picture (height, width) that was brought to the network's size as `preprocess` says."""
    size, wanted = np.array(picture, float), np.array([preprocess["height"], preprocess["width"]], float)
    if preprocess["resize"] == "stretch":
        scaled, start = wanted, np.zeros(2)
    else:
        ratio = (max if preprocess["resize"] == "crop" else min)(*(wanted / size))
        scaled = np.maximum(1, np.rint(size * ratio))
        # Borders begin, and crops end, at whole pixels.
        start = (wanted - scaled) // 2 if preprocess["resize"] == "letterbox" else -((scaled - wanted) // 2)
    corners = (boxes.reshape(-1, 2, 2) - start[::-1]) / scaled[::-1] * size[::-1]
    return np.asarray(np.clip(corners, 0, size[::-1])).reshape(-1, 4)


def _yolox(values: Array, side: tuple[int, int]) -> Array:
    """(N, places, 4 + classes): corners, then scores."""
    rows, columns = np.indices(values.shape[2:])
    stride = np.array([side[1] / values.shape[3], side[0] / values.shape[2]]).reshape(2, 1, 1)
    middle = (values[:, :2] + np.stack([columns, rows])) * stride
    half = np.exp(np.minimum(values[:, 2:4], LARGEST_EXPONENT)) * stride / 2
    found: Array = np.concatenate([middle - half, middle + half, values[:, 4:5] * values[:, 5:]], 1)
    return np.asarray(found.reshape(*found.shape[:2], -1).transpose(0, 2, 1))


def _ultralytics(values: Array) -> Array:
    middle, half = values[:, :2], values[:, 2:4] / 2
    found: Array = np.concatenate([middle - half, middle + half, values[:, 4:]], 1)
    return np.asarray(found.transpose(0, 2, 1))


def _without_suppression(rows: Array) -> Detections:
    kept = rows[rows[:, 4] > LEAST_SCORE]
    kept = kept[np.argsort(-kept[:, 4], kind="stable")][:MOST_BOXES]
    return Detections(kept[:, :4], kept[:, 4], kept[:, 5].astype(int))


def _suppressed(cells: Array) -> Detections:
    """Of boxes of one class that overlap by more than MOST_OVERLAP the surest."""
    cell, classes = np.nonzero(cells[:, 4:] > LEAST_SCORE)
    scores = cells[cell, classes + 4]
    order = np.argsort(-scores, kind="stable")[:MOST_CANDIDATES]
    boxes, classes, scores = cells[cell[order], :4], classes[order], scores[order]
    kept: list[int] = []
    left = np.arange(len(scores))
    while len(left) and len(kept) < MOST_BOXES:
        first, left = int(left[0]), left[1:]
        kept.append(first)
        same = classes[left] == classes[first]
        left = left[~(same & (_overlap(boxes[first], boxes[left]) > MOST_OVERLAP))]
    return Detections(boxes[kept], scores[kept], classes[kept])


def _overlap(box: Array, others: Array) -> Array:
    """Intersection over union, (K,)."""
    common = (np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])).clip(0).prod(1)
    areas = [(some[..., 2:] - some[..., :2]).prod(-1) for some in (box, others)]
    return np.asarray(common / np.maximum(areas[0] + areas[1] - common, 1e-12))
