"""The zoo: residual networks for 32-pixel, 64-pixel and 224-pixel images.

Plain torch modules, nothing in them knows of quantization: a user's own network is treated the same way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from faqd.errors import UserError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, activation after the sum (arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Sequential()
            if stride == 1 and inputs == outputs
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """A stem, stages of basic blocks that halve the resolution, an average over pixels, a linear classifier."""

    def __init__(self, stem: nn.Sequential, widths: list[int], depths: list[int], classes: int) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential()
        inputs = widths[0]
        for width, depth in zip(widths, depths, strict=True):
            strides = [1 if width == widths[0] else 2] + [1] * (depth - 1)
            blocks = []
            for stride in strides:
                blocks.append(BasicBlock(inputs, width, stride))
                inputs = width
            self.stages.append(nn.Sequential(*blocks))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.stages(self.stem(x))), 1))  # type: ignore[no-any-return]


def cifar_resnet(depth: int, channels: int, classes: int) -> ResNet:
    """ResNet-`depth` with 16, 32 and 64 channels, as used on CIFAR; depth = 6 n + 2."""
    return ResNet(_stem(channels, 16, 3, 1), [16, 32, 64], [(depth - 2) // 6] * 3, classes)


def imagenet_resnet(depths: list[int], channels: int, classes: int, pixels: int) -> ResNet:
    """ResNet-18 or 34 with 64 to 512 channels; the stem halves the resolution twice only for large images."""
    stem = _stem(channels, 64, 7, 2) if pixels > 64 else _stem(channels, 64, 3, 1)
    if pixels > 64:
        stem.append(nn.MaxPool2d(3, 2, 1))
    return ResNet(stem, [64, 128, 256, 512], depths, classes)


def reference_resnet(depth: int, channels: int, classes: int) -> ResNet:
    """The student of the released code of arXiv 2302.10899: a stem of one convolution, without norm and activation,
    and a norm and activation more in front of the pooling."""
    stem = nn.Sequential(nn.Conv2d(channels, 16, 3, 1, 1, bias=False))
    network = ResNet(stem, [16, 32, 64], [(depth - 2) // 6] * 3, classes)
    network.stages.append(nn.Sequential(nn.BatchNorm2d(64), nn.ReLU()))
    return network


def _stem(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


Builder = Callable[[int, int, int], nn.Module]
"""(input channels, classes, pixels per side) -> network."""


def _cifar(depth: int) -> Builder:
    return lambda channels, classes, pixels: cifar_resnet(depth, channels, classes)


def _imagenet(depths: list[int]) -> Builder:
    return lambda channels, classes, pixels: imagenet_resnet(depths, channels, classes, pixels)


ARCHITECTURES: dict[str, Builder] = {
    **{f"resnet{depth}": _cifar(depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    "resnet20-reference": lambda channels, classes, pixels: reference_resnet(20, channels, classes),
    "resnet18": _imagenet([2, 2, 2, 2]),
    "resnet34": _imagenet([3, 4, 6, 3]),
}


def build_architecture(name: str, channels: int, classes: int, pixels: int) -> nn.Module:
    check_architecture(name)
    return ARCHITECTURES[name](channels, classes, pixels)


def check_architecture(name: str) -> None:
    """UserError for a name that is not in the zoo."""
    if name not in ARCHITECTURES:
        raise UserError(
            f"--arch {name}: unknown; choose {', '.join(ARCHITECTURES)}, or give your own as FILE.py:callable, "
            "module:callable, FILE.pt2 or FILE.onnx."
        )
