"""Scenes of four photographs each, and what class every second pixel shows: dense targets from real images.

`segmentation` is the metric for `faqd-bench --metric scenes.py:segmentation`; it reads the targets from the file that
FAQD_SCENES names. The images are the same file's: `--data npz:FILE`, and nothing in distillation reads a target.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.errors import UserError
from faqd.files import written_beside
from faqd.preprocess import Preprocess

SIDE = 64
CLASSES = 10
NEAREST_EDGE = 16
"""Pixels: every photograph is at least so high and so wide."""


def write_scenes(photos: NDArray[np.uint8], labels: NDArray[np.int64], path: Path, seed: int = 0) -> None:
    """An npz file of `images` (N, 64, 64, 3) uint8 and `targets` (N, 32, 32) uint8.

    photos: (4 N or a few more, 32, 32, 3), each in one scene at most, so that splits by scene share none.
    """
    images, targets = scenes(photos, labels, seed)
    with written_beside(path) as temporary, temporary.open("wb") as file:
        np.savez(file, images=images, targets=targets)


def scenes(
    photos: NDArray[np.uint8], labels: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Four photographs around a random point, each stretched to its rectangle; the class at every second pixel."""
    generator = np.random.RandomState(seed)
    order = generator.permutation(len(photos))[: len(photos) // 4 * 4].reshape(-1, 4)
    images = np.empty((len(order), SIDE, SIDE, 3), np.uint8)
    shown = np.empty((len(order), SIDE, SIDE), np.uint8)
    for image, classes, members in zip(images, shown, order, strict=True):
        # Even, so that a target never lies half in one photograph and half in another.
        row, column = 2 * generator.randint(NEAREST_EDGE // 2, (SIDE - NEAREST_EDGE) // 2 + 1, size=2)
        for index, member in enumerate(members):
            rows = slice(row, SIDE) if index // 2 else slice(0, row)
            columns = slice(column, SIDE) if index % 2 else slice(0, column)
            size = rows.stop - rows.start, columns.stop - columns.start
            image[rows, columns] = Preprocess(*size, (0.0,) * 3, (1.0,) * 3).fit(photos[member])
            classes[rows, columns] = labels[member]
    return images, shown[:, ::2, ::2]


def targets_of(images: NDArray[np.uint8], path: Path) -> NDArray[np.uint8]:
    """The targets of these scenes, found by their content, because splits do not keep the order of the file."""
    with np.load(path) as file:
        place = {hashlib.sha256(image.tobytes()).digest(): index for index, image in enumerate(file["images"])}
        keys = [hashlib.sha256(image.tobytes()).digest() for image in images]
        if missing := sum(key not in place for key in keys):
            raise UserError(f"{path}: {missing} of {len(images)} scenes are not in it; give the file they come from.")
        return file["targets"][[place[key] for key in keys]]  # type: ignore[no-any-return]


def class_counts(shown_NHW: NDArray[Any], targets_NHW: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(N, 2, classes): pixels of each class in both of prediction and target, and in either of them."""
    counts = np.empty((len(shown_NHW), 2, CLASSES), np.int64)
    for name in range(CLASSES):
        ours, wanted = shown_NHW == name, targets_NHW == name
        counts[:, 0, name] = (ours & wanted).sum((1, 2))
        counts[:, 1, name] = (ours | wanted).sum((1, 2))
    return counts


def mean_iou(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Intersection over union, mean over the classes that occur. counts: (..., 2, classes), summed over scenes."""
    both, either = counts[..., 0, :], counts[..., 1, :]
    return np.asarray((both / np.maximum(either, 1)).sum(-1) / np.maximum((either > 0).sum(-1), 1))


def segmentation(outputs: Mapping[str, NDArray[Any]], evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Share of pixels of the right class, and mean intersection over union."""
    if "FAQD_SCENES" not in os.environ:
        raise UserError("FAQD_SCENES is not set; set it to the npz file with the targets of these scenes.")
    targets = targets_of(evaluation["images"], Path(os.environ["FAQD_SCENES"]))
    (scores_NKHW,) = outputs.values()
    shown = scores_NKHW.argmax(1)
    counts = class_counts(shown, targets).sum(0)
    return {"pixel_accuracy": float((shown == targets).mean()), "mean_iou": float(mean_iou(counts))}
