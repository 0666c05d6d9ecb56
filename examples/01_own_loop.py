"""A student of 2-bit weights in a training loop of one's own: prepare, calibrate, distil, export with proof, run.

    python examples/01_own_loop.py BUNDLE

Half a minute on a CPU. The teacher is trained here with labels, on scikit-learn's handwritten digits; the student never
sees one.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import faqd

torch.manual_seed(0)
digits = load_digits()
order = torch.randperm(len(digits.target))
images = torch.from_numpy(digits.images).float()[order, None] / 16
images = (images * 255).round() / 255  # pixels of 8 bits, as a camera gives them
labels = torch.from_numpy(digits.target)[order]
train, test = slice(0, 1400), slice(1400, None)


def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


teacher = nn.Sequential(
    block(1, 16, 1), block(16, 32, 2), block(32, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
)
optimizer = torch.optim.Adam(teacher.parameters(), 0.01)
for _ in range(600):
    batch = torch.randint(1400, (64,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(teacher(images[batch]), labels[batch]).backward()
    optimizer.step()
teacher.eval()


def accuracy(scores: torch.Tensor) -> float:
    return float((scores.argmax(1) == labels[test]).float().mean())


# What is faqd's begins here.
student = faqd.prepare(teacher, images[:2], faqd.QuantConfig(weights=2, activations=4))
faqd.calibrate(student, images[train])
print(student)
with torch.no_grad():
    untrained = accuracy(student.eval()(images[test]))

loss = faqd.DistillationLoss(teacher, student)
print("feature affinity at", ", ".join(loss.feature_layers))
optimizer = torch.optim.Adam(student.parameters(), 1e-3)
student.train()
for step in range(300):
    optimizer.zero_grad()
    loss(images[torch.randint(1400, (64,))]).backward()
    optimizer.step()
    if step % 50 == 0:
        print(step, {name: round(value, 5) for name, value in loss.terms.items()})

with torch.no_grad():
    print(f"teacher {accuracy(teacher(images[test])):.3f}, 2/4 untrained {untrained:.3f}, ", end="")
    print(f"distilled {accuracy(student.eval()(images[test])):.3f}")

bundle = faqd.export(student, sys.argv[1], images[test])
engine = faqd.Engine(sys.argv[1])
print(f"{sys.argv[1]}: proved; {engine.runs_on} {accuracy(torch.from_numpy(engine(images[test].numpy()))):.3f}")
