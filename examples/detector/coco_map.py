"""COCO's mean average precision as a metric of the bench, by pycocotools.

    COCO_ANNOTATIONS=instances_val2017.json faqd-bench BUNDLE --metric examples/detector/coco_map.py:metric

COCO_ANNOTATIONS is a file as COCO has it, or a folder of YOLO's label files: NAME.txt for NAME.jpg, a line
`class x y width height` in shares of the picture. A picture's name without folders finds its annotations; where it is
drawn twice, by `--bootstrap`, it counts as two pictures.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from detections import Array, Detections, detections, in_picture
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def metric(outputs: Mapping[str, Array], found: Mapping[str, Any]) -> dict[str, float]:
    """AP over overlaps of 0.5 to 0.95, and AP50, in %. A bundle from a folder has the `names` and `sizes` it needs."""
    where = os.environ.get("COCO_ANNOTATIONS")
    if where is None:
        raise ValueError("set COCO_ANNOTATIONS to a file of annotations or a folder of label files")
    if "names" not in found:
        raise ValueError("the bundle does not know its pictures' names; export it with --eval-data folder:DIR")
    names = [Path(str(name)).name for name in found["names"]]
    truth = (_from_labels if Path(where).is_dir() else _from_coco)(Path(where), names, found["sizes"])
    categories = sorted(category["id"] for category in truth["categories"])
    side = found["images"].shape[1:3]
    rows = []
    for image, size, one in zip(truth["images"], found["sizes"], _decoded(outputs, side), strict=True):
        boxes = in_picture(one.boxes, tuple(size), found["preprocess"])
        for box, score, number in zip(boxes, one.scores, one.classes, strict=True):
            if number < len(categories):  # of a class that no label file has nothing is judged
                low, extent = box[:2], box[2:] - box[:2]
                rows.append([image["id"], *low, *extent, score, categories[number]])
    return _evaluated(truth, np.array(rows, float).reshape(-1, 7))


_KNOWN: dict[bytes, Detections] = {}
"""What was decoded, by a digest of an image's outputs: `--bootstrap` asks for the same images again and again."""


def _decoded(outputs: Mapping[str, Array], side: tuple[int, int]) -> list[Detections]:
    rows = zip(*outputs.values(), strict=True)
    digests = [hashlib.sha256(b"".join(values.tobytes() for values in row)).digest() for row in rows]
    new = {digest: row for row, digest in enumerate(digests) if digest not in _KNOWN}
    if new:
        first_seen = list(new.values())
        _KNOWN.update(zip(new, detections({name: y[first_seen] for name, y in outputs.items()}, side), strict=True))
    return [_KNOWN[digest] for digest in digests]


def _evaluated(truth: dict[str, Any], rows: Array) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells its progress there
        known = COCO()
        known.dataset = truth
        known.createIndex()
        if not len(rows):
            return {"AP": 0.0, "AP50": 0.0}
        judged = COCOeval(known, known.loadRes(rows), "bbox")
        judged.params.areaRng, judged.params.areaRngLbl = [[0, 1e10]], ["all"]  # a third of the time
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    ap, ap50 = (max(0.0, float(value)) for value in judged.stats[:2])  # -1 where there are no objects
    return {"AP": 100 * ap, "AP50": 100 * ap50}


def _from_coco(file: Path, names: list[str], _: Array) -> dict[str, Any]:
    """What a file of annotations says of these pictures, each of which is numbered by its place among them."""
    known, boxes, categories = _read_coco(file)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{file} knows no picture {unknown[0]} ({len(unknown)} of {len(names)} are not in it)")
    images = [{**known[name], "id": number} for number, name in enumerate(names, 1)]
    listed = [
        {**box, "image_id": number} for number, name in enumerate(names, 1) for box in boxes.get(known[name]["id"], ())
    ]
    annotations = [{**box, "id": number} for number, box in enumerate(listed, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


@functools.cache
def _read_coco(file: Path) -> tuple[dict[str, Any], dict[int, list[Any]], list[Any]]:
    """Pictures by name, boxes by the picture's number, and categories."""
    truth = json.loads(_text(file))
    boxes: dict[int, list[Any]] = {}
    for box in truth["annotations"]:
        boxes.setdefault(box["image_id"], []).append(box)
    return {image["file_name"]: image for image in truth["images"]}, boxes, truth["categories"]


def _from_labels(folder: Path, names: list[str], sizes: Array) -> dict[str, Any]:
    """Label files as COCO's annotations. A picture without a file has no objects."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    classes = {0}
    for number, (name, (height, width)) in enumerate(zip(names, sizes, strict=True), 1):
        images.append({"id": number, "file_name": name, "height": int(height), "width": int(width)})
        file = folder / f"{Path(name).stem}.txt"
        for line in _text(file).splitlines() if file.is_file() else ():
            kind, x, y, w, h = line.split()[:5]
            classes.add(int(kind))
            size = np.array([w, h], float) * [width, height]
            low = np.array([x, y], float) * [width, height] - size / 2
            box = {"bbox": [*low, *size], "area": float(size.prod()), "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": int(kind), **box})
    categories = [{"id": kind} for kind in range(max(classes) + 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _text(file: str | Path) -> str:
    return Path(file).read_text(encoding="utf-8")
