"""What users' networks do now and then: each of these once ended in a traceback or in a refusal without a reason."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from faqd.bundle import STUDENT_TENSORRT, STUDENT_TENSORRT_FP32, load_bundle
from faqd.deploy.engine.build import engine_from_onnx
from faqd.deploy.engine.options import BuildOptions
from faqd.deploy.export.float16 import float16_from_float32
from faqd.deploy.export.torch_to_onnx import onnx_from_deployed, save
from faqd.deploy.reference.evaluator import Evaluator
from faqd.deploy.verify.bundle_networks import load_network
from faqd.deploy.verify.float16 import _beyond
from faqd.deploy.verify.layers import verify_file
from faqd.deploy.verify.torch_values import as_trained, torch_digests
from faqd.errors import UserError
from faqd.quantize.calibrate import ASIDE, calibrate
from faqd.quantize.capture.capture import capture
from faqd.quantize.capture.fuse_batch_norm import fused
from faqd.quantize.config import QuantConfig
from faqd.quantize.convert import collect_output_scales, convert
from faqd.quantize.operators.requantize import Flavour
from faqd.quantize.placement import place
from faqd.train.run.student import load_student
from tests.deploy.export.test_export import needs_rtx
from tests.fixtures.networks import CHANNELS, SHAPE, calibrated, captured, conv, images, lively
from tests.fixtures.toy_runs import NET, User, faqd_deploy, faqd_train, new_user, succeeds, write_net

FLAVOURS: dict[Flavour, list[bool]] = {"onnxruntime": [False, True], "tensorrt": [False]}
"""With the modes of onnxruntime, optimised or not; the file of the last one is returned."""


def proved(network: nn.Module) -> onnx.ModelProto:
    """The student's file for TensorRT, once both flavours compute what torch, the reference and onnxruntime say."""
    student = calibrated(lively(network, 3), QuantConfig(8, 8))
    x = images(5, 8, SHAPE, reach=3.0)
    for flavour, modes in FLAVOURS.items():
        scales = collect_output_scales(student, [images(0, 16)])
        deployed = convert(student, flavour, scales)
        model = onnx_from_deployed(deployed, images(1, 2), {})
        assert verify_file(model, x.numpy(), torch_digests(deployed, x), modes)["failures"] == []
        equal = as_trained(student, deployed, x)["equal_codes_per_layer"]
        assert min(equal.values()) > 0.99 or flavour == "onnxruntime"  # which rounds more often
    return model


# Frozen parameters ------------------------------------------------------------------------------------------------

BLUR = """
        self.register_buffer("blur", torch.ones(16, 1, 3, 3) / 9)

    def forward(self, x):
        x = nn.functional.conv2d(self.features(x), self.blur, groups=16)
        return self.head(x.mean((2, 3)))


def build():
"""
FROZEN: dict[str, str] = {
    "the first layer": NET.replace(
        "return Net()", "net = Net()\n    net.features[0].requires_grad_(False)\n    return net"
    ),
    "the network": NET.replace("return Net()", "return Net().requires_grad_(False)"),
    "a filter": NET.partition("\n    def forward")[0] + BLUR + "    return Net()\n",
}


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


@pytest.mark.parametrize("frozen", FROZEN)
def test_a_student_of_a_frozen_teacher_learns_and_keeps_its_buffers(user: User, frozen: str, tmp_path: Path) -> None:
    net = write_net(tmp_path, FROZEN[frozen])
    line = ("--teacher", f"{net}:build", "--teacher-weights", net.parent / "best.pth", *user.data)
    # Every look is the best, so that the weights of the last iteration are kept.
    newest = "looks = []\ndef newest(outputs, found):\n    looks.append(1)\n    return len(looks)\n"
    (tmp_path / "newest.py").write_text(newest)
    line = (*line, "--select", f"{tmp_path / 'newest.py'}:newest")
    succeeds(faqd_train("distill", *line, "--steps", 2, "--batch-size", 16, "--out", tmp_path / "run"))
    trained, before = load_student(tmp_path / "run").network, torch.load(tmp_path / "best.pth", weights_only=True)
    latent = "parametrizations.weight.original"
    state = {name.replace(latent, "weight"): value for name, value in trained.state_dict().items()}
    assert not torch.equal(state["features.0.weight"], before["features.0.weight"])
    if frozen == "a filter":
        assert torch.equal(state["conv2d.weight"], before["blur"])


# Batch norm into the layer before it --------------------------------------------------------------------------------

PAIRS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "a linear layer, without factors": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 8, bias=False), nn.BatchNorm1d(8, affine=False)),
        True,
    ),
    "a convolution, without factors": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)),
        True,
    ),
    "a transposed convolution": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 2), nn.BatchNorm2d(8)), True),
    "a grouped transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 2, 2, groups=3, bias=False), nn.BatchNorm2d(6)),
        False,
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_teacher_with_batch_norm_taken_in_computes_the_same(pair: str) -> None:
    make, is_taken_in = PAIRS[pair]
    network = lively(make(), 1)
    *_, norm = network.children()
    mean = norm.get_buffer("running_mean")
    mean.copy_(torch.linspace(-1, 1, len(mean)))
    x: Tensor = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    smaller = fused(capture(network, x))
    assert is_taken_in != any(isinstance(module, type(norm)) for module in smaller.modules())
    torch.testing.assert_close(smaller(x), network(x))


# Own tensors that are moved -----------------------------------------------------------------------------------------


class Own(nn.Module):
    """A parameter of one number for each channel, made to fit by `formula`."""

    filters: Tensor

    def __init__(self, formula: Callable[[Own, Tensor], Tensor]) -> None:
        super().__init__()
        self.formula, self.first, self.last = formula, conv(3), conv()
        self.g = nn.Parameter(torch.linspace(-1, 1, CHANNELS))
        self.register_buffer("filters", torch.linspace(-1, 1, CHANNELS * 9).reshape(CHANNELS, 9))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.formula(self, self.first(x)))  # type: ignore[no-any-return]


MOVED: dict[str, Callable[[Own, Tensor], Tensor]] = {
    "view": lambda s, x: x + torch.relu(x) * s.g.view(1, -1, 1, 1),
    "indices": lambda s, x: x * s.g[None, :, None, None],
    "one of them": lambda s, x: x / s.g[0],
    "by sizes": lambda s, x: s.g.reshape(x.shape[1], 1, 1) - x,
    "expanded": lambda s, x: x * s.g.view(1, -1, 1, 1).expand_as(x),
    "twice": lambda s, x: x * s.g.unsqueeze(-1).unsqueeze(-1),
    "a piece": lambda s, x: x + s.g.chunk(4)[1].view(2, 1, 1)[0],
    "filters": lambda s, x: F.conv2d(x, s.filters.view(CHANNELS, 1, 3, 3), groups=CHANNELS),
}


@pytest.mark.parametrize("how", MOVED)
def test_a_moved_parameter_is_a_constant(how: str) -> None:
    network = Own(MOVED[how])
    traced = captured(lively(network, 2))
    assert not any(node.op == "get_attr" for node in traced.graph.nodes)
    torch.testing.assert_close(traced(images(1)), network(images(1)))
    proved(network)


def test_a_parameter_behind_an_activation_is_rounded_alone() -> None:
    proved(Own(lambda s, x: x * torch.sigmoid(s.g).view(1, -1, 1, 1)))


# Reshapes -----------------------------------------------------------------------------------------------------------


class Reshaped(nn.Module):
    """Two layers and what lies between them; behind them `last` where the shapes ask for it."""

    def __init__(self, between: Callable[[Tensor], Tensor], channels: int = CHANNELS) -> None:
        super().__init__()
        self.between, self.first, self.last = between, conv(3), conv(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(torch.relu(self.first(x))))  # type: ignore[no-any-return]


class PerPixel(nn.Module):
    """A linear layer on the pixels of all images, in one axis, and back."""

    def __init__(self, keeps_map: bool) -> None:
        super().__init__()
        self.keeps_map, self.first, self.inner, self.last = (
            keeps_map,
            conv(3),
            nn.Linear(CHANNELS, 16),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        n, c, h, w = x.shape
        pixels = x.permute(0, 2, 3, 1)
        pixels = pixels.reshape(-1, c) if self.keeps_map else pixels.reshape(n * h * w, c)
        scores: Tensor = self.last(torch.relu(self.inner(pixels)))
        return scores.reshape(n, h, w, 5) if self.keeps_map else scores.view(n, h * w, -1)


RESHAPED: dict[str, Callable[[], nn.Module]] = {
    "channels shuffled": lambda: Reshaped(nn.ChannelShuffle(2)),
    "channels shuffled by a function": lambda: Reshaped(lambda x: F.channel_shuffle(x, groups=4)),
    "pixels into channels": lambda: Reshaped(nn.PixelUnshuffle(2), 4 * CHANNELS),
    "pixels into channels by a function": lambda: Reshaped(lambda x: F.pixel_unshuffle(x, 2), 4 * CHANNELS),
    "pixels in one axis": lambda: PerPixel(False),
    "pixels in one axis and back": lambda: PerPixel(True),
}


@pytest.fixture(scope="module")
def reshaped() -> dict[str, onnx.ModelProto]:
    return {name: proved(make()) for name, make in RESHAPED.items()}


@pytest.mark.parametrize("name", RESHAPED)
def test_reshapes_keep_to_the_shapes_that_backends_know(reshaped: dict[str, onnx.ModelProto], name: str) -> None:
    """And not to chains of Shape and Concat around an allowzero = 1."""
    kinds = {node.op_type for node in reshaped[name].graph.node}
    assert kinds <= {"QuantizeLinear", "DequantizeLinear", "Clip", "Relu", "Conv", "Gemm", "Reshape", "Transpose"}
    assert not any(a.name == "allowzero" and a.i for node in reshaped[name].graph.node for a in node.attribute)


@needs_rtx
@pytest.mark.parametrize("name", RESHAPED)
def test_tensorrt_runs_what_stands_around_a_reshape_in_int8(
    reshaped: dict[str, onnx.ModelProto], name: str, tmp_path: Path
) -> None:
    save(float16_from_float32(reshaped[name]), tmp_path / "student.onnx")
    record = engine_from_onnx(tmp_path / "student.onnx", tmp_path / "student.engine", BuildOptions(), lambda _: None)
    assert [entry["node"] for entry in record["int8"]["products"] if not entry["int8"]] == []


def test_the_reference_takes_a_zero_as_the_file_means_it() -> None:
    value, shape = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y"))
    for allowzero, wanted in ((0, (2, 3)), (1, (0, 3))):
        node = helper.make_node("Reshape", ["x", "sizes"], ["y"], allowzero=allowzero)
        sizes = numpy_helper.from_array(np.array([0, 3]), "sizes")
        graph = helper.make_graph([node], "g", [value], [shape], [sizes])
        evaluator = Evaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)]))
        x = np.zeros((2, 3) if allowzero == 0 else (0, 5), np.float32)
        assert evaluator.run({"x": x})["y"].shape == wanted


# Outputs ------------------------------------------------------------------------------------------------------------


class Returns(nn.Module):
    def __init__(self, returned: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.returned, self.first, self.last = returned, conv(3), nn.Linear(CHANNELS, 5)

    def forward(self, x: Tensor) -> object:
        return self.returned(self.last(torch.relu(self.first(x)).mean((2, 3))), x)


class Named(NamedTuple):
    scores: Tensor
    boxes: Tensor


class Kind(OrderedDict[str, Any]):
    pass


RETURNED: dict[str, tuple[Callable[[Tensor, Tensor], object], list[str]]] = {
    "two names": (lambda k, x: {"a": k, "b": k}, ["a", "b"]),
    "nested": (lambda k, x: {"a": k, "b": [k, {"c": k}]}, ["a", "b_0", "b_1_c"]),
    "as it is": (lambda k, x: (k, k.flatten(1)), ["logits_0", "logits_1"]),
    "the input": (lambda k, x: (k, x), ["logits_0", "logits_1"]),
    "no name": (lambda k, x: {"": k, "input": {"": k}}, ["_", "input__"]),
    "names of other letters": (lambda k, x: {"a b/c": k, "π": k, None: k}, ["a_b/c", "π", "None"]),
    "a named tuple": (lambda k, x: Named(k, k), ["scores", "boxes"]),
    "a class of dictionaries": (lambda k, x: Kind(a=k, b=[k]), ["a", "b_0"]),
    "names that meet": (lambda k, x: {"input": k, "a": {"b": k}, "a_b": k}, ["input_1", "a_b", "a_b_1"]),
}


@pytest.mark.parametrize("how", RETURNED)
def test_every_output_has_its_name_in_the_file(how: str) -> None:
    returned, names = RETURNED[how]
    model = proved(Returns(returned))
    assert [value.name for value in model.graph.output] == names
    assert [value.name for value in model.graph.input] == ["input"]


# Many paths ---------------------------------------------------------------------------------------------------------


class Parting(nn.Module):
    """Blocks with two ways through each, which is 2^40 in all."""

    def __init__(self, joins: bool) -> None:
        super().__init__()
        self.joins, self.first, self.last = joins, conv(3), conv()
        self.gates = nn.ModuleList(conv(kernel=1) for _ in range(0 if joins else 40))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        for gate in self.gates:
            x = x + x * torch.sigmoid(gate(x.mean((2, 3), keepdim=True)))
        for _ in range(40 if self.joins else 0):
            x = torch.cat([x, F.max_pool2d(x, 3, 1, 1)], 1)[:, :CHANNELS]
        return self.last(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("joins", [False, True])
def test_quantizers_are_placed_without_walking_every_path(joins: bool) -> None:
    place(captured(Parting(joins), (3, 4, 4)), QuantConfig(8, 8))


# Beyond FP16 --------------------------------------------------------------------------------------------------------


ENORMOUS: dict[str, dict[str, float]] = {
    "outputs": {"head.weight": 1e6, "head.bias": 1e6},
    "maps": {"features.1.weight": 1e6, "features.1.bias": 1e6, "features.3.weight": 1e-6},
}


@pytest.mark.parametrize("what", ENORMOUS)
def test_numbers_beyond_fp16_leave_the_file_in_fp32(what: str, user: User, tmp_path: Path) -> None:
    net = write_net(tmp_path, NET)
    weights = torch.load(net.parent / "best.pth", weights_only=True)
    weights = {name: value * ENORMOUS[what].get(name, 1) for name, value in weights.items()}
    torch.save(weights, tmp_path / "large.pth")
    line = ("ptq", "--teacher", f"{net}:build", "--teacher-weights", tmp_path / "large.pth", *user.data)
    told = succeeds(faqd_deploy(*line, "--eval-samples", 16, "--calibration-images", 16, "--out", tmp_path / "bundle"))
    assert "student.tensorrt.onnx stays FP32 outside of its integers: " in told.stderr
    assert "beyond FP16's 65504" in told.stderr and "--float-type" not in told.stderr
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.manifest["float_type"] == "fp32"
    assert load_network(bundle, STUDENT_TENSORRT) == load_network(bundle, STUDENT_TENSORRT_FP32)
    asked = succeeds(faqd_deploy(*line, "--eval-samples", 16, "--float-type", "fp32", "--out", tmp_path / "asked"))
    assert "stays FP32" not in asked.stderr


def test_sums_that_leave_fp16_are_told_from_small_differences() -> None:
    assert "range" in _beyond(np.array([np.inf]))
    assert _beyond(np.ones(1)) == ""


# What inspect takes -------------------------------------------------------------------------------------------------


def test_inspect_takes_the_weights_that_ptq_and_distill_ask_for(user: User, tmp_path: Path) -> None:
    shown = ("inspect", "--teacher", user.teacher[1], "--image-size", "8")
    told = succeeds(faqd_train(*shown, *user.teacher[2:]))
    assert told.stdout == succeeds(faqd_train(*shown)).stdout
    torch.save({"other.weight": torch.ones(1)}, tmp_path / "other.pth")
    refused = faqd_train(*shown, "--teacher-weights", tmp_path / "other.pth")
    assert refused.code == 2 and "other.pth: these are not weights of Net" in refused.stderr
    refused = faqd_train("inspect", "--teacher", tmp_path, *user.teacher[2:])
    assert refused.code == 2 and "has its own weights" in refused.stderr


class _Means(nn.Module):
    """Of codes that all reach the limit of a ReLU6: averages, halves of sums, pixels in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu6 = nn.Conv2d(SHAPE[0], 8, 3, padding=1), nn.Conv2d(SHAPE[0], 8, 1), nn.ReLU6()
        self.pool, self.up = nn.AvgPool2d(2), nn.Upsample(scale_factor=1.5, mode="bilinear")
        self.between, self.last = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.relu6(self.a(x)) + self.relu6(self.b(x))) * 0.5
        x = self.up(self.pool(self.relu6(self.between(x))))
        scores: Tensor = self.last(x.mean((2, 3)))
        return scores


@pytest.mark.parametrize("bits", [QuantConfig(8, 8), QuantConfig(4, 4)], ids=["8", "4"])
def test_means_of_codes_that_are_all_at_the_limit_lie_at_no_tie(bits: QuantConfig) -> None:
    """At a simple multiple of the scale of its codes, a quarter of the averages of four would lie between two."""
    torch.manual_seed(0)
    network = _Means()
    with torch.no_grad():
        for layer in (network.a, network.b, network.between):
            layer.weight.mul_(20)
    student, x = calibrated(network, bits, shape=SHAPE), images(3, 16, SHAPE)
    calibrate(student, [x], "max")
    scales = {name: float(module.scale.detach()) for name, module in student.quantizers().items()}
    assert scales["pool"] == pytest.approx(6 / 127 * ASIDE, rel=1e-6)
    for flavour, modes in FLAVOURS.items():
        deployed = convert(student, flavour, collect_output_scales(student, [x]))
        model = onnx_from_deployed(deployed, x, {})
        assert verify_file(model, x.numpy(), torch_digests(deployed, x, driven=8), modes)["failures"] == []


def test_an_average_that_reaches_beyond_the_map() -> None:
    """onnxruntime computes one that counts padding wrongly on codes; without padding it has another form."""
    x = images(3, 8, SHAPE)
    for kernel, padding, side in ((3, 0, 4), (2, 1, 5), (3, 1, 5)):
        pool = nn.AvgPool2d(kernel, 2, padding, ceil_mode=True)
        last = nn.Linear(8 * side * side, 5)
        network = nn.Sequential(nn.Conv2d(SHAPE[0], 8, 1), nn.ReLU(), pool, nn.Flatten(), last)
        student = calibrated(network, QuantConfig(8, 8), shape=SHAPE)
        deployed = convert(student, "onnxruntime", collect_output_scales(student, [x]))
        if (kernel, padding) == (3, 1):
            with pytest.raises(UserError, match=r"2: an average with ceil_mode that counts its padding"):
                onnx_from_deployed(deployed, x, {})
            continue
        model = onnx_from_deployed(deployed, x, {})
        assert verify_file(model, x.numpy(), torch_digests(deployed, x, driven=4), [False, True])["failures"] == []
