"""Layers kept float, and modules with more to them than their class says: deployed as they are, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from faqd.deploy.export.float16 import float16_from_float32
from faqd.deploy.export.torch_to_onnx import onnx_from_deployed
from faqd.deploy.onnx_model.session import OnnxSession
from faqd.deploy.verify.float16 import _multiplies_floats
from faqd.deploy.verify.layers import verify_file
from faqd.deploy.verify.outputs import compare_outputs
from faqd.deploy.verify.segments import segments
from faqd.deploy.verify.torch_values import torch_digests
from faqd.quantize.config import QuantConfig
from faqd.quantize.convert import collect_output_scales, convert
from tests.fixtures.networks import calibrated, float_file_db, images, lively

SHAPE = (3, 16, 16)
FIRST_FLOAT = QuantConfig(8, 8, exclude=("^0$",))


def net(first: nn.Module) -> nn.Sequential:
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(8, 4, 1))


def conv(padding_mode: Any) -> nn.Conv2d:
    return nn.Conv2d(3, 8, 3, padding=1, padding_mode=padding_mode)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_an_excluded_convolution_keeps_its_padding(mode: str) -> None:
    network = lively(net(conv(mode)), 1)
    check(network)


def test_a_bias_that_is_next_to_nothing_is_nothing_in_both_files() -> None:
    network = lively(net(conv("zeros")), 1)
    layer = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        assert layer.bias is not None
        layer.bias[:3] = torch.tensor([1e-40, -3e-38, 1e-33])
        layer.weight[:3] = 0
    check(network)


def check(network: nn.Module, bits: QuantConfig = FIRST_FLOAT) -> None:
    """Both flavours are proved, and stay near the float network."""
    x = images(3, 16, SHAPE)
    student = calibrated(network, bits, shape=SHAPE)
    scales = collect_output_scales(student, [images(0, 16, SHAPE)])
    wanted = {"out": network.eval()(x).detach().numpy()}
    for flavour in ("tensorrt", "onnxruntime"):
        deployed = convert(student, flavour, scales)
        model = onnx_from_deployed(deployed, x, {})
        assert verify_file(model, x.numpy(), torch_digests(deployed, x), [False])["failures"] == []
        (found,) = OnnxSession(model.SerializeToString()).run({"input": x.numpy()}).values()
        assert compare_outputs({"out": found}, wanted)["snr_db"]["out"] > 30
    unquantized = onnx_from_deployed(convert(student, "float"), x, {}).SerializeToString()
    assert min(float_file_db(unquantized, student, x).values()) > 100


def tripled(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * 3


HOOKS: dict[str, Callable[[nn.Module], object]] = {
    "behind": lambda layer: layer.register_forward_hook(tripled),
    "before": lambda layer: layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 0.1,)),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("bits", [FIRST_FLOAT, QuantConfig(8, 8)], ids=["excluded", "quantized"])
def test_what_a_hook_computes_is_a_part_of_the_network(kind: str, bits: QuantConfig) -> None:
    network = net(conv("zeros"))
    HOOKS[kind](network[0])
    check(network, bits)


COMPUTED: tuple[Callable[[nn.Module], nn.Module], ...] = (
    nn.utils.weight_norm,
    nn.utils.spectral_norm,
    parametrizations.weight_norm,
    parametrizations.spectral_norm,
)


@pytest.mark.parametrize("norm", COMPUTED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("bits", [FIRST_FLOAT, QuantConfig(8, 8)], ids=["excluded", "quantized"])
def test_weights_that_are_computed_are_those_of_a_layer(
    norm: Callable[[nn.Module], nn.Module], bits: QuantConfig
) -> None:
    check(net(norm(conv("zeros"))), bits)


def test_which_layers_of_an_fp16_file_multiply_floats() -> None:
    student = calibrated(net(conv("zeros")), FIRST_FLOAT, shape=SHAPE)
    model = onnx_from_deployed(convert(student, "tensorrt"), images(3, 2, SHAPE), {})
    for file in (model, float16_from_float32(model)):
        found = {segment.layer: _multiplies_floats(segment) for segment in segments(file)}
        assert len(found) >= 2 and [layer for layer, floats in found.items() if floats] == [next(iter(found))]
