"""Which tensors of a network are rounded to which grid, and what is refused by its place in the user's code."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from faqd.errors import UserError
from faqd.quant import FLOAT_BITS
from faqd.quantize import nodes
from faqd.quantize.calibrate import calibrate, float_forward
from faqd.quantize.capture.capture import capture
from faqd.quantize.config import QuantConfig
from faqd.quantize.placement import place
from faqd.quantize.prepare import insert_quantizers
from tests.fixtures.networks import CHANNELS, CLASSES, NETWORKS, PIXELS, calibrated, captured, conv, images, lively

INPUT, SIGNED, POOLED = ("x", "8 (-128..127)"), "8 (-128..127)", "8 (0..127)"


def grids(network: nn.Module, bits: QuantConfig) -> list[tuple[str, str]]:
    traced = captured(network)
    names = nodes.places(traced)
    return [(names[node], quant.label) for node, quant in place(traced, bits).activations.items()]


def weight_grids(network: nn.Module, bits: QuantConfig) -> dict[str, str]:
    return {str(node.target): quant.label for node, quant in place(captured(network), bits).weights.items()}


EXPECTED = {
    "vgg": [INPUT, ("features.2", "4"), ("features.5", "4"), ("classifier.3", "4")],
    "residual": [
        INPUT,
        ("relu", "4"),
        ("block1.relu", "4"),
        ("block1.relu_1", "4"),
        ("block2.relu", "4"),
        ("block2.downsample.1", SIGNED),
        ("block2.relu_1", "4"),
        ("pool", POOLED),
    ],
    "functional": [INPUT, ("relu", "4"), ("relu_1", "4"), ("relu_2", "4"), ("mean", POOLED), ("relu_3", "4")],
    "pre-activation": [INPUT, ("conv0", SIGNED), ("relu", "4"), ("relu_1", "4"), ("relu_2", "4"), ("mean", POOLED)],
    "dense": [
        INPUT,
        ("relu", "4"),
        ("relu_1", "4"),
        ("pool", POOLED),
        ("relu_2", "4"),
        ("adaptive_avg_pool2d", POOLED),
    ],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_grids_of_a_network(name: str) -> None:
    assert grids(NETWORKS[name](), QuantConfig(4, 4)) == EXPECTED[name]


def test_eight_bits_depend_on_the_target() -> None:
    assert ("relu", "8 (0..127)") in grids(NETWORKS["residual"](), QuantConfig(8, 8))
    assert ("relu", "8") in grids(NETWORKS["residual"](), QuantConfig(8, 8, "onnxruntime"))
    assert grids(NETWORKS["residual"](), QuantConfig(4, FLOAT_BITS)) == []


def test_first_and_last_layer_keep_8_bit_weights() -> None:
    found = weight_grids(NETWORKS["residual"](), QuantConfig(2, 4))
    assert {layer for layer, label in found.items() if label == "8 (±127)"} == {"conv0", "fc"}
    assert set(found.values()) == {"8 (±127)", "2 (ternary)"}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_student_with_quantizers_off_is_the_float_network(name: str) -> None:
    network = lively(NETWORKS[name](), 3)
    wanted = network(images(4))
    student = calibrated(network, QuantConfig(2, 2), 3)
    with float_forward(student):
        torch.testing.assert_close(student.network(images(4)), wanted)
    assert not torch.allclose(student.network(images(4)), wanted, rtol=0.1)


def test_a_module_called_like_the_second_use_of_another_keeps_its_own_quantizer() -> None:
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = conv(3), conv(), conv(), nn.Linear(CHANNELS, CLASSES)
            self.relu, self.relu_1 = nn.ReLU(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.b(self.relu(self.a(x))))
            return self.d(self.relu_1(self.c(x)).mean((2, 3)))  # type: ignore[no-any-return]

    quantizers = calibrated(lively(Names(), 1), QuantConfig(4, 4)).quantizers()
    assert list(quantizers) == ["x", "relu", "relu_2", "relu_1", "mean"]
    assert len({id(quantizer) for quantizer in quantizers.values()}) == 5


def test_arguments_by_keyword_are_read_alike() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = conv(3), nn.Linear(CHANNELS, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(input=self.conv(input=x), inplace=True)
            return self.fc(input=F.adaptive_avg_pool2d(input=x, output_size=1).flatten(start_dim=1))  # type: ignore[no-any-return]

    assert grids(Keywords(), QuantConfig(4, 4)) == [INPUT, ("relu", "4"), ("adaptive_avg_pool2d", POOLED)]


# What is refused --------------------------------------------------------------------------------------------------


def network_of(middle: Callable[[Any, Tensor], Tensor], **modules: nn.Module | nn.Parameter) -> nn.Module:
    """A convolution, what the test puts in the middle, a mean and a classifier."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = conv(3), nn.LazyLinear(CLASSES)
            for name, module in modules.items():
                setattr(self, name, module)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(middle(self, F.relu(self.first(x))).mean((2, 3)))  # type: ignore[no-any-return]

    network = Network().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        network(images(0, 2))
    return network


def refusal(network: nn.Module) -> str:
    with pytest.raises(UserError) as caught:
        place(captured(network), QuantConfig(4, 4, strict=True))
    return str(caught.value)


def data_dependent(self: Any, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def aliased(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.conv(x)
    return F.relu(y, inplace=True) + y


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "unknown operator": (network_of(lambda self, x: torch.sin(x)), "sin cannot be quantized yet"),
    "unknown module": (network_of(lambda self, x: self.act(x), act=nn.Mish()), "act.*Mish cannot be quantized yet"),
    "padding": (
        network_of(lambda self, x: self.conv(x), conv=nn.Conv2d(CHANNELS, 4, 3, padding=1, padding_mode="circular")),
        r"conv_pad .*circular padding has no ONNX operator",
    ),
    "statistics": (
        network_of(lambda self, x: self.bn(x), bn=nn.BatchNorm2d(CHANNELS, track_running_stats=False)),
        "track_running_stats",
    ),
    "weights of the image": (
        network_of(lambda self, x: F.conv2d(x, x[:1]), conv=conv()),
        "its weights are computed from the image",
    ),
    "parameter per image": (
        network_of(lambda self, x: x + self.own, own=nn.Parameter(torch.ones(2, CHANNELS, 1, 1))),
        "with 7 images for any number of them: The size of tensor",
    ),
    "transposed with groups": (
        network_of(lambda self, x: self.up(x), up=nn.ConvTranspose2d(CHANNELS, 4, 2, groups=2)),
        "transposed convolution with groups",
    ),
    "data dependent": (network_of(data_dependent), "cannot be captured"),
    "dropout that stays on": (network_of(lambda self, x: F.dropout(x, 0.5)), "draws random numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused(name: str) -> None:
    network, pattern = REFUSED[name]
    message = refusal(network)
    assert re.search(pattern, message), message


@pytest.mark.parametrize("name", ["unknown operator", "padding", "data dependent"])
def test_a_refusal_names_the_line_of_the_users_code(name: str) -> None:
    assert __file__ + ":" in refusal(REFUSED[name][0])


def test_another_input_size_is_refused_with_its_shape() -> None:
    with pytest.raises(UserError, match=r"input of shape \(2, 4, 8, 8\)"):
        capture(NETWORKS["vgg"](), torch.zeros(2, 4, 8, 8))


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match="no convolution or linear layer"):
        place(captured(nn.Sequential(nn.ReLU())), QuantConfig())


def test_calibration_names_the_place_of_a_value_that_is_not_finite() -> None:
    student = insert_quantizers(
        captured(lively(NETWORKS["residual"](), 1)), QuantConfig(4, 4), torch.zeros(2, 3, PIXELS, PIXELS)
    )
    with pytest.raises(UserError, match=r"^x: .*NaN"):
        calibrate(student, [images(1) * float("nan")], "mse")


def test_no_value_of_the_input_is_clipped_however_few_reach_far() -> None:
    x = images(1, 400)
    x[0, 0, 0, 1] = 50.0
    student = insert_quantizers(captured(lively(NETWORKS["residual"](), 1)), QuantConfig(4, 4), x)
    calibrate(student, [x], "mse")
    assert student.quantizers()["x"].scale.item() == pytest.approx(50 / 127)


def test_taps_name_a_student_node_for_every_float_node() -> None:
    traced = captured(NETWORKS["residual"]())
    student = insert_quantizers(traced, QuantConfig(4, 4), torch.zeros(2, 3, PIXELS, PIXELS))
    names = {node.name for node in student.network.graph.nodes}
    assert set(student.taps) == {node.name for node in traced.graph.nodes}
    assert set(student.taps.values()) <= names
    assert isinstance(nodes.with_taps(student.network, [student.taps["block1_relu_1"]]), fx.GraphModule)
