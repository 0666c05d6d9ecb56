"""What runs on other CPUs: segments of three students, and one layer of which it is known where it comes out wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from faqd.deploy.export.torch_to_onnx import onnx_from_deployed
from faqd.deploy.reference.values import Value
from faqd.deploy.verify.numbers import grids
from faqd.deploy.verify.segments import Segment, Trace
from faqd.deploy.verify.test_vectors import UNDRIVEN, Drive
from faqd.deploy.verify.torch_numbers import torch_constants
from faqd.quantize.config import QuantConfig
from faqd.quantize.convert import collect_output_scales, convert
from tests.fixtures.networks import CLASSES, calibrated, conv, images, lively
from tests.fixtures.qdq_network import SHAPE, Graph

PROBES = 8
WIDE = 64
"""Channels from which onnxruntime has kernels for symmetric weights on ARM; on x86 four are enough."""
SATURATING = "saturating layer"
SIGNED = "signed activations"


class Rectified(nn.Module):
    """ReLU throughout: a wide residual block, a depthwise layer, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = conv(3, 16), nn.BatchNorm2d(16)
        self.down, self.bn1 = conv(16, WIDE, stride=2), nn.BatchNorm2d(WIDE)
        self.conv, self.bn2 = conv(WIDE, WIDE), nn.BatchNorm2d(WIDE)
        self.depthwise, self.pointwise = nn.Conv2d(WIDE, WIDE, 3, padding=1, groups=WIDE), conv(WIDE, 24, 1)
        self.hidden, self.last = nn.Linear(24, 32), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.down(F.relu(self.bn0(self.stem(x))))))
        x = F.relu(x + self.bn2(self.conv(x)))
        x = F.relu(self.pointwise(F.relu(self.depthwise(x)))).mean((2, 3))
        return self.last(F.relu(self.hidden(x)))  # type: ignore[no-any-return]


class Signed(nn.Module):
    """Activations below zero: linear bottlenecks around a depthwise layer, a residual, a grouped layer, linear layers.

    The first layer multiplies floats, for a curve reads it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = conv(3, 16), nn.BatchNorm2d(16)
        self.expand, self.bn1 = conv(16, WIDE, 1), nn.BatchNorm2d(WIDE)
        self.depthwise = nn.Conv2d(WIDE, WIDE, 3, padding=1, groups=WIDE)
        self.project, self.bn2 = conv(WIDE, 16, 1), nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 32, 3, 2, 1, groups=2)
        self.hidden, self.last = nn.Linear(32, 32), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.bn0(self.stem(x)))
        x = x + self.bn2(self.project(self.depthwise(self.bn1(self.expand(x)))))
        x = self.grouped(x).mean((2, 3))
        return self.last(F.hardswish(self.hidden(x)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Case:
    """A segment of a student with what it is fed, and the values of all its tensors in the reference."""

    student: str
    segment: Segment
    feeds: dict[str, NDArray[Any]]
    values: dict[str, Value]


def write_cases(found: list[Case], folder: Path) -> None:
    """What `runner` reads."""
    for index, case in enumerate(found):
        (folder / f"{index:03}.onnx").write_bytes(case.segment.model.SerializeToString())
        np.savez(folder / f"{index:03}.npz", **case.feeds)  # type: ignore[arg-type]


def student_trace(network: nn.Module, bits: QuantConfig) -> Trace:
    """Of the file for onnxruntime of a student with lively weights; half of the probes drive every layer with codes of
    its whole grid."""
    student = calibrated(lively(network, 1), bits)
    deployed = convert(student, "onnxruntime", collect_output_scales(student, [images(0)]))
    drive = Drive(grids(torch_constants(deployed)), PROBES // 2)
    return Trace(onnx_from_deployed(deployed, images(1, 2), {}), images(2, PROBES, reach=3.0).numpy(), drive)


def saturating_layer() -> onnx.ModelProto:
    """A convolution whose weights are 127 throughout: with codes of 255, two adjacent products exceed an int16."""
    graph = Graph()

    def rounded(x: str, scale: float, name: str) -> str:
        parameters = [graph.constant(f"{name}.scale", np.float32(scale)), graph.constant(f"{name}.zero", np.uint8(0))]
        code = graph.add("QuantizeLinear", [x, *parameters], f"{name}.code")
        return graph.add("DequantizeLinear", [code, *parameters], f"{name}.value")

    outputs, inputs, kernel = 16, 3, 3
    weights = [
        graph.constant("conv.codes", np.full((outputs, inputs, kernel, kernel), 127, np.int8)),
        graph.constant("conv.scale", np.float32(1)),
        graph.constant("conv.zero", np.int8(0)),
    ]
    x = [rounded("images", 1.0, "input"), graph.add("DequantizeLinear", weights, "conv.weight")]
    x = [rounded(graph.add("Conv", x, "conv"), inputs * kernel**2 * 127.0, "out")]
    return graph.model(graph.add("Flatten", [graph.add("GlobalAveragePool", x, "pool")], "logits"))


def codes() -> NDArray[np.float32]:
    """Images whose pixels are the codes of `saturating_layer`: all 255, then any."""
    drawn = np.random.default_rng(0).integers(0, 256, (PROBES, *SHAPE)).astype(np.float32)
    drawn[: PROBES // 2] = 255
    return drawn


TRACES: dict[str, Callable[[], Trace]] = {
    "ReLU": lambda: student_trace(Rectified(), QuantConfig()),
    SIGNED: lambda: student_trace(Signed(), QuantConfig()),
    "--target onnxruntime": lambda: student_trace(Rectified(), QuantConfig(target="onnxruntime")),
    SATURATING: lambda: Trace(saturating_layer(), codes(), UNDRIVEN),
}


def cases(students: Iterable[str] = TRACES) -> list[Case]:
    """The segments of each student, in order."""
    return [Case(student, *step) for student in students for step in TRACES[student]()]
