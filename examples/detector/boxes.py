"""Boxes of the float network beside those of the INT8 student, drawn into pictures.

    python examples/detector/boxes.py BUNDLE OUT PICTURE...

On the left the float network, on the right the file that an engine is built from; both run on onnxruntime.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from detections import Array, detections, in_picture
from PIL import Image, ImageDraw, ImageOps

from faqd import bundle as names

SHOWN = 0.3
"""Boxes below this score are not drawn."""
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")


def drawn(picture: Image.Image, boxes: Array, scores: Array, classes: Array, title: str) -> Image.Image:
    canvas = ImageOps.expand(picture, (0, 16, 0, 0), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((4, 3), f"{title}: {int((scores >= SHOWN).sum())} boxes", "black")
    for (left, top, right, bottom), score, number in zip(boxes, scores, classes, strict=True):
        if score >= SHOWN:
            colour = COLOURS[number % len(COLOURS)]
            pen.rectangle([left, top + 16, right, bottom + 16], outline=colour, width=2)
            pen.text((left + 3, top + 18), f"{number} {score:.2f}", colour)
    return canvas


bundle, out = names.load_bundle(Path(sys.argv[1])), Path(sys.argv[2])
out.mkdir(parents=True, exist_ok=True)
files = {"float": names.TEACHER, "INT8": names.STUDENT_TENSORRT_FP32}
sessions = {title: onnxruntime.InferenceSession(bundle.folder / file) for title, file in files.items()}
preprocess = bundle.preprocess
for path in map(Path, sys.argv[3:]):
    picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    fitted = preprocess.fit(np.asarray(picture))[None]
    sides = []
    for title, session in sessions.items():
        answers = session.run(None, {session.get_inputs()[0].name: bundle.network_input(fitted)})
        outputs = {value.name: answer for value, answer in zip(session.get_outputs(), answers, strict=True)}
        (found,) = detections(outputs, (preprocess.height, preprocess.width))
        boxes = in_picture(found.boxes, (picture.height, picture.width), preprocess.to_json())
        sides.append(np.asarray(drawn(picture, boxes, found.scores, found.classes, title)))
    Image.fromarray(np.concatenate(sides, 1)).save(out / f"{path.stem}.png")
    print(out / f"{path.stem}.png")
