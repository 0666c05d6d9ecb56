"""Small networks of well-known families, written as their users write them: functions, methods, shared modules."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks import CLASSES


def unit(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        wide = 2 * inputs
        self.use_shortcut = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *unit(inputs, wide, 1),
            activation(),
            *unit(wide, wide, 3, stride, groups=wide),
            activation(),
            *unit(wide, outputs, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_shortcut else self.conv(x)  # type: ignore[no-any-return]


class MobileNetV2(nn.Module):
    """Depthwise convolutions, ReLU6, sums of two maps that can be negative."""

    def __init__(self, activation: Callable[[], nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *unit(3, 8, 3, 2),
            activation(),
            InvertedResidual(8, 8, 1, activation),
            InvertedResidual(8, 12, 2, activation),
            InvertedResidual(12, 12, 1, activation),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(12, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))  # type: ignore[no-any-return]


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, gate: nn.Module) -> None:
        super().__init__()
        self.reduce, self.expand, self.gate = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))  # type: ignore[no-any-return]


class SeResNet(nn.Module):
    """Squeeze-and-excite in residual blocks, with two kinds of gate, and a hidden hard swish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*unit(3, 8), nn.ReLU())
        self.conv1, self.se1 = nn.Sequential(*unit(8, 8)), SqueezeExcite(8, nn.Sigmoid())
        self.conv2, self.se2 = nn.Sequential(*unit(8, 8)), SqueezeExcite(8, nn.Hardsigmoid())
        self.head = nn.Sequential(nn.Linear(8, 12), nn.Hardswish(), nn.Linear(12, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.se1(self.conv1(x)) + x)
        x = F.relu(x + self.se2(F.relu(self.conv2(x))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class ShuffleUnit(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(*unit(half, half, 3, groups=half), *unit(half, half, 1), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        out = torch.cat((x1, self.branch(x2)), dim=1)
        batch, channels, height, width = out.size()
        out = out.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return out.view(batch, -1, height, width)


class ShuffleNet(nn.Module):
    """Channels split, one half passed on untouched, both joined and shuffled: one scale through a whole stage."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*unit(3, 8), nn.ReLU(inplace=True))
        self.stage = nn.Sequential(ShuffleUnit(8), ShuffleUnit(8), ShuffleUnit(8))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.max_pool2d(self.stage(self.stem(x)), 2).mean([2, 3]))  # type: ignore[no-any-return]


class DenseNet(nn.Module):
    """Batch norm and ReLU in front of each convolution, concatenation, a transition with average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(12), nn.Conv2d(12, 4, 3, padding=1)
        self.bn3, self.conv3 = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1)
        self.bn4, self.fc = nn.BatchNorm2d(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.conv0(x)]
        features.append(self.conv1(F.relu(self.bn1(features[0]))))
        features.append(self.conv2(F.relu(self.bn2(torch.cat(features, 1)))))
        x = F.avg_pool2d(self.conv3(F.relu(self.bn3(torch.cat(features, 1)))), 2)
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.bn4(x)), (1, 1)).flatten(1))  # type: ignore[no-any-return]


class UNet(nn.Module):
    """Segmentation: an encoder, a decoder with a transposed convolution and a bilinear resize, two skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Sequential(*unit(3, 8), nn.ReLU()), nn.Sequential(*unit(8, 12), nn.ReLU())
        self.bottom = nn.Sequential(*unit(12, 12), nn.LeakyReLU(0.1))
        self.up2, self.up1 = nn.ConvTranspose2d(12, 8, 2, 2), nn.Upsample(scale_factor=2, mode="bilinear")
        self.merge2 = nn.Sequential(*unit(20, 8), nn.ReLU())
        self.merge1 = nn.Sequential(*unit(16, 8), nn.ReLU())
        self.classes = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.bottom(F.max_pool2d(two, 2))
        x = self.merge2(torch.cat([self.up2(x), two], 1))
        x = self.merge1(torch.cat([self.up1(x), one], 1))
        return {"out": self.classes(x)}


class Detector(nn.Module):
    """A feature pyramid whose levels share one head, as detectors have it before decoding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*unit(3, 8), nn.SiLU())
        self.deep = nn.Sequential(*unit(8, 12, 3, 2), nn.SiLU())
        self.lateral1, self.lateral2 = nn.Conv2d(8, 8, 1), nn.Conv2d(12, 8, 1)
        self.tower = nn.Sequential(*unit(8, 8), nn.ReLU())
        self.scores, self.boxes = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        one = self.stem(x)
        top = self.lateral2(self.deep(one))
        levels = [self.lateral1(one) + F.interpolate(top, scale_factor=2.0, mode="nearest"), top]
        towers = [self.tower(level) for level in levels]
        return {"scores": [self.scores(x) for x in towers], "boxes": [self.boxes(x) for x in towers]}


def handed_on(x: Tensor, training: bool) -> Tensor:
    """Kept whole by fx.wrap, as torchvision keeps its stochastic depth."""
    return x if not training else x * (torch.rand(len(x), 1, 1, 1) > 0.5)


torch.fx.wrap("handed_on")


class OwnTensors(nn.Module):
    """Parameters and buffers read in forward: the preprocessing, a convolution as function, a blur, a learned gain."""

    mean: Tensor
    deviation: Tensor
    blur: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).reshape(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.6, 0.5, 0.7]).reshape(3, 1, 1))
        self.register_buffer("blur", torch.ones(8, 1, 3, 3) / 9)
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(0.3 * torch.randn(8, 3, 3, 3, generator=generator))
        self.bias = nn.Parameter(0.1 * torch.randn(8, generator=generator))
        self.gain, self.shift = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.full((8, 1, 1), 0.1))
        self.classes = nn.Parameter(torch.randn(CLASSES, 8, generator=generator))
        self.conv, self.prelu, self.mix = nn.Conv2d(8, 8, 3, padding=1), nn.PReLU(8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.deviation
        x = F.relu(F.conv2d(x, self.weight, self.bias, padding=1))
        x = F.conv2d(x, self.blur, stride=2, padding=1, groups=8)
        x = x + handed_on(self.gain * self.prelu(self.conv(x)) + self.shift, self.training)
        pyramid = F.adaptive_avg_pool2d(F.adaptive_max_pool2d(x, 2), (x.shape[2], x.shape[3]))
        x = F.relu(self.mix(pyramid)) * F.adaptive_max_pool2d(x, 1)
        return F.linear(x.float().mean((2, 3)), self.classes)


class Tokens(nn.Module):
    """Maps as rows of pixels: sizes computed in forward, linear layers on channels, convolutions along one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.wide, self.narrow = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 12), nn.Linear(12, 8)
        self.along, self.pool = nn.Conv1d(8, 8, 3, padding=1), nn.AdaptiveAvgPool1d(1)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.patches(x))
        n, c, h, w = x.shape
        tokens = self.narrow(F.gelu(self.wide(x.flatten(2).transpose(1, 2)))) + x.view(n, c, h * w).transpose(1, 2)
        rows = F.relu(self.along(tokens.transpose(1, 2)))
        return {"tokens": self.last(tokens.mean(1)), "rows": self.last(self.pool(rows).squeeze(-1))}


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "mobilenet-v2": MobileNetV2,
    "mobilenet with hardswish": lambda: MobileNetV2(nn.Hardswish),
    "se-resnet": SeResNet,
    "shufflenet": ShuffleNet,
    "densenet": DenseNet,
    "unet": UNet,
    "detector": Detector,
    "own tensors": OwnTensors,
    "tokens": Tokens,
}
