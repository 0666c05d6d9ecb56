"""Two networks as a user would bring them: plain torch, nothing in them knows of quantization.

`--teacher` and `--arch` take them as `foreign_networks.py:mobilenet` and `foreign_networks.py:segmenter`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class InvertedResidual(nn.Module):
    """Expand by 1x1, convolve each channel on its own, project by 1x1 without activation (arXiv 1801.04381)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = nn.Sequential() if expansion == 1 else _conv(inputs, hidden, 1, 1, nn.ReLU6)
        self.depthwise = _conv(hidden, hidden, 3, stride, nn.ReLU6, groups=hidden)
        self.project = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y  # type: ignore[no-any-return]


class MobileNet(nn.Module):
    """MobileNetV2 at about half width, cut to 12 blocks, for 64-pixel images: 16 times smaller at its last map."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = _conv(3, 16, 3, 2, nn.ReLU6)
        self.blocks = nn.Sequential()
        inputs = 16
        for expansion, outputs, depth, stride in (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 48, 3, 1),
            (6, 80, 2, 2),
        ):
            for index in range(depth):
                self.blocks.append(InvertedResidual(inputs, outputs, stride if index == 0 else 1, expansion))
                inputs = outputs
        self.head = _conv(inputs, 320, 1, 1, nn.ReLU6)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(320, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.pool(self.head(self.blocks(self.stem(x))))
        return self.classifier(self.dropout(torch.flatten(features, 1)))  # type: ignore[no-any-return]


class Segmenter(nn.Module):
    """A small U-Net (arXiv 1505.04597) for 64-pixel images: class scores for every second pixel."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.down1 = nn.Sequential(_conv(3, 16, 3, 1, nn.ReLU), _conv(16, 32, 3, 2, nn.ReLU))
        self.down2 = nn.Sequential(_conv(32, 64, 3, 2, nn.ReLU), _conv(64, 64, 3, 1, nn.ReLU))
        self.down3 = nn.Sequential(_conv(64, 96, 3, 2, nn.ReLU), _conv(96, 96, 3, 1, nn.ReLU))
        self.down4 = nn.Sequential(_conv(96, 128, 3, 2, nn.ReLU), _conv(128, 128, 3, 1, nn.ReLU))
        self.up3 = _conv(128 + 96, 64, 3, 1, nn.ReLU)
        self.up2 = _conv(64 + 64, 48, 3, 1, nn.ReLU)
        self.up1 = _conv(48 + 32, 32, 3, 1, nn.ReLU)
        self.scores = nn.Conv2d(32, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        half = self.down1(x)
        quarter = self.down2(half)
        eighth = self.down3(quarter)
        y = self.up3(torch.cat([_doubled(self.down4(eighth)), eighth], 1))
        y = self.up2(torch.cat([_doubled(y), quarter], 1))
        y = self.up1(torch.cat([_doubled(y), half], 1))
        return self.scores(y)  # type: ignore[no-any-return]


def mobilenet() -> nn.Module:
    return MobileNet()


def segmenter() -> nn.Module:
    return Segmenter()


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int, activation: type[nn.Module], groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        activation(),
    )


def _doubled(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")
