"""Random networks of the operators that can be lowered, and many of them side by side in one file.

A network is a seed and a size: the network of size n begins with the units of the network of size n - 1, so that a
failure shrinks by taking units from the end, and `RandomNetwork(seed, size)` is all that its report needs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from faqd.quant import POOLED_8, SIGNED_8, activation_quant, weight_quant
from faqd.quantize import placement
from faqd.quantize.config import QuantConfig
from faqd.quantize.convert import Deployed, collect_output_scales, convert
from faqd.quantize.lowering.fold_batch_norm import Changes
from faqd.quantize.operators.requantize import Flavour
from faqd.quantize.placement import Placement
from faqd.quantize.student import Student
from tests.networks import CHANNELS, CLASSES, calibrated, images, lively, undecided

ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU,
    nn.ReLU,
    nn.ReLU6,
    lambda: nn.Hardtanh(-0.8, 1.1),
    lambda: nn.LeakyReLU(0.1),
    lambda: nn.PReLU(CHANNELS),
    nn.SiLU,
    nn.Hardswish,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.GELU,
    lambda: nn.GELU("tanh"),
    nn.Tanh,
)


def convolution(draw: random.Random) -> nn.Module:
    kernel, dilation = draw.choice([(1, 1), (3, 1), (3, 2)])
    groups = draw.choice([1, 1, 2, CHANNELS])
    padding = dilation * (kernel // 2)
    if draw.random() < 0.15:
        return nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1, bias=draw.random() < 0.5)
    return nn.Conv2d(CHANNELS, CHANNELS, kernel, 1, padding, dilation, groups, draw.random() < 0.5)


class Plain(nn.Module):
    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.conv, self.act = convolution(draw), draw.choice(ACTIVATIONS)()
        self.bn = nn.BatchNorm2d(CHANNELS, affine=draw.random() < 0.8) if draw.random() < 0.7 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))  # type: ignore[no-any-return]


class Branches(nn.Module):
    """Two ways that meet: in a sum, a difference, a product, a concatenation, with or without a layer on either."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.how = draw.choice(["sum", "sum", "scaled", "difference", "gate", "concat", "shuffle"])
        half = CHANNELS // 2 if self.how == "shuffle" else CHANNELS
        self.conv, self.bn = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.short: nn.Module = nn.Conv2d(half, half, 1) if draw.random() < 0.4 else nn.Identity()
        self.merge = nn.Conv2d(2 * CHANNELS, CHANNELS, 1)
        self.gate, self.act = draw.choice([nn.Sigmoid, nn.Hardsigmoid])(), draw.choice(ACTIVATIONS)()

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "shuffle":
            left, right = x.chunk(2, 1)
            x = torch.cat([self.short(left), F.relu(self.bn(self.conv(right)))], 1)
            n, c, h, w = x.shape
            return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        if self.how == "gate":
            return x * self.gate(self.conv(F.adaptive_avg_pool2d(x, 1)))  # type: ignore[no-any-return]
        branch, short = self.bn(self.conv(x)), self.short(x)
        if self.how == "concat":
            return F.relu(self.merge(torch.cat([self.act(branch), short], 1)))
        if self.how == "difference":
            return self.act(short - branch)  # type: ignore[no-any-return]
        return self.act(short + (0.3 * branch if self.how == "scaled" else branch))  # type: ignore[no-any-return]


class PreActivation(nn.Module):
    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.bn, self.act, self.conv = nn.BatchNorm2d(CHANNELS), draw.choice(ACTIVATIONS)(), convolution(draw)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.act(self.bn(x)))  # type: ignore[no-any-return]


class Moves(nn.Module):
    """Pooling, resizing and padding around a layer; sizes come back."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.how = draw.choice(["max", "average", "nearest", "bilinear", "aligned", "pad", "transposed"])
        self.conv, self.strided = nn.Conv2d(CHANNELS, CHANNELS, 3), nn.Conv2d(CHANNELS, CHANNELS, 3, 2, 1)
        self.up = nn.ConvTranspose2d(CHANNELS, CHANNELS, 4, 2, 1)
        self.pool = draw.choice([nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)])

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        if self.how == "max":
            return self.pool(x)  # type: ignore[no-any-return]
        if self.how == "average":
            return F.interpolate(F.avg_pool2d(x, 2), scale_factor=2)
        if self.how == "pad":
            return F.relu(self.conv(F.pad(x, (1, 1, 2, 0))))
        if self.how == "transposed":
            return F.max_pool2d(F.relu(self.up(x)), 2)
        if self.how == "nearest":
            return F.relu(self.strided(F.interpolate(x, scale_factor=2)))
        wide = (2 * size[0], 2 * size[1])
        return F.relu(self.strided(F.interpolate(x, wide, mode="bilinear", align_corners=self.how == "aligned")))


class Rows(nn.Module):
    """Linear layers on the channels of every pixel, and numbers of the network's own."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(CHANNELS, 12), nn.Linear(12, CHANNELS)
        self.act, self.around = draw.choice(ACTIVATIONS[:5])(), draw.random() < 0.5
        self.gain = nn.Parameter(torch.tensor([draw.uniform(-1.5, 1.5) for _ in range(CHANNELS)]).reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.narrow(self.act(self.wide(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return x + self.gain * rows if self.around else self.gain * rows  # type: ignore[no-any-return]


UNITS: tuple[Callable[[random.Random], nn.Module], ...] = (Plain, Branches, Branches, PreActivation, Moves, Rows)


class RandomNetwork(nn.Module):
    """`size` units between a stem and a classifier."""

    def __init__(self, seed: int, size: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        kernel, stride = draw.choice([1, 3, 5]), draw.choice([1, 2])
        self.stem = nn.Conv2d(3, CHANNELS, kernel, stride, kernel // 2)
        self.act, self.last = draw.choice(ACTIVATIONS)(), nn.Linear(CHANNELS, CLASSES)
        self.units = nn.Sequential(*(draw.choice(UNITS)(draw) for _ in range(size)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.units(self.act(self.stem(x))).mean((2, 3)))  # type: ignore[no-any-return]


def random_size(seed: int) -> int:
    return random.Random(f"size {seed}").choice([1, 1, 2, 2, 3])


def random_student(seed: int, size: int) -> Student:
    """Each layer with bits of its own; some batch-norm factors negative, tiny or zero, some branches zero."""
    network = lively(RandomNetwork(seed, size), seed, zero_gamma=0.1)
    for index, module in enumerate(network.modules()):
        if isinstance(module, nn.BatchNorm2d) and module.affine and random.Random(f"{seed} {index}").random() < 0.1:
            module.weight.data.zero_()
    with mock.patch("faqd.quantize.prepare.place", lambda traced, bits: bits_per_layer(traced, bits, seed)):
        return undecided(calibrated(network, QuantConfig(8, 8), seed), images(seed + 1, reach=3.0))


def bits_per_layer(traced: fx.GraphModule, bits: QuantConfig, seed: int) -> Placement:
    placed = placement.place(traced, bits)
    draw = random.Random(f"bits {seed}")
    axis = 0 if draw.random() < 0.7 else None
    weights = {node: weight_quant(draw.randint(1, 8), axis) for node in placed.weights}
    activations = dict(placed.activations)
    for group in [[node] for node in activations] + placed.shared:
        if all(activations[node] not in (SIGNED_8, POOLED_8) or activations[node].high == 127 for node in group):
            grid = activation_quant(draw.choice([1, 2, 3, 4, 5, 6, 7, 8]), "tensorrt")
            activations |= {node: grid for node in group if not activations[node].signed}
    return replace(placed, weights=weights, activations=activations)


def random_deployed(seed: int, size: int, flavour: Flavour) -> Deployed:
    student = random_student(seed, size)
    scales = collect_output_scales(student, [images(seed, 32, reach=2.0)]) if flavour == "onnxruntime" else None
    return convert(student, flavour, scales)


def side_by_side(networks: dict[str, Deployed]) -> Deployed:
    """One network that returns what each of them returns for the same input; their modules have the keys as prefix."""
    root, graph = nn.Module(), fx.Graph()
    x, outputs = graph.placeholder("x"), []
    for name, deployed in networks.items():
        root.add_module(name, deployed.network)
        copied: dict[fx.Node, Any] = {}
        for node in deployed.network.graph.nodes:
            if node.op == "placeholder":
                copied[node] = x
            elif node.op == "output":
                outputs.append(copied[node.args[0]])
            else:
                copied[node] = graph.node_copy(node, copied.__getitem__)
                copied[node].meta.pop("nn_module_stack", None)  # where it was before, which names in a file come from
                if node.op == "call_module":
                    copied[node].target = f"{name}.{node.target}"
    graph.output(tuple(outputs))
    flavour = next(iter(networks.values())).flavour
    return Deployed(fx.GraphModule(root, graph), flavour, Changes(), integers_only=True)
