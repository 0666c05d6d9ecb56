"""Networks as users bring them: every family is lowered exactly in both flavours, and TensorRT-RTX runs it in INT8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faqd.deploy.engine.build import engine_from_onnx
from faqd.deploy.engine.options import BuildOptions
from faqd.deploy.explain.tensorrt_rules import int8_layers
from faqd.deploy.export.float16 import float16_from_float32
from faqd.deploy.export.torch_to_onnx import onnx_from_deployed, save
from faqd.deploy.onnx_model.load import load_model
from faqd.deploy.verify.layers import verify_file
from faqd.deploy.verify.torch_values import torch_digests
from faqd.errors import UserError
from faqd.quant import Quant
from faqd.quantize.calibrate import float_forward
from faqd.quantize.config import QuantConfig
from faqd.quantize.convert import collect_output_scales, convert
from faqd.quantize.operators.clamp import Clamp
from faqd.quantize.student import Student, student_table
from tests.deploy.export.test_export import needs_rtx
from tests.fixtures.families import FAMILIES, MobileNetV2, ShuffleNet, SqueezeExcite
from tests.fixtures.networks import CHANNELS, CLASSES, calibrated, captured, conv, images, lively

SHAPE = (3, 16, 16)
BITS = QuantConfig(4, 4)


@pytest.fixture(scope="module")
def students() -> dict[str, Student]:
    return {name: calibrated(lively(make(), 3), BITS, shape=SHAPE) for name, make in FAMILIES.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_with_quantizers_off_is_the_users_network(students: dict[str, Student], name: str) -> None:
    x = images(4, 8, SHAPE)
    wanted = lively(FAMILIES[name](), 3)(x)
    with float_forward(students[name]):
        torch.testing.assert_close(students[name].network(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_onnxruntime_computes_what_torch_and_the_reference_do(students: dict[str, Student], name: str) -> None:
    student = students[name]
    deployed = convert(student, "onnxruntime", collect_output_scales(student, [images(0, 16, SHAPE)]))
    model = onnx_from_deployed(deployed, images(1, 2, SHAPE), {})
    x = images(5, 16, SHAPE, reach=3.0)
    assert verify_file(model, x.numpy(), torch_digests(deployed, x), [False, True])["failures"] == []


@needs_rtx
@pytest.mark.parametrize("name", FAMILIES)
def test_tensorrt_runs_every_layer_in_int8_that_no_rule_keeps_float(
    students: dict[str, Student], name: str, tmp_path: Path
) -> None:
    deployed = convert(students[name], "tensorrt")
    model = onnx_from_deployed(deployed, images(1, 2, SHAPE), {})
    x = images(5, 16, SHAPE, reach=3.0)
    assert verify_file(model, x.numpy(), torch_digests(deployed, x), [False])["failures"] == []
    save(float16_from_float32(model), tmp_path / "student.onnx")
    record = engine_from_onnx(tmp_path / "student.onnx", tmp_path / "student.engine", BuildOptions(), lambda _: None)
    found = {entry["node"].rpartition(".")[0]: entry["int8"] for entry in record["int8"]["products"]}
    assert found == int8_layers(model) and set(found) == {row["name"] for row in student_table(students[name])}
    assert {layer for layer, int8 in found.items() if not int8} == ({"up2"} if name == "unet" else set())


def test_outputs_have_the_names_of_the_users_dictionary(students: dict[str, Student]) -> None:
    model = onnx_from_deployed(convert(students["detector"], "tensorrt"), images(1, 2, SHAPE), {})
    assert [value.name for value in model.graph.output] == ["scores_0", "scores_1", "boxes_0", "boxes_1"]
    assert [d.dim_value for d in model.graph.output[2].type.tensor_type.shape.dim[1:]] == [4, 16, 16]


# Rules ------------------------------------------------------------------------------------------------------------


def test_one_scale_runs_through_split_shuffle_and_concatenation() -> None:
    student = calibrated(lively(ShuffleNet(), 3), BITS, shape=SHAPE)
    quantizers = student.quantizers()
    stage = [quantizers[name] for name in quantizers if name.startswith("stage") or name == "stem.2"]
    # Of the branches, the last activation is joined with what was passed on; the depthwise part has its own.
    joined = [quantizer for quantizer in stage if quantizer.scale is quantizers["stem.2"].scale]
    assert len(joined) == 4
    assert {quantizer.quant for quantizer in joined} == {Quant(0, 15)}


def test_relu6_becomes_the_limit_of_its_codes() -> None:
    student = calibrated(lively(MobileNetV2(), 3), QuantConfig(8, 8), shape=SHAPE)
    quantizer = student.quantizers()["features.2"]
    quantizer.scale.data.fill_(0.1)  # 6 is code 60 of 127
    deployed = convert(student, "tensorrt")
    assert deployed.requantizers()["features.2_quant"].quant == Quant(0, 60)
    assert not any(isinstance(module, Clamp) and module.high == 6 for module in deployed.network.modules())
    quantizer.scale.data.fill_(20.0)  # 6 would be code 0: no grid is left, the limit stays an operator
    left = convert(student, "tensorrt")
    assert left.requantizers()["features.2_quant"].quant == Quant(0, 127)
    assert isinstance(left.network.get_submodule("features.2"), Clamp)


class Written(nn.Module):
    """Activations as functions, methods and formulas."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv, self.last = how, conv(3), conv()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.how == "x * sigmoid(x)":
            x = x * torch.sigmoid(x)
        elif self.how == "x * relu6(x + 3) / 6":
            x = x * F.relu6(x + 3) / 6
        elif self.how == "x * (relu6(x + 3) / 6)":
            x = x * (F.relu6(x + 3.0, inplace=True) / 6.0)
        elif self.how == "x.clamp(0, 6)":
            x = x.clamp(0, 6)
        elif self.how == "clamp(min=0)":
            x = torch.clamp(x, min=0)
        else:
            x = F.hardtanh(x, -2.0, 2.0)
        return self.last(x)  # type: ignore[no-any-return]


WRITTEN: dict[str, type[nn.Module]] = {
    "x * sigmoid(x)": nn.SiLU,
    "x * relu6(x + 3) / 6": nn.Hardswish,
    "x * (relu6(x + 3) / 6)": nn.Hardswish,
    "x.clamp(0, 6)": Clamp,
    "clamp(min=0)": nn.ReLU,
    "hardtanh": Clamp,
}


@pytest.mark.parametrize("how", WRITTEN)
def test_every_way_of_writing_an_activation_becomes_one_module(how: str) -> None:
    network = lively(Written(how), 1)
    wanted = network(images(2))
    traced = captured(network)
    called = [traced.get_submodule(str(node.target)) for node in traced.graph.nodes if node.op == "call_module"]
    assert [type(module) for module in called] == [nn.Conv2d, WRITTEN[how], nn.Conv2d]
    torch.testing.assert_close(traced(images(2)), wanted, rtol=1e-5, atol=1e-5)


# --exclude --------------------------------------------------------------------------------------------------------


class WithUnknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = conv(3), nn.Mish(), nn.Linear(CHANNELS, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)).mean((2, 3)))  # type: ignore[no-any-return]


def test_excluded_layers_stay_float_and_the_rest_stays_exact() -> None:
    bits = QuantConfig(4, 4, exclude=(r"features\.3\.conv\.[03]$", "classifier"))
    student = calibrated(lively(MobileNetV2(), 3), bits, shape=SHAPE)
    rows = {row["name"]: row for row in student_table(student)}
    floats = {name for name, row in rows.items() if row["weights"] == "float"}
    assert floats == {"features.3.conv.0", "features.3.conv.3", "classifier.1"}
    lowered = onnx_from_deployed(convert(student, "tensorrt"), images(1, 2, SHAPE), {})
    assert {name for name, int8 in int8_layers(lowered).items() if not int8} == floats
    deployed = convert(student, "onnxruntime", collect_output_scales(student, [images(0, 16, SHAPE)]))
    assert not deployed.integers_only
    model = onnx_from_deployed(deployed, images(1, 2, SHAPE), {})
    x = images(5, 8, SHAPE, reach=3.0)
    assert verify_file(model, x.numpy(), torch_digests(deployed, x), [False, True])["failures"] == []


def test_an_operator_that_cannot_be_quantized_is_named_with_the_way_out() -> None:
    with pytest.raises(UserError, match=r"act .*Mish cannot be quantized yet.*--exclude"):
        calibrated(lively(WithUnknown(), 1), QuantConfig(4, 4, strict=True))


def test_a_refusal_lists_the_other_places() -> None:
    with pytest.raises(UserError, match=r"^norm .*LayerNorm cannot.* So it is at 10 more places: group, .*softmax\."):
        calibrated(lively(Floats(), 3), QuantConfig(8, 8, exclude=("^up$",), strict=True), shape=SHAPE)


class Floats(nn.Module):
    """What is never quantized: norms over channels, a choice, a maximum over channels, probabilities; and a gate and a
    grouped transposed convolution that could be, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.gate = nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm(8), SqueezeExcite(8, nn.Sigmoid())
        self.up, self.group = nn.ConvTranspose2d(8, 8, 2, 2, groups=4, bias=False), nn.GroupNorm(2, 8)
        self.down, self.last = nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.group(self.up(self.gate(x)))
        x = F.mish(F.relu(self.down(x)))
        chosen = torch.where(x > 1.0, x, F.normalize(x, dim=1))
        return F.softmax(self.last((chosen * x.max(1, keepdim=True)[0]).mean((2, 3))), 1)


FLOATS = (
    "norm",
    "^gate",
    "^up$",
    "group",
    "mish",
    "^gt",
    "where",
    "vector_norm",
    "clamp_min",
    "expand_as",
    "^div",
    "^max",
    "softmax",
)


def test_operators_that_stay_float_are_lowered_and_proved_all_the_same(tmp_path: Path) -> None:
    student = calibrated(lively(Floats(), 3), QuantConfig(8, 8, exclude=FLOATS), shape=SHAPE)
    x = images(5, 8, SHAPE, reach=3.0)
    for flavour, modes in (("tensorrt", [False]), ("onnxruntime", [False, True])):
        scales = collect_output_scales(student, [images(0, 16, SHAPE)])
        deployed = convert(student, flavour, scales)  # type: ignore[arg-type]
        assert not deployed.integers_only
        model = onnx_from_deployed(deployed, images(1, 2, SHAPE), {})
        assert verify_file(model, x.numpy(), torch_digests(deployed, x), modes)["failures"] == []
        if flavour == "tensorrt":
            save(float16_from_float32(model), tmp_path / "student.onnx")
    found = int8_layers(load_model(tmp_path / "student.onnx"))
    assert {name for name, int8 in found.items() if not int8} == {"gate.reduce", "gate.expand", "up"}


class Bessel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = conv(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(self.first(x))  # type: ignore[no-any-return]


def test_an_operator_that_no_onnx_file_can_hold_is_named() -> None:
    student = calibrated(lively(Bessel(), 1), QuantConfig(8, 8, exclude=("bessel",)))
    with pytest.raises(UserError, match=r"torch's exporter cannot write .*bessel_j0"):
        onnx_from_deployed(convert(student, "tensorrt"), images(1, 2), {})


@needs_rtx
def test_tensorrt_builds_what_stays_float(tmp_path: Path) -> None:
    student = calibrated(lively(Floats(), 3), QuantConfig(8, 8, exclude=FLOATS), shape=SHAPE)
    model = onnx_from_deployed(convert(student, "tensorrt"), images(1, 2, SHAPE), {})
    save(float16_from_float32(model), tmp_path / "student.onnx")
    record = engine_from_onnx(tmp_path / "student.onnx", tmp_path / "student.engine", BuildOptions(), lambda _: None)
    products = {entry["node"].rpartition(".")[0]: entry["int8"] for entry in record["int8"]["products"]}
    assert {name for name, int8 in products.items() if int8} == {"stem", "down", "last"}


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (lambda x: F.adaptive_max_pool2d(x, 3), "from 8x8 to 3x3 has windows of several sizes.*--image-size"),
        (lambda x: torch.topk(x, 2, 1)[0], "topk cannot be quantized yet.*--exclude"),
        (lambda x: torch.cumsum(x, 1), "cumsum cannot be quantized yet.*--exclude"),
    ],
)
def test_what_would_fail_after_the_training_is_refused_before_it(
    operator: Callable[[Tensor], Tensor], message: str
) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = conv(3), conv()

        def forward(self, x: Tensor) -> Tensor:
            return operator(self.conv(x)).mean((2, 3))

    with pytest.raises(UserError, match=message):
        calibrated(lively(Wrapped(), 1), QuantConfig(4, 4, strict=True))


@pytest.mark.parametrize(("pattern", "message"), [("(", "not a regular expression"), ("nothing", "layers are first")])
def test_a_pattern_that_fits_nothing_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        calibrated(lively(WithUnknown(), 1), QuantConfig(4, 4, exclude=(pattern,)))
