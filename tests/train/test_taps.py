"""Where feature maps are compared when nobody says it: in the neck, and never at what tells nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from faqd.quantize.capture.capture import capture
from faqd.quantize.config import QuantConfig
from faqd.quantize.prepare import insert_quantizers
from faqd.train.losses.distillation import AffinityForm
from faqd.train.losses.taps import tap_costs, tap_names, tap_pairs

EXAMPLE = torch.zeros(2, 3, 16, 16)


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ReLU())


class Detector(nn.Module):
    """Two sizes; at each, boxes and objectness from one tower, classes from another, as in YOLOX."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv(3, 8, 2), conv(8, 16, 2)
        self.lateral = nn.Conv2d(16, 8, 1)
        self.neck = nn.ModuleList([conv(8, 8), conv(16, 8)])
        self.boxes = nn.ModuleList(conv(8, 8) for _ in range(2))
        self.classes = nn.ModuleList(conv(8, 8) for _ in range(2))
        self.box, self.objectness, self.kind = (
            nn.ModuleList(nn.Conv2d(8, channels, 1) for _ in range(2)) for channels in (4, 1, 5)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.stem(x)
        coarse = self.down(fine)
        fine = fine + nn.functional.interpolate(self.lateral(coarse), scale_factor=2)
        found = []
        for i, x in enumerate((fine, coarse)):
            x = self.neck[i](x)
            tower = self.boxes[i](x)
            scores = self.objectness[i](tower).sigmoid(), self.kind[i](self.classes[i](x)).sigmoid()
            found.append(torch.cat((self.box[i](tower), *scores), 1))
        return found


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(8, 8), conv(8, 16, 2), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.c(self.b(self.a(x))).mean((2, 3)))
        return scores


class Segmenter(nn.Module):
    """A map behind an activation that only the output reads, and a thin one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.thin, self.b = conv(3, 16, 2), conv(16, 2, 2), conv(2, 8)
        self.up, self.end = nn.ConvTranspose2d(8, 12, 2, 2), nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.thin(self.a(x)))
        scores: Tensor = self.end(self.up(x).relu()).relu()
        return scores


class Gated(nn.Module):
    """A gate of as many channels as the map it opens."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.end = conv(3, 8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        scores: Tensor = self.end(self.gate(x).sigmoid() * x).mean((2, 3))
        return scores


@pytest.mark.parametrize(
    ("network", "wanted"),
    [
        (Detector, ["neck.0.1", "neck.1.1"]),
        (Classifier, ["b.1", "c.1"]),
        (Segmenter, ["b.1", "relu"]),
        (Gated, ["a.1"]),
    ],
)
def test_taps_by_default(network: Callable[[], nn.Module], wanted: list[str]) -> None:
    traced = capture(network().eval(), EXAMPLE)
    student = insert_quantizers(traced, QuantConfig(8, 8), EXAMPLE)
    assert tap_names(traced, student, tap_pairs(traced, student, None)) == wanted


def test_costs_are_those_of_the_form() -> None:
    traced = capture(Classifier().eval(), EXAMPLE)
    student = insert_quantizers(traced, QuantConfig(8, 8), EXAMPLE)
    pairs = tap_pairs(traced, student, None)
    forms: list[AffinityForm] = ["l2", "l1", "fast"]
    exact, every, fast = (tap_costs(student, pairs, form, 15) for form in forms)
    # 5 N C^2 with N = 256 and C = 8; 4 N^2 C; 8 k N C.
    assert exact[0] == "8 x 16 x 16, 0.0819 M multiplications an image"
    assert every[0] == "8 x 16 x 16, 2.1 M multiplications an image"
    assert fast[0] == "8 x 16 x 16, 0.246 M multiplications an image"
