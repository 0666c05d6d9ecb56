"""A detector: dense outputs, a head that several maps share, and boxes that are decoded outside of the network.

    python examples/03_detector.py BUNDLE

A minute or two on a CPU. Scenes are handwritten digits on a noisy canvas. The detector learns from their places, the
2/4 student from the scenes alone. Decoding and suppression are the application's: numpy, the same for both.
"""

import sys

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn

import faqd

SIDE, STRIDE = 64, 8
torch.manual_seed(0)
draw = np.random.default_rng(0)
digits = (load_digits().images * (255 / 16)).astype(np.uint8)


def scene() -> tuple[NDArray[np.uint8], list[tuple[int, int, int]]]:
    """A canvas (SIDE, SIDE) and its digits as (top, left, side)."""
    canvas, found = draw.integers(0, 60, (SIDE, SIDE)).astype(np.uint8), []
    for corner in draw.permutation(4)[: draw.integers(1, 4)]:  # one to a quarter, so that none hides another
        side = 8 * int(draw.integers(2, 4))
        top, left = (32 * part + int(draw.integers(0, 33 - side)) for part in divmod(int(corner), 2))
        shape = np.kron(digits[draw.integers(len(digits))], np.ones((side // 8, side // 8), np.uint8))
        canvas[top : top + side, left : left + side] = np.maximum(canvas[top : top + side, left : left + side], shape)
        found.append((top, left, side))
    return canvas, found


scenes, objects = zip(*(scene() for _ in range(640)), strict=True)
images = torch.from_numpy(np.stack(scenes))[:, None].float() / 255


def unit(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.SiLU())


class Detector(nn.Module):
    """For each cell of STRIDE pixels whether a digit's middle is in it, and that digit's top, left and side."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(unit(1, 16, 2), unit(16, 32, 2), unit(32, 64, 2), unit(64, 64, 1))
        self.score, self.box = nn.Conv2d(64, 1, 1), nn.Conv2d(64, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x)
        return {"score": torch.sigmoid(self.score(x)), "box": self.box(x)}


cells = SIDE // STRIDE
there, boxes = torch.zeros(640, 1, cells, cells), torch.zeros(640, 3, cells, cells)
for index, found in enumerate(objects):
    for top, left, side in found:
        row, column = (top + side // 2) // STRIDE, (left + side // 2) // STRIDE
        there[index, 0, row, column] = 1
        boxes[index, :, row, column] = torch.tensor([top - row * STRIDE, left - column * STRIDE, side]) / STRIDE

teacher = Detector()
optimizer = torch.optim.Adam(teacher.parameters(), 0.003)
for _ in range(400):
    batch = torch.randint(512, (32,))
    answer = teacher(images[batch])
    places = there[batch]
    loss = nn.functional.binary_cross_entropy(answer["score"], places, weight=1 + 9 * places)
    loss = loss + ((answer["box"] - boxes[batch]).abs() * places).sum() / places.sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
teacher.eval()


def decoded(score: NDArray[np.float32], box: NDArray[np.float32]) -> list[tuple[float, float, float]]:
    """The digits of one image, surest first; a box of which half is covered by a surer one is dropped."""
    kept: list[tuple[float, float, float]] = []
    for cell in np.argsort(-score.ravel(), kind="stable"):
        row, column = divmod(int(cell), cells)
        if score[0, row, column] < 0.5:
            break
        top, left, side = STRIDE * (box[:, row, column] + np.array([row, column, 0]))
        if all(overlap((top, left, side), other) < 0.5 for other in kept):
            kept.append((float(top), float(left), float(side)))
    return kept


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of two squares."""
    high, wide = (max(0.0, min(p + a[2], q + b[2]) - max(p, q)) for p, q in zip(a[:2], b[:2], strict=True))
    return high * wide / (a[2] ** 2 + b[2] ** 2 - high * wide)


def f1(outputs: dict[str, NDArray[np.float32]]) -> float:
    """Of digits found where they are, with an overlap of at least 0.7, over the test scenes."""
    right = found = wanted = 0
    for score, box, true in zip(outputs["score"], outputs["box"], objects[512:], strict=True):
        kept = decoded(score, box)
        right += sum(any(overlap(one, each) >= 0.7 for one in kept) for each in true)
        found, wanted = found + len(kept), wanted + len(true)
    return 2 * right / (found + wanted)


def judged(network: nn.Module) -> float:
    with torch.no_grad():
        return f1({name: value.numpy() for name, value in network.eval()(images[512:]).items()})


student = faqd.prepare(teacher, images[:2], faqd.QuantConfig(weights=2, activations=4))
faqd.calibrate(student, images[:512])
untrained = judged(student)
objective = faqd.DistillationLoss(teacher, student)
print("feature affinity at", ", ".join(objective.feature_layers))
optimizer = torch.optim.Adam(student.parameters(), 3e-4)
student.train()
for _ in range(200):
    optimizer.zero_grad()
    objective(images[torch.randint(512, (16,))]).backward()
    optimizer.step()
print(f"F1: teacher {judged(teacher):.3f}, 2/4 untrained {untrained:.3f}, distilled {judged(student):.3f}")

faqd.export(student, sys.argv[1], images[512:])
engine = faqd.Engine(sys.argv[1])
answers = engine(images[512:].numpy())
assert isinstance(answers, dict)  # as there are two outputs
print(f"{sys.argv[1]}: proved; {engine.runs_on} {f1(answers):.3f}")
