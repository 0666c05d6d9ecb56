"""Layers kept float, and modules with more to them than their class says: deployed as they are, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
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
from faqd.errors import UserError
from faqd.quantize.config import QuantConfig
from faqd.quantize.convert import collect_output_scales, convert
from tests.networks import calibrated, float_file_db, images, lively

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


def test_an_excluded_layer_keeps_the_weights_that_it_computes() -> None:
    check(net(parametrizations.weight_norm(nn.Conv2d(3, 8, 3))))


def check(network: nn.Module) -> None:
    """Both flavours are proved, and stay near the float network."""
    x = images(3, 16, SHAPE)
    student = calibrated(network, FIRST_FLOAT, shape=SHAPE)
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


HOOKS: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "behind": (lambda layer: layer.register_forward_hook(tripled), "tripled"),
    "before": (lambda layer: layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 0.1,)), "lambda"),
    "weight_norm": (nn.utils.weight_norm, "WeightNorm"),
    "spectral_norm": (nn.utils.spectral_norm, "SpectralNorm"),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("bits", [FIRST_FLOAT, QuantConfig(8, 8)], ids=["excluded", "quantized"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_module_with_a_hook_is_refused_by_name(kind: str, bits: QuantConfig) -> None:
    network = net(conv("zeros"))
    hook, name = HOOKS[kind]
    hook(network[0])
    with pytest.raises(UserError, match=rf"^0.*: has a forward hook, .*{name}"):
        calibrated(network, bits, shape=SHAPE)


def test_what_the_lowering_forgot_shows_in_the_float_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faqd.quantize.prepare._refuse_hooks", lambda network: None)
    network = net(conv("zeros"))
    network[0].register_forward_hook(tripled)
    student = calibrated(network, QuantConfig(8, 8), shape=SHAPE)
    x = images(3, 16, SHAPE)
    model = onnx_from_deployed(convert(student, "float"), x, {}).SerializeToString()
    assert max(float_file_db(model, student, x).values()) < 20


def test_which_layers_of_an_fp16_file_multiply_floats() -> None:
    student = calibrated(net(conv("zeros")), FIRST_FLOAT, shape=SHAPE)
    model = onnx_from_deployed(convert(student, "tensorrt"), images(3, 2, SHAPE), {})
    for file in (model, float16_from_float32(model)):
        found = {segment.layer: _multiplies_floats(segment) for segment in segments(file)}
        assert len(found) >= 2 and [layer for layer, floats in found.items() if floats] == [next(iter(found))]
