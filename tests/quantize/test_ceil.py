"""Rounding up: one definition in training, reference and lowering, with a shift that the biases carry."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from faqd.calib.ranges import scale_mse
from faqd.deploy.verify.torch_values import as_trained, torch_codes
from faqd.quant import SHIFTS, Quant, activation_quant
from faqd.quantize.config import QuantConfig
from faqd.quantize.convert import convert
from faqd.quantize.operators.arithmetic import Offset
from faqd.quantize.quantizers.activation import ActivationQuantizer, ScaleGradient
from faqd.reference import quantize
from tests.fixtures.networks import CHANNELS, CLASSES, NETWORKS, calibrated, conv, images, lively, undecided
from tests.quantize.test_lowering import failures, lowered

CEIL = SHIFTS["ceil"]
GRIDS = [activation_quant(bits, "tensorrt") for bits in (1, 2, 4, 7, 8)] + [Quant(0, 255)]


def rounding_up(quant: Quant, scale: float, gradient: ScaleGradient = "lsq") -> ActivationQuantizer:
    quantizer = ActivationQuantizer(quant, rectifies=True, rounding="ceil", gradient=gradient)
    quantizer.scale.data.fill_(scale)
    return quantizer


@pytest.mark.parametrize("quant", GRIDS, ids=lambda quant: quant.label)
def test_training_rounds_as_the_reference_does_and_that_is_up(quant: Quant) -> None:
    scale = 0.25
    # Eighths of a scale, and every level itself, where ceil leaves a value as it is.
    u = np.arange(-16, 8 * (quant.high + 2)) / 8
    found = rounding_up(quant, scale)(torch.from_numpy(u * scale).float()) / scale
    assert found.tolist() == quantize(u * scale, scale, quant.low, quant.high, CEIL).tolist()
    assert found.tolist() == np.clip(np.ceil(u), quant.low, quant.high).tolist()


def test_a_sum_of_codes_stays_on_its_level() -> None:
    scales = np.exp(np.random.default_rng(0).uniform(-5, 2, 200)).astype(np.float32)
    quant = Quant(0, 255)
    for scale in scales:
        levels = torch.arange(256) * torch.tensor(scale)
        assert (rounding_up(quant, float(scale))(levels) / scale).round().tolist() == list(range(256))


@pytest.mark.parametrize("form", ["lsq", "mean", "pact", "min"])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_the_gradients_by_their_table(form: ScaleGradient, bits: int) -> None:
    quant, scale = activation_quant(bits, "tensorrt"), 0.1
    generator = torch.Generator().manual_seed(bits)
    x = (torch.randn(4, 3, 5, 5, generator=generator) * quant.high * scale).requires_grad_()
    upstream = torch.randn(x.shape, generator=generator) * 0.02 / quant.high
    quantizer = rounding_up(quant, scale, form)
    quantizer(x).backward(upstream)
    u, g = x.detach().double() / quantizer.scale.detach().double(), upstream.double()
    inside, above = (u >= 0) & (u <= quant.high), u > quant.high
    slopes: dict[str, Tensor | float] = {
        "lsq": (u + CEIL).round().clamp(max=quant.high) - (u + CEIL),
        "mean": 2.0 ** (7 - 1) if bits == 8 else 2.0 ** (bits - 1),
        "pact": 0.0,
        "min": 1.0,
    }
    total = float((g * (inside * slopes[form] + above * float(quant.high))).sum())
    wanted = total / math.sqrt(quant.high * 75) if form == "lsq" else min(1.0, max(-1.0, 0.01 * total))
    assert inside.any() and above.any() and abs(wanted) < 1
    assert x.grad is not None and quantizer.scale.grad is not None
    assert torch.equal(x.grad, upstream * inside)
    assert quantizer.scale.grad.item() == pytest.approx(wanted, rel=1e-4)


def test_a_coarse_gradient_is_cut_off() -> None:
    quantizer = rounding_up(activation_quant(4, "tensorrt"), 0.1, "mean")
    quantizer(torch.rand(100, 100)).backward(torch.ones(100, 100))
    assert quantizer.scale.grad is not None and quantizer.scale.grad.item() == 1.0


@pytest.mark.parametrize(("bits", "scale"), [(1, 0.7979), (2, 0.4861), (4, 0.1670)])
def test_the_first_scale_is_the_best_for_rounding_up(bits: int, scale: float) -> None:
    values = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    assert scale_mse(values, activation_quant(bits, "tensorrt"), CEIL) == pytest.approx(scale, rel=0.02)


class Unshared(nn.Module):
    """No layer can carry the shifts: the sum of two rounded maps, and a convolution that two operators read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.conv1, self.conv2, self.conv3 = conv(3), conv(), conv(), conv()
        self.relu, self.fc = nn.ReLU(), nn.Linear(CHANNELS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv0(x))
        y = self.relu(self.conv1(x))
        x = self.relu(x + y)
        z = self.conv2(x)
        x = self.relu(z) + z
        return self.fc(self.relu(self.conv3(x)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [*NETWORKS, "unshared"])
def test_rounding_up_is_lowered_exactly(name: str) -> None:
    x = images(11, 64, reach=3.0)
    network = Unshared() if name == "unshared" else NETWORKS[name]()
    student = undecided(calibrated(lively(network, 3), QuantConfig(3, 3, rounding="ceil")), x)
    deployed, model = lowered(student, "tensorrt")
    assert failures(deployed, model, x) == []
    trained = as_trained(student, deployed, x)
    assert min(trained["equal_codes_per_layer"].values()) > 0.998
    assert trained["top1_agreement"] == 1.0
    plain = convert(calibrated(lively(network, 3), QuantConfig(3, 3)), "tensorrt")
    ours, theirs = torch_codes(deployed, x), torch_codes(plain, x)
    assert any(np.mean(ours[place] == theirs[place]) < 0.9 for place in ours)
    added = [module for module in deployed.network.modules() if isinstance(module, Offset)]
    assert len(added) == (2 if name == "unshared" else 0)


def test_on_a_residual_the_branch_carries_the_shift() -> None:
    student = calibrated(lively(NETWORKS["residual"](), 3), QuantConfig(4, 4, rounding="ceil"))
    shifted = convert(student, "tensorrt").network
    for quantizer in student.quantizers().values():
        quantizer.shift = 0.0
    plain = convert(student, "tensorrt").network
    moved = {
        name: float((layer.bias - plain.get_submodule(name).bias).mean())
        for name, layer in shifted.named_modules()
        if hasattr(layer, "weight_scale")
    }
    scales = {name: quantizer.scale.item() * CEIL for name, quantizer in student.quantizers().items()}
    assert moved["block1.conv2"] == pytest.approx(scales["block1.relu_1"], rel=1e-4)
    assert moved["fc"] == 0.0
    # With a downsample one of the two layers carries it, not both.
    both = moved["block2.conv2"] + moved["block2.downsample.0"]
    assert both == pytest.approx(scales["block2.relu_1"], rel=1e-4)


def test_the_onnxruntime_flavour_carries_it_too() -> None:
    x = images(11, 64, reach=3.0)
    student = undecided(calibrated(lively(NETWORKS["vgg"](), 3), QuantConfig(3, 3, rounding="ceil")), x)
    deployed, model = lowered(student, "onnxruntime")
    assert failures(deployed, model, x) == []
    assert min(as_trained(student, deployed, x)["equal_codes_per_layer"].values()) > 0.998
