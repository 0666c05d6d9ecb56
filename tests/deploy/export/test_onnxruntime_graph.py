"""What onnxruntime's optimizer makes of the file for it: integers from the rounded input to the classifier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from faqd.deploy.bundle_facts import deployed_size
from faqd.deploy.export.torch_to_onnx import onnx_from_deployed
from faqd.deploy.onnx_model.integer_sums import integer_sums
from faqd.deploy.verify.layers import verify_file
from faqd.deploy.verify.segments import segments
from faqd.deploy.verify.torch_values import as_trained, torch_codes, torch_digests
from faqd.quantize.config import QuantConfig
from faqd.quantize.convert import Deployed, collect_output_scales, convert
from faqd.quantize.student import Student
from faqd.train.networks.zoo import build_architecture
from tests.fixtures.networks import calibrated, images, lively

SHAPE = (3, 16, 16)
CHANNELS = 16
INTEGER = {"QLinearConv", "QLinearAdd", "QLinearConcat", "QLinearGlobalAveragePool", "QGemm", "NhwcMaxPool", "Flatten"}
AT_THE_ENDS = {"Unsqueeze", "Pad", "Reshape", "QuantizeLinear", "DequantizeLinear", "Transpose"}
LIMITS = {"Clip"}


class Moved(nn.Module):
    """A convolution and a sum read codes behind an operator that only moves them."""

    def __init__(self, kind: str, inputs: int = 3, first: int = CHANNELS, kernel: int = 3) -> None:
        super().__init__()
        self.kind = kind
        inner = 2 * first if kind == "concat" else first
        self.conv1 = nn.Conv2d(inputs, first, kernel, padding=kernel // 2)
        self.side = nn.Conv2d(inputs, first, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1)
        self.average, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(inner, 10)

    def moved(self, x: Tensor, image: Tensor) -> Tensor:
        if self.kind == "pool":
            return F.max_pool2d(x, 3, 2, 1)
        if self.kind == "concat":
            return torch.cat([x, self.side(image).relu()], 1)
        return F.interpolate(x, scale_factor=2) if self.kind == "resize" else x

    def forward(self, x: Tensor) -> Tensor:
        moved = self.moved(self.conv1(x).relu(), x)
        result: Tensor = self.fc(self.average((self.conv2(moved) + moved).relu()).flatten(1))
        return result


def lowered(student: Student, shape: tuple[int, ...] = SHAPE) -> tuple[Deployed, onnx.ModelProto]:
    deployed = convert(student, "onnxruntime", collect_output_scales(student, [images(2, 16, shape)]))
    return deployed, onnx_from_deployed(deployed, images(1, 2, shape), {})


def optimised(model: onnx.ModelProto, folder: Path) -> list[str]:
    """The operators that onnxruntime runs, in order."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]


def first_weights(model: onnx.ModelProto) -> np.ndarray:
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    layer = next(node for node in model.graph.node if node.op_type == "Conv")
    return constants[makers[layer.input[1]].input[0]]


@pytest.mark.parametrize(("bits", "limits"), [(QuantConfig(4, 4), 8), (QuantConfig(8, 8, "onnxruntime"), 1)])
def test_a_residual_network_runs_in_integers(bits: QuantConfig, limits: int, tmp_path: Path) -> None:
    student = calibrated(lively(build_architecture("resnet8", 3, 10, 32), 1), bits, shape=(3, 32, 32))
    _, model = lowered(student, (3, 32, 32))
    found = Counter(optimised(model, tmp_path))
    assert found["QLinearConv"] == 9 and found["QLinearAdd"] == 3 and found["QGemm"] == 1
    assert set(found) <= INTEGER | AT_THE_ENDS | LIMITS
    # The input is quantized; nothing is taken back to float before the classifier, which may give floats itself.
    assert found["QuantizeLinear"] == 1 and found["DequantizeLinear"] <= 1 and found["Transpose"] <= 2
    # The zeros among the image's channels are bytes, not floats.
    first = ["QuantizeLinear", "Pad"] if bits.target == "onnxruntime" else ["QuantizeLinear", "Unsqueeze", "Pad"]
    assert optimised(model, tmp_path)[: len(first)] == first
    # One for each rounding to a grid below 0..255: 7 behind a ReLU, and the average's, whose grid is 0..127.
    assert found["Clip"] == limits


@pytest.mark.parametrize(
    ("kind", "operator"), [("pool", "NhwcMaxPool"), ("concat", "QLinearConcat"), ("resize", "Resize")]
)
def test_codes_are_moved_as_integers_for_every_reader(kind: str, operator: str, tmp_path: Path) -> None:
    student = calibrated(lively(Moved(kind), 1), QuantConfig(4, 4), shape=SHAPE)
    deployed, model = lowered(student)
    found = optimised(model, tmp_path)
    assert found.count(operator) == 1 and found.count("QLinearAdd") == 1
    assert set(found) <= INTEGER | AT_THE_ENDS | LIMITS | {operator}
    assert found.count("QuantizeLinear") == 1 and found.count("Transpose") <= 2
    # The rounding behind the operator gives what came in: it has no limits of its own.
    assert found.count("Clip") == (4 if kind == "concat" else 3)
    x = images(5, 16, SHAPE, reach=3.0)
    assert verify_file(model, x.numpy(), torch_digests(deployed, x), [False, True])["failures"] == []


MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "method": lambda x: x.mean((2, 3)),
    "function": lambda x: torch.mean(x, dim=[-2, -1]),
    "kept": lambda x: x.mean([2, 3], keepdim=True).flatten(1),
    "pooled": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
}


@pytest.mark.parametrize("kind", MEANS)
def test_every_way_to_average_all_pixels_runs_in_integers(kind: str, tmp_path: Path) -> None:
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, CHANNELS, 3), nn.Linear(CHANNELS, 10)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.fc(MEANS[kind](self.conv(x).relu()))
            return result

    deployed, model = lowered(calibrated(lively(Averaged(), 1), QuantConfig(8, 8), shape=SHAPE))
    found = optimised(model, tmp_path)
    assert found.count("QLinearGlobalAveragePool") == 1 and set(found) <= INTEGER | AT_THE_ENDS | LIMITS
    x = images(5, 16, SHAPE, reach=3.0)
    assert verify_file(model, x.numpy(), torch_digests(deployed, x), [False, True])["failures"] == []


def test_what_was_trained_is_compared_without_spare_channels() -> None:
    student = calibrated(lively(Moved("pool"), 1), QuantConfig(8, 8, "onnxruntime"), shape=SHAPE)
    deployed, _ = lowered(student)
    equal = as_trained(student, deployed, images(3, 16, SHAPE))["equal_codes_per_layer"]
    assert set(equal) == set(student.quantizers()) and equal["x"] == 1
    # Behind the sum, whose branch this flavour rounds on its own, codes differ.
    assert min(equal.values()) > 0.5


@pytest.mark.parametrize(
    ("inputs", "outputs", "opposed", "kernel", "stored", "trained"),
    [
        (3, 16, True, 3, 4, slice(3)),
        (4, 16, True, 1, 4, slice(4)),
        (1, 16, False, 3, 4, slice(0, 1)),
        (3, 16, False, 3, 8, slice(0, 6, 2)),
        (4, 16, False, 3, 8, slice(0, 8, 2)),
        (3, 12, False, 3, 8, slice(0, 6, 2)),
        (3, 16, False, 5, 3, slice(3)),
        (4, 16, False, 7, 4, slice(4)),
    ],
    ids=str,
)
def test_channels_of_zeros_among_those_of_an_image(
    inputs: int,
    outputs: int,
    opposed: bool,
    kernel: int,
    stored: int,
    trained: slice,
) -> None:
    """A fourth at the end; one behind each where neighbours of one sign could saturate. Large kernels get coarser
    weights instead."""
    shape = (inputs, *SHAPE[1:])
    network = lively(Moved("pool", inputs, outputs, kernel), 1)
    if opposed:
        for name in ("conv1.weight", "side.weight"):
            signs = torch.tensor([1.0, -1.0] * 2)[:inputs].reshape(-1, 1, 1)
            network.get_parameter(name).data = network.get_parameter(name).data.abs() * signs
    student = calibrated(network, QuantConfig(4, 4), shape=shape)
    deployed, model = lowered(student, shape)
    assert set(deployed.changes.coarser) == (set() if kernel <= 3 else {"conv1"})
    weights = first_weights(model)
    others = np.delete(np.arange(stored), trained)
    assert weights.shape[1] == stored and not weights[:, others].any() and weights[:, trained].all((1, 2, 3)).any()
    assert not any(found.saturates for found in integer_sums(model))
    pixels = np.random.default_rng(0).random((2, *shape))
    placed = next(iter(segments(model))).put_in_place(pixels)
    assert placed.shape == (2, stored, *shape[1:]) and np.array_equal(placed[:, trained], pixels)
    assert not any(node.op_type == "Identity" for node in model.graph.node)
    assert deployed_size(student, deployed) == deployed_size(student, convert(student, "tensorrt"))
    assert model.graph.input[0].type.tensor_type.shape.dim[1].dim_value == inputs
    x = images(5, 8, shape, reach=3.0)
    assert verify_file(model, x.numpy(), torch_digests(deployed, x), [False, True])["failures"] == []


class Unrounded(nn.Module):
    """Two convolutions of which something reads the unrounded output, and a head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.one, self.two = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.last = nn.Conv2d(2 * CHANNELS if kind == "joined" else CHANNELS, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x).relu()
        z = self.two(y)
        result: Tensor = self.last(UNROUNDED[self.kind](z, y))
        return result


UNROUNDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pooled": lambda z, y: F.max_pool2d(z, 2).relu(),
    "joined": lambda z, y: torch.cat([z, y], 1).relu(),
    "added": lambda z, y: (z + y).relu(),
    "curve": lambda z, y: F.silu(z),
    "curve behind a pool": lambda z, y: F.silu(F.max_pool2d(z, 2)),
    "difference": lambda z, y: (y - z).relu(),
    "product": lambda z, y: (z * y).relu(),
    "sum and curve": lambda z, y: F.silu(z) + z,
    "sum before a curve": lambda z, y: F.hardswish(z + y),
}
INTEGERS_ALL_THE_SAME = ("pooled", "joined", "added", "product", "sum and curve")
"""The last two round in training as well."""


@pytest.mark.parametrize("kind", UNROUNDED)
def test_nothing_is_rounded_that_training_left_float_but_what_is_added(kind: str, tmp_path: Path) -> None:
    student = calibrated(lively(Unrounded(kind), 1), QuantConfig(8, 8), shape=SHAPE)
    deployed, model = lowered(student)
    x = images(5, 16, SHAPE, reach=3.0)
    assert verify_file(model, x.numpy(), torch_digests(deployed, x), [False, True])["failures"] == []
    integer = kind in INTEGERS_ALL_THE_SAME
    assert deployed.changes.unrounded == ([] if integer else ["two"])
    assert optimised(model, tmp_path).count("QLinearConv") == (2 if integer else 1)
    # The same codes as for TensorRT, but for last bits of biases, and where a sum's operand is rounded.
    found, wanted = (torch_codes(form, x) for form in (deployed, convert(student, "tensorrt")))
    alike = [(found[place] == codes).mean() for place, codes in wanted.items() if found[place].shape == codes.shape]
    assert (min(alike) > 0.99) == (kind != "added")
