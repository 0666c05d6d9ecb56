"""All 256 codes of eight bits: chosen where values lie, lowered exactly to both flavours, and bound by the proof."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from faqd.calib.asymmetric import LOWEST, asymmetric_range
from faqd.calib.ranges import METHODS, Method, scale_from
from faqd.deploy.explain.tensorrt_rules import int8_layers
from faqd.deploy.verify.layers import verify_file
from faqd.deploy.verify.torch_values import as_trained, torch_digests
from faqd.quant import SIGNED_8, Quant, asymmetric_quant, int8_offset
from faqd.quantize.config import QuantConfig
from faqd.quantize.operators.arithmetic import Offset
from faqd.quantize.operators.requantize import Flavour
from faqd.quantize.prepare import insert_quantizers
from faqd.quantize.student import Student
from faqd.quantize.without_training import Asymmetric, Untrained, best_without_training
from faqd.saturation import zero_point
from faqd.train.networks.own_tensors import own_tensors, put_tensors
from tests.fixtures.networks import CHANNELS, CLASSES, calibrated, captured, conv, images, lively
from tests.quantize.test_lowering import failures, lowered

ASYMMETRIC = QuantConfig(asymmetric=True)
NORMAL = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
VALUES = {
    "both signs": NORMAL,
    "silu": NORMAL / (1 + np.exp(-NORMAL)),
    "far above zero": NORMAL + 9,
    "never positive": -np.abs(NORMAL),
    "never negative": np.abs(NORMAL),
    "an outlier": np.append(NORMAL, np.float32(90)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", VALUES)
def test_the_codes_lie_where_the_values_do(name: str, method: Method) -> None:
    values = VALUES[name]
    scale, low = asymmetric_range(values, method)
    assert LOWEST <= low <= 0 and low % 2 == 0
    grid = asymmetric_quant(low)
    rounded = np.clip(np.rint(values / scale), grid.low, grid.high) * scale
    usual = scale_from(values, SIGNED_8, method)
    symmetric = np.clip(np.rint(values / usual), SIGNED_8.low, SIGNED_8.high) * usual
    error, other = (float(np.square(found - values).mean()) for found in (rounded, symmetric))
    if (name, method) != ("far above zero", "entropy"):  # which clips most of it, either way
        assert error < (1.2 if name in ("both signs", "an outlier") else 0.7) * other
    if method == "max":
        assert np.abs(rounded - values).max() <= 0.5001 * scale


@pytest.mark.parametrize("values", [[], [0.0], [1e-40], [-1e-40, 1e-40]])
@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_of_nothing_has_a_scale(values: list[float], method: Method) -> None:
    assert asymmetric_range(np.asarray(values, np.float32), method) == (1.0, 0)


@pytest.mark.parametrize("low", range(LOWEST, 1, 2))
def test_int8_holds_every_range_moved_by_an_even_number(low: int) -> None:
    grid = asymmetric_quant(low)
    offset = int8_offset(grid)
    assert (grid.low - offset, grid.high - offset, offset % 2) == (-128, 127, 0)


@pytest.mark.parametrize("quant", [Quant(-51, 203), Quant(-52, 203), Quant(-3, 200), Quant(0, 130), Quant(-200, 20)])
def test_limits_within_a_range_leave_both_runtimes_an_even_offset(quant: Quant) -> None:
    zero, offset = zero_point(quant), int8_offset(quant)
    assert zero % 2 == 0 and quant.low + zero >= 0 and quant.high + zero <= 255
    assert offset % 2 == 0 and quant.low - offset >= -128 and quant.high - offset <= 127


class Layers(nn.Module):
    """Layers of every kind behind an activation: padded unevenly, strided, dilated, in groups, depthwise, linear."""

    def __init__(self, activation: Callable[[], nn.Module], padding: Any = 1) -> None:
        super().__init__()
        self.act, self.first = activation(), conv(3)
        self.padded = nn.Conv2d(CHANNELS, CHANNELS, (3, 5), padding=padding, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.depthwise = nn.Conv2d(CHANNELS, CHANNELS, 3, 2, 1, groups=CHANNELS)
        self.dilated = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=2, dilation=2, groups=2)
        self.dense, self.last = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Linear(CHANNELS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.padded(self.act(self.first(x)))))
        x = self.act(self.depthwise(x))
        x = self.act(self.dilated(x)) + self.act(self.dense(x))
        return self.last(x.mean((2, 3)))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """Sums: with a branch that stays float, of two tensors of codes, a difference; read twice, and returned."""

    def __init__(self, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.act, self.a, self.b, self.c, self.last = (
            activation(),
            conv(3),
            conv(),
            conv(),
            nn.Linear(CHANNELS, CLASSES),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.act(self.a(x))
        y = self.act(x + self.b(x))
        z = self.act(x - y) + self.act(self.c(y))
        return self.last((z + y).mean((2, 3))), z


class Moves(nn.Module):
    """What hands codes on: padding, pooling, slices, concatenation, resizing, shuffling; averages, and a gate."""

    def __init__(self, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.act, self.a, self.b, self.c = activation(), conv(3), conv(), nn.Conv2d(2 * CHANNELS, CHANNELS, 3)
        self.gate, self.last = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Linear(CHANNELS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x))
        pooled = F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 2)
        both = torch.cat([pooled, self.act(self.b(F.avg_pool2d(x, 2)))], 1)
        x = self.act(self.c(F.pad(both, (1, 1, 1, 1))))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = F.interpolate(x, scale_factor=2) + F.interpolate(self.act(self.gate(x)), scale_factor=2, mode="bilinear")
        return self.last(F.pixel_unshuffle(x, 2)[:, ::4].mean((2, 3)))  # type: ignore[no-any-return]


class PreActivation(nn.Module):
    """Codes that a batch norm reads, limits that become those of the codes, a multiple of codes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.last = conv(3), conv(), nn.BatchNorm2d(CHANNELS), nn.Linear(CHANNELS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.a(x))
        x = F.hardtanh(self.b(x + self.b(F.relu(self.norm(x)))), -0.5, 2.0)
        return self.last((0.75 * F.gelu(self.b(x))).mean((2, 3)))  # type: ignore[no-any-return]


class Transposed(nn.Module):
    """A transposed convolution and an average that count zeros between and beside what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.up, self.last = conv(3), conv(), nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, 2), conv()

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.b(F.avg_pool2d(F.silu(self.a(x)), 3, 1, 1)))
        return self.last(F.silu(self.up(x))).mean((2, 3))  # type: ignore[no-any-return]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "layers, relu": lambda: Layers(nn.ReLU),
    "layers, silu": lambda: Layers(nn.SiLU, "same"),
    "layers, leaky": lambda: Layers(lambda: nn.LeakyReLU(0.3), (1, 2)),
    "layers, sigmoid": lambda: Layers(nn.Sigmoid, "valid"),
    "residual, relu": lambda: Residual(nn.ReLU),
    "residual, hardswish": lambda: Residual(nn.Hardswish),
    "moves, relu": lambda: Moves(nn.ReLU),
    "moves, silu": lambda: Moves(nn.SiLU),
    "pre-activation": PreActivation,
    "transposed": Transposed,
}


ALL_BUT_TIES = 0.99
"""torch adds floats in an order that depends on the CPU: a value at a tie falls the other way, and goes on through the
layers behind. On an x86 CPU with AVX2 alone one of 768 does, and then four behind it."""


def student_of(name: str, bits: QuantConfig = ASYMMETRIC) -> Student:
    return calibrated(lively(NETWORKS[name](), 1), bits)


@pytest.mark.parametrize("flavour", ["tensorrt", "onnxruntime"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_reader_is_lowered_exactly(name: str, flavour: Flavour) -> None:
    student = student_of(name)
    deployed, model = lowered(student, flavour)
    assert failures(deployed, model, images(3, 24, reach=2.0)) == []
    if flavour == "tensorrt":
        close = as_trained(student, deployed, images(3, 24, reach=2.0))
        assert min(close["equal_codes_per_layer"].values()) >= ALL_BUT_TIES, close
        in_float = [layer for layer, int8 in int8_layers(model).items() if not int8]
        assert in_float == (["up"] if name == "transposed" else [])
        assert any(module.offset for module in deployed.requantizers().values())


@pytest.mark.parametrize("rounding", ["nearest", "ceil"])
@pytest.mark.parametrize("bits", [4, 8])
def test_few_bits_and_rounding_up_go_beside_it(bits: int, rounding: Any) -> None:
    student = student_of("residual, relu", QuantConfig(bits, bits, rounding=rounding, asymmetric=True))
    deployed, model = lowered(student, "tensorrt")
    assert failures(deployed, model, images(3, 24, reach=2.0)) == []
    assert min(as_trained(student, deployed, images(3))["equal_codes_per_layer"].values()) >= ALL_BUT_TIES


def test_a_relu_and_its_offset_cost_no_operator() -> None:
    deployed, model = lowered(student_of("layers, relu"), "tensorrt")
    operators = {node.op_type for node in model.graph.node}
    assert not operators & {"Relu", "Clip", "Mul", "Sub"}
    shifted = [name for name, module in deployed.network.named_modules() if isinstance(module, Offset)]
    assert shifted == ["add_quant_shift", "mean_quant_shift"]  # which no layer gives


def test_what_is_read_beside_zeros_and_the_image_stay_around_zero() -> None:
    quantizers = student_of("transposed").quantizers()
    assert [name for name, each in quantizers.items() if not each.asymmetric] == ["x", "silu", "silu_1"]


def _copied(fresh: Student, student: Student) -> None:
    with torch.no_grad():
        put_tensors(fresh.network, own_tensors(student.network))


LOADED: dict[str, Callable[[Student, Student], object]] = {
    "load_state_dict": lambda fresh, student: fresh.load_state_dict(student.state_dict()),
    "a run's tensors": _copied,
    "a replaced buffer": lambda fresh, student: fresh.load_state_dict(student.state_dict(), assign=True),
    "moved, then loaded": lambda fresh, student: fresh.double().float().load_state_dict(student.state_dict()),
}


@pytest.mark.parametrize("how", LOADED)
def test_a_student_is_loaded_with_its_lowest_codes(how: str) -> None:
    student = student_of("layers, silu")
    fresh = insert_quantizers(captured(lively(NETWORKS["layers, silu"](), 2)), ASYMMETRIC, images(0, 2))
    assert all(each.quant.low == -128 for each in fresh.quantizers().values() if each.asymmetric)
    LOADED[how](fresh, student)
    assert torch.equal(fresh.network.eval()(images(5)), student.network(images(5)))
    again = copy.deepcopy(fresh)
    assert torch.equal(again.network(images(5)), student.network(images(5)))
    lowest = [each.quant.low for each in fresh.quantizers().values() if each.asymmetric]
    assert lowest and all(low > -128 for low in lowest)


def test_scales_learn_and_the_lowest_code_stays() -> None:
    student = student_of("layers, silu")
    before = {name: (each.quant, each.scale.item()) for name, each in student.quantizers().items()}
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    student.train()(images(5)).square().sum().backward()
    optimizer.step()
    after = {name: (each.quant, each.scale.item()) for name, each in student.quantizers().items()}
    assert all(after[name][0] == quant and after[name][1] != scale for name, (quant, scale) in before.items())


def _edited(model: onnx.ModelProto, name: str, edit: Callable[[Any], Any]) -> onnx.ModelProto:
    """With another number in each constant whose name ends like this."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    hit = [tensor for tensor in found.graph.initializer if tensor.name.endswith(name)]
    assert hit
    for tensor in hit[:1]:
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(edit(values), values.dtype), tensor.name))
    return found


FAULTS: dict[str, tuple[Flavour, str, Callable[[Any], Any]]] = {
    "another zero point": ("onnxruntime", "act_quant.zero_point", lambda zero: zero + 2),
    "a symmetric zero point": ("onnxruntime", "act_quant.zero_point", lambda zero: zero * 0 + 128),
    "padding by zeros": ("tensorrt", "padded_pad.value", lambda value: value * 0),
    "padding by the next code": ("tensorrt", "padded_pad.value", lambda value: value * 117 / 118),
    "a bias without what its layer read too little": ("tensorrt", "dense.bias", lambda bias: bias * 0.9),
    "nothing in front of a rounding": ("tensorrt", "act_quant_shift.offset", lambda offset: offset * 0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_proof_finds_wrong_offsets(fault: str) -> None:
    flavour, name, edit = FAULTS[fault]
    deployed, model = lowered(student_of("layers, silu"), flavour)
    digests = torch_digests(deployed, images(3, 16))
    assert verify_file(model, images(3, 16).numpy(), digests, [False])["failures"] == []
    assert verify_file(_edited(model, name, edit), images(3, 16).numpy(), digests, [False])["failures"] != []


def tried(asymmetric: Asymmetric, name: str = "layers, silu") -> tuple[Untrained, list[str]]:
    said: list[str] = []
    best = best_without_training(
        captured(lively(NETWORKS[name](), 1)),
        QuantConfig(),
        [images(0, 64)],
        images(1, 32),
        tried=lambda one: said.append(one.in_words()),
        asymmetric=asymmetric,
        enough=1.0,
    )
    return best, said


@pytest.mark.parametrize(("asked", "wanted"), [("auto", [False, True]), ("always", [True]), ("never", [False])])
def test_it_is_tried_where_something_is_lost(asked: Asymmetric, wanted: list[bool]) -> None:
    best, said = tried(asked)
    assert ["asymmetric" in line for line in said] == wanted
    assert best.asymmetric == wanted[-1] == best.student.config.asymmetric


def test_all_codes_lose_less_than_half_of_them() -> None:
    assert tried("always")[0].distance < 0.7 * tried("never")[0].distance
