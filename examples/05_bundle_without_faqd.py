"""A bundle in somebody else's application: numpy, Pillow and onnxruntime, and nothing of faqd.

    python examples/05_bundle_without_faqd.py BUNDLE [PICTURE ...]

docs/bundle.md says what the files are. Without pictures it answers for the images that the bundle holds, beside the
float network's answers.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

NETWORK = "student.onnxruntime.onnx"


def checked(folder: Path, manifest: dict[str, Any], name: str) -> Path:
    """A file of the bundle, if it is the one that the manifest describes."""
    content = (folder / name).read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["files"][name]["sha256"]:
        sys.exit(f"{folder / name}: is not what the manifest says.")
    return folder / name


def network_input(images: NDArray[np.uint8], record: dict[str, Any]) -> NDArray[np.float32]:
    """(N, H, W, C) pixels, in the record's order of channels -> (N, C, H, W)."""
    mean, std = (np.asarray(record[name], np.float32) for name in ("mean", "std"))
    x = (images.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def read(path: str, record: dict[str, Any]) -> NDArray[np.uint8]:
    """One picture at the network's size; what a record says of cropping and borders is left to you here."""
    picture = Image.open(path).convert("L" if record["channels"] == "grey" else "RGB")
    pixels = np.asarray(picture.resize((record["width"], record["height"]), Image.Resampling.BILINEAR))
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return pixels[..., ::-1] if record["channels"] == "bgr" else pixels


folder = Path(sys.argv[1])
manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
record, classes = manifest["preprocess"], manifest["classes"]
session = onnxruntime.InferenceSession(checked(folder, manifest, NETWORK), providers=["CPUExecutionProvider"])
(name,) = (value.name for value in session.get_inputs())
outputs = [value.name for value in session.get_outputs()]

if len(sys.argv) > 2:
    images = np.stack([read(path, record) for path in sys.argv[2:]])
else:
    held = np.load(checked(folder, manifest, "eval.npz"), allow_pickle=False)
    images = held["images"]
(scores,) = session.run(outputs[:1], {name: network_input(images, record)})
if scores.ndim != 2:
    sys.exit(f"{folder}: {outputs[0]} has places; this example answers for classifiers.")
answers = scores.argmax(1)
for path, answer in zip(sys.argv[2:], answers, strict=False):
    print(f"{path}: {classes[answer] if classes else answer}")
if len(sys.argv) == 2:
    same = float((answers == held[f"teacher.{outputs[0]}"].argmax(1)).mean())
    print(f"{manifest['name']}: {len(images)} images, {100 * same:.1f} % as the float network answers")
