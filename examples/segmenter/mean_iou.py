"""Mean intersection over union as a metric of the bench, and masks drawn over pictures.

    MASKS=DIR faqd-bench BUNDLE --metric examples/segmenter/mean_iou.py:metric
    python examples/segmenter/mean_iou.py BUNDLE OUT PICTURE...

MASKS holds NAME.png for NAME.jpg: a picture of the same size, whose pixels are numbers of classes; IGNORED counts
nowhere. The network gives scores (N, classes, H, W). The second line draws the float network's classes on the left and
on the right those of the file that an engine is built from; both run on onnxruntime.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image, ImageOps

from faqd import bundle as files
from faqd.preprocess import Preprocess

Array = NDArray[Any]
IGNORED = 255
OPACITY = 0.5


def metric(outputs: Mapping[str, Array], found: Mapping[str, Any]) -> dict[str, float]:
    """In %, over the classes that are in the masks or were found, and the share of pixels that are right. A bundle from
    a folder has the `names` it needs."""
    folder = os.environ.get("MASKS")
    if folder is None:
        raise ValueError("set MASKS to the folder of masks")
    if "names" not in found:
        raise ValueError("the bundle does not know its pictures' names; export it with --eval-data folder:DIR")
    (scores,) = outputs.values()
    preprocess = Preprocess.from_json(dict(found["preprocess"]))
    classes = scores.shape[1]
    counts = np.zeros((classes, classes), np.int64)
    for name, one in zip(found["names"], scores, strict=True):
        with Image.open(Path(folder) / f"{Path(str(name)).stem}.png") as picture:
            mask = as_seen(np.asarray(picture), preprocess)
        told = classes_of(one, mask.shape)
        known = mask < classes
        pairs = classes * mask[known].astype(int) + told[known]
        counts += np.bincount(pairs, minlength=classes**2).reshape(classes, -1)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return {
        "mean IoU": float(100 * (counts.diagonal()[union > 0] / union[union > 0]).mean()),
        "pixels": float(100 * counts.diagonal().sum() / max(1, counts.sum())),
    }


def as_seen(mask: Array, preprocess: Preprocess) -> Array:
    """A mask (H, W) at the network's size: each pixel the nearest one, IGNORED in the borders of a letterbox."""
    size, wanted = np.array(mask.shape, float), np.array([preprocess.height, preprocess.width], float)
    scaled = wanted
    if preprocess.resize != "stretch":
        ratio = (max if preprocess.resize == "crop" else min)(*(wanted / size))
        scaled = np.maximum(1, np.rint(size * ratio))
    rows, columns = (
        np.minimum((np.arange(int(n)) + 0.5) * s / n, s - 1).astype(int) for n, s in zip(scaled, size, strict=True)
    )
    near: Array = mask[rows][:, columns]
    if preprocess.resize == "crop":
        top, left = ((scaled - wanted) // 2).astype(int)
        return near[top : top + preprocess.height, left : left + preprocess.width]
    framed = np.full((preprocess.height, preprocess.width), IGNORED, mask.dtype)
    top, left = ((wanted - scaled) // 2).astype(int)
    framed[top : top + len(rows), left : left + len(columns)] = near
    return framed


def classes_of(scores: Array, size: tuple[int, ...]) -> Array:
    """The likeliest class of each pixel, (H, W). scores: (classes, h, w), of which those of the nearest place count."""
    likeliest = scores.argmax(0)
    rows, columns = (np.arange(n) * m // n for n, m in zip(size, likeliest.shape, strict=True))
    return np.asarray(likeliest[rows][:, columns])


def overlaid(pixels: Array, classes: Array) -> Array:
    """Pixels (H, W, 3) with a colour for every class but the first."""
    numbers = np.arange(256)
    colours = np.stack([(numbers * step) % 206 + 50 for step in (67, 131, 193)], 1)
    mixed = (1 - OPACITY) * pixels + OPACITY * colours[classes]
    return np.where(classes[..., None] > 0, mixed, pixels).astype(np.uint8)


def main(folder: str, out: str, *pictures: str) -> None:
    bundle = files.load_bundle(Path(folder))
    Path(out).mkdir(parents=True, exist_ok=True)
    networks = (files.TEACHER, files.STUDENT_TENSORRT_FP32)
    sessions = [onnxruntime.InferenceSession(bundle.folder / name) for name in networks]
    for path in map(Path, pictures):
        rgb = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        fitted = bundle.preprocess.fit(rgb)
        shown = np.broadcast_to(fitted, (*fitted.shape[:2], 3))
        sides = []
        for session in sessions:
            (scores,) = session.run(None, {session.get_inputs()[0].name: bundle.network_input(fitted[None])})
            sides.append(overlaid(shown, classes_of(scores[0], fitted.shape[:2])))
        Image.fromarray(np.concatenate(sides, 1)).save(Path(out) / f"{path.stem}.png")
        print(Path(out) / f"{path.stem}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
