"""Small networks of the kinds users bring, with weights and batch-norm statistics that leave no channel idle."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from faqd.deploy.onnx_model.session import OnnxSession
from faqd.deploy.verify.outputs import compare_outputs, outputs_of
from faqd.deploy.verify.torch_values import float_outputs_in_torch
from faqd.quantize import nodes
from faqd.quantize.calibrate import calibrate
from faqd.quantize.capture.capture import capture
from faqd.quantize.config import QuantConfig
from faqd.quantize.operators.layer import COMPUTE
from faqd.quantize.operators.norm import NORM
from faqd.quantize.prepare import insert_quantizers
from faqd.quantize.student import Student

CLASSES = 10
CHANNELS = 8
PIXELS = 8
SHAPE = (3, PIXELS, PIXELS)


def conv(inputs: int = CHANNELS, outputs: int = CHANNELS, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class Vgg(nn.Module):
    """Convolutions in a row with max pooling between, bias and no batch norm in the second, a hidden linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv(3),
            nn.BatchNorm2d(CHANNELS),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(CHANNELS, 12, 3),
            nn.ReLU(),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Dropout(), nn.Linear(48, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """torchvision's basic block twice, with and without downsample: one shared ReLU and `out += identity`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = conv(3), nn.BatchNorm2d(CHANNELS)
        self.block1, self.block2 = Block(CHANNELS, CHANNELS, 1), Block(CHANNELS, 12, 2)
        self.relu = nn.ReLU(inplace=True)
        self.pool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(self.relu(self.bn0(self.conv0(x)))))
        return self.fc(torch.flatten(self.pool(x), 1))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


class Functional(nn.Module):
    """The same ideas as functions and methods: F.relu, F.max_pool2d, x.mean and x.view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3), nn.BatchNorm2d(CHANNELS)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=2)
        self.conv3 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=2, dilation=2)
        self.fc1, self.fc2 = nn.Linear(CHANNELS, 12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.add(self.conv3(x), x).relu_()
        x = F.relu(self.fc1(F.dropout(x.mean((2, 3)), training=self.training)))
        return self.fc2(x.view(x.size(0), -1))  # type: ignore[no-any-return]


class PreActivation(nn.Module):
    """Batch norm in front of the convolutions: behind a sum, where nothing can take it in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = conv(3)
        self.bn1, self.conv1 = nn.BatchNorm2d(CHANNELS), conv()
        self.bn2, self.conv2 = nn.BatchNorm2d(CHANNELS), conv()
        self.bn3, self.fc = nn.BatchNorm2d(CHANNELS), nn.Linear(CHANNELS, CLASSES)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv0(x)
        x = x + self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))
        return self.fc(self.relu(self.bn3(x)).mean([2, 3]))  # type: ignore[no-any-return]


class Dense(nn.Module):
    """Concatenation of feature maps, average pooling with overlap and padding, a pooled output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, 4, 3, padding="same")
        self.bn, self.pool = nn.BatchNorm2d(4), nn.AvgPool2d(3, 2, 1)
        self.conv3, self.fc = conv(12, 12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = torch.cat([x, F.relu(self.bn(self.conv2(x)))], dim=1)
        x = F.relu(self.conv3(self.pool(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))  # type: ignore[no-any-return]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg": Vgg,
    "residual": Residual,
    "functional": Functional,
    "pre-activation": PreActivation,
    "dense": Dense,
}


def images(seed: int, count: int = 64, shape: tuple[int, ...] = SHAPE, reach: float = 1.0) -> Tensor:
    return reach * torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def lively(network: nn.Module, seed: int, zero_gamma: float = 0.0) -> nn.Module:
    """Random weights, biases and batch norm: factors of both signs, a share of them tiny or exactly zero."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    for module in network.modules():
        if isinstance(module, COMPUTE):
            fan_in = module.weight[0].numel()
            module.weight.data = torch.randn(module.weight.shape, generator=generator) * (2 / fan_in) ** 0.5
            if module.bias is not None:
                module.bias.data = uniform(module.bias, -0.5, 0.5)
        elif isinstance(module, nn.PReLU):
            module.weight.data = uniform(module.weight, -0.5, 0.8)
        elif isinstance(module, NORM) and module.affine:
            sign = torch.where(uniform(module.weight, 0, 1) < 0.3, -1.0, 1.0)
            module.weight.data = sign * uniform(module.weight, 0.5, 1.5)
            draw = uniform(module.weight, 0, 1)
            module.weight.data[draw < zero_gamma] = 0.0
            module.weight.data[(draw >= zero_gamma) & (draw < 2 * zero_gamma)] *= 1e-6
            module.bias.data = uniform(module.bias, -0.3, 0.3)
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(uniform(module.running_mean, -0.3, 0.3))
            module.running_var.copy_(uniform(module.running_var, 0.5, 2.0))
    return network.eval()


@torch.no_grad()
def undecided(student: Student, x: Tensor) -> Student:
    """The student with equal mean scores on `x` for every class, so that no one class is always predicted."""
    called = (nodes.module_of(student.network, node) for node in student.network.graph.nodes)
    last = [module for module in called if isinstance(module, nn.Linear)][-1]
    last.bias.copy_(last.bias - student.network(x).mean(0))
    return student


def captured(network: nn.Module, shape: tuple[int, ...] = SHAPE) -> fx.GraphModule:
    return capture(network, torch.zeros(2, *shape))


def calibrated(network: nn.Module, bits: QuantConfig, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Student:
    """The prepared student of a lively network, its scales chosen so that both clips are reached."""
    student = insert_quantizers(captured(network, shape), bits, torch.zeros(2, *shape))
    student.network.eval()
    calibrate(student, [images(seed, 64, shape)], "mse")
    return student


def float_file_db(model: bytes, student: Student, x: Tensor) -> dict[str, float]:
    """How far a float student's file is from its own modules in torch, per output; infinitely where it is equal."""
    wanted = float_outputs_in_torch(student, x)
    compared = compare_outputs(outputs_of(OnnxSession(model), x.numpy()[: max(map(len, wanted.values()))]), wanted)
    return {name: float("inf") if snr is None else snr for name, snr in compared["snr_db"].items()}
