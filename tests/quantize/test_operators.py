"""Every row of the tables of operators: captured under every name that torch has for it, and proved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload

from faqd.deploy.export.torch_to_onnx import onnx_from_deployed
from faqd.deploy.verify.layers import verify_file
from faqd.deploy.verify.torch_values import torch_digests
from faqd.quantize import nodes
from faqd.quantize.capture.aten import base_name
from faqd.quantize.capture.capture import capture
from faqd.quantize.config import QuantConfig
from faqd.quantize.convert import collect_output_scales, convert
from faqd.quantize.operators.registry import OPERATORS, RULES
from tests.fixtures.networks import calibrated, images, lively

SHAPE = (3, 8, 8)
aten = torch.ops.aten


class Around(nn.Module):
    """A convolution, the operator on its map (N, 8, 8, 8) of both signs, and a layer that reads the result."""

    def __init__(self, operator: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.operator = operator
        self.first, self.norm, self.up = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ConvTranspose2d(8, 8, 2, 2),
        )
        self.weight, self.bias = nn.Parameter(0.3 * torch.randn(8, 8)), nn.Parameter(0.1 * torch.randn(8))
        self.slopes = nn.Parameter(torch.full((8,), 0.2))
        self.register_buffer("grid", torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8))
        self.last = nn.LazyConv2d(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.operator(self, self.first(x))
        y = y if y.dim() == 4 else y[:, :, None, None] if y.dim() == 2 else y.unsqueeze(-1)
        return self.last(y)  # type: ignore[no-any-return]


def rows(x: Tensor) -> Tensor:
    """(N, 8, 64)"""
    return x.relu().flatten(2)


def square(x: Tensor) -> Tensor:
    return x.relu().mean((2, 3))


Case = Callable[[Any, Tensor], Tensor]
CASES: dict[str, Case] = {
    "conv1d": lambda s, x: F.conv1d(rows(x), s.weight[:, :, None]),
    "conv2d": lambda s, x: F.conv2d(x.relu(), s.weight.reshape(8, 8, 1, 1), s.bias),
    "conv_transpose1d": lambda s, x: F.conv_transpose1d(rows(x), s.weight[:, :, None], stride=2),
    "conv_transpose2d": lambda s, x: s.up(x.relu()),
    "linear": lambda s, x: F.linear(square(x), s.weight, s.bias),
    "matmul": lambda s, x: torch.matmul(square(x), s.weight),
    "mm": lambda s, x: torch.mm(square(x), s.weight.t()),
    "addmm": lambda s, x: torch.addmm(s.bias, square(x), s.weight),
    "batch_norm": lambda s, x: s.norm(x.relu()),
    "_native_batch_norm_legit_no_training": lambda s, x: aten._native_batch_norm_legit_no_training(
        x.relu(), s.norm.weight, s.norm.bias, s.norm.running_mean, s.norm.running_var, 0.1, 1e-5
    )[0],
    "relu": lambda s, x: x.relu(),
    "leaky_relu": lambda s, x: F.leaky_relu(x, 0.1),
    "prelu": lambda s, x: F.prelu(x, s.slopes),
    "elu": lambda s, x: F.elu(x, 0.7),
    "silu": lambda s, x: F.silu(x),
    "hardswish": lambda s, x: F.hardswish(x),
    "sigmoid": lambda s, x: x.sigmoid(),
    "special_expit": lambda s, x: torch.special.expit(x),
    "hardsigmoid": lambda s, x: F.hardsigmoid(x),
    "softplus": lambda s, x: F.softplus(x),
    "gelu": lambda s, x: F.gelu(x),
    "tanh": lambda s, x: x.tanh(),
    "relu6": lambda s, x: F.relu6(x),
    "hardtanh": lambda s, x: F.hardtanh(x, -0.5, 1.5),
    "clamp": lambda s, x: x.clamp(-1, 2),
    "clip": lambda s, x: torch.clip(x, 0, 3),
    "clamp_min": lambda s, x: torch.clamp_min(x, 0),
    "add": lambda s, x: torch.add(x.relu(), x, alpha=2),
    "sub": lambda s, x: x.relu() - x,
    "subtract": lambda s, x: torch.subtract(x.relu(), x),
    "rsub": lambda s, x: 1.5 - x,
    "addcmul": lambda s, x: torch.addcmul(x, x.relu(), x.sigmoid()),
    "addcdiv": lambda s, x: torch.addcdiv(x.relu(), x, s.grid + 2),
    "lerp": lambda s, x: torch.lerp(x.relu(), x, 0.25),
    "mul": lambda s, x: x.relu() * x.sigmoid(),
    "multiply": lambda s, x: torch.multiply(x, s.bias.reshape(8, 1, 1)),
    "div": lambda s, x: x / 3,
    "divide": lambda s, x: torch.divide(x, 3),
    "true_divide": lambda s, x: torch.true_divide(x, s.grid + 2),
    "square": lambda s, x: torch.square(x),
    "pow": lambda s, x: x**2,
    "neg": lambda s, x: -x,
    "negative": lambda s, x: torch.negative(x),
    "max_pool1d": lambda s, x: aten.max_pool1d(rows(x), 2),
    "max_pool1d_with_indices": lambda s, x: aten.max_pool1d_with_indices(rows(x), 2)[0],
    "max_pool2d": lambda s, x: F.max_pool2d(x.relu(), 3, 2, 1),
    "max_pool2d_with_indices": lambda s, x: aten.max_pool2d_with_indices(x.relu(), 2)[0],
    "adaptive_max_pool1d": lambda s, x: F.adaptive_max_pool1d(rows(x), 4),
    "adaptive_max_pool2d": lambda s, x: F.adaptive_max_pool2d(x.relu(), 2),
    "avg_pool1d": lambda s, x: F.avg_pool1d(rows(x), 4),
    "avg_pool2d": lambda s, x: F.avg_pool2d(x.relu(), 2),
    "adaptive_avg_pool1d": lambda s, x: F.adaptive_avg_pool1d(rows(x), 1),
    "adaptive_avg_pool2d": lambda s, x: F.adaptive_avg_pool2d(x.relu(), 4),
    "mean": lambda s, x: x.relu().mean((2, 3), keepdim=True),
    "sum": lambda s, x: x.relu().sum((2, 3), keepdim=True),
    "upsample_nearest1d": lambda s, x: F.interpolate(rows(x), scale_factor=2),
    "upsample_nearest2d": lambda s, x: F.interpolate(x.relu(), scale_factor=2),
    "_upsample_nearest_exact1d": lambda s, x: F.interpolate(rows(x), scale_factor=3, mode="nearest-exact"),
    "_upsample_nearest_exact2d": lambda s, x: F.interpolate(x.relu(), size=(24, 16), mode="nearest-exact"),
    "upsample_bilinear2d": lambda s, x: F.interpolate(x.relu(), size=(12, 10), mode="bilinear"),
    "cat": lambda s, x: torch.cat([x.relu(), x], 1),
    "concat": lambda s, x: torch.concat([x.relu(), x], 1),
    "concatenate": lambda s, x: torch.concatenate([x.relu(), x], 1),
    "stack": lambda s, x: torch.stack([x.relu(), x], 2).flatten(1, 2),
    "slice_scatter": lambda s, x: torch.slice_scatter(x.relu(), x[:, 2:4], 1, 3, 5),
    "flatten": lambda s, x: x.relu().flatten(1),
    "unflatten": lambda s, x: x.relu().unflatten(1, (4, 2)).flatten(2, 3),
    "view": lambda s, x: x.relu().view(x.shape[0], 4, 16, 8),
    "_unsafe_view": lambda s, x: aten._unsafe_view(x.relu(), [x.shape[0], 4, 16, 8]),
    "reshape": lambda s, x: x.relu().reshape(-1, 4, 16, 8),
    "view_as": lambda s, x: aten.view_as(x.relu(), x),
    "reshape_as": lambda s, x: aten.reshape_as(x.relu(), x),
    "squeeze": lambda s, x: x.relu().mean(3, keepdim=True).squeeze(3),
    "unsqueeze": lambda s, x: x.relu().unsqueeze(2).flatten(2, 3),
    "permute": lambda s, x: x.relu().permute(0, 2, 3, 1),
    "transpose": lambda s, x: x.relu().transpose(1, 3),
    "t": lambda s, x: torch.mm(square(x), s.weight.t()),
    "swapaxes": lambda s, x: torch.swapaxes(x.relu(), 1, 2),
    "swapdims": lambda s, x: torch.swapdims(x.relu(), 2, 3),
    "numpy_T": lambda s, x: torch.mm(square(x), aten.numpy_T(s.weight)),
    "chunk": lambda s, x: torch.cat(x.relu().chunk(2, 1)[::-1], 1),
    "unsafe_chunk": lambda s, x: torch.cat(aten.unsafe_chunk(x.relu(), 2, 1)[::-1], 1),
    "split": lambda s, x: torch.cat(x.relu().split(3, 1)[::-1], 1),
    "unsafe_split": lambda s, x: torch.cat(aten.unsafe_split(x.relu(), 3, 1)[::-1], 1),
    "split_with_sizes": lambda s, x: torch.cat(torch.split(x.relu(), [3, 5], 1)[::-1], 1),
    "tensor_split": lambda s, x: torch.cat(aten.tensor_split(x.relu(), 3, 1)[::-1], 1),
    "unbind": lambda s, x: torch.cat([each.unsqueeze(1) for each in x.relu().unbind(1)[::-1]], 1),
    "slice": lambda s, x: x.relu()[:, 1:7:2],
    "select": lambda s, x: x.relu()[:, :, 1],
    "narrow": lambda s, x: x.relu().narrow(1, 2, 4),
    "pad": lambda s, x: F.pad(x.relu(), (1, 0, 2, 1), "reflect"),
    "constant_pad_nd": lambda s, x: aten.constant_pad_nd(x.relu(), [1, 1], 0.0),
    "reflection_pad1d": lambda s, x: aten.reflection_pad1d(rows(x), [1, 2]),
    "reflection_pad2d": lambda s, x: aten.reflection_pad2d(x.relu(), [1, 2, 0, 1]),
    "replication_pad1d": lambda s, x: aten.replication_pad1d(rows(x), [1, 2]),
    "replication_pad2d": lambda s, x: aten.replication_pad2d(x.relu(), [1, 2, 0, 1]),
    "channel_shuffle": lambda s, x: aten.channel_shuffle(x.relu(), 2),
    "pixel_shuffle": lambda s, x: F.pixel_shuffle(x.relu(), 2),
    "pixel_unshuffle": lambda s, x: F.pixel_unshuffle(x.relu(), 2),
    "copy": lambda s, x: aten.copy(x, x.relu()),
    "expand": lambda s, x: x * x.mean((2, 3), keepdim=True).expand(-1, -1, 8, 8),
    "expand_as": lambda s, x: x * x.mean((2, 3), keepdim=True).expand_as(x),
    "broadcast_to": lambda s, x: x * torch.broadcast_to(x.mean((2, 3), keepdim=True), x.shape),
    "repeat": lambda s, x: x * x.mean((2, 3), keepdim=True).repeat(1, 1, 8, 8),
    "type_as": lambda s, x: x.relu() + torch.arange(8).type_as(x),
    "new_full": lambda s, x: x.relu() + x.new_full((8, 1), 0.5),
    "new_zeros": lambda s, x: torch.cat([x.relu() + x.new_zeros(8, 8), x], 1),
    "new_ones": lambda s, x: x.relu() * x.new_ones(8, 1),
    "full_like": lambda s, x: x.relu() + torch.full_like(s.grid, 2.0),
    "zeros_like": lambda s, x: x.relu() + torch.zeros_like(s.grid),
    "ones_like": lambda s, x: x.relu() * torch.ones_like(s.grid),
    "sym_size": lambda s, x: torch.cat([x.relu(), s.grid.expand(x.shape[0], 1, 8, 8)], 1),
}
"""By the name of torch's operator."""


def around(case: Case) -> nn.Module:
    torch.manual_seed(0)
    network = Around(case)
    network(torch.zeros(2, *SHAPE))
    return lively(network, 1)


def operators_of(network: nn.Module) -> set[str]:
    shapes = {"x": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(network.eval(), (torch.zeros(2, *SHAPE),), dynamic_shapes=shapes)
    return {base_name(node.target) for node in program.graph.nodes if isinstance(node.target, OpOverload)}


def test_every_name_has_a_case() -> None:
    floats = {name for row in OPERATORS if row.role == "other" for name in row.spellings}  # in test_islands.py
    assert set(CASES) == set(RULES) - floats


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_what_torch_calls_so_is_known(name: str) -> None:
    network = around(CASES[name])
    decomposed = name in ("copy", "_native_batch_norm_legit_no_training")
    assert decomposed or name in operators_of(network)
    traced = capture(network, torch.zeros(2, *SHAPE))
    asked = [node for node in traced.graph.nodes if nodes.is_tensor(node) and not nodes.is_own(node)]
    assert all(nodes.role(traced, node) != "other" for node in asked)
    x = images(2, 5, SHAPE)
    torch.testing.assert_close(traced(x), network(x), rtol=1e-5, atol=1e-5)


ROWS = {next(iter(row.spellings)): row for row in OPERATORS if row.spellings and row.role != "other"}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.filterwarnings("ignore")
def test_the_operator_of_a_row_is_lowered_and_proved(name: str) -> None:
    x = images(3, 8, SHAPE)
    network = around(CASES[name])
    traced = capture(network, x)
    assert any(nodes.row_of(traced, node) is ROWS[name] for node in traced.graph.nodes if node.op.startswith("call"))
    student = calibrated(network, QuantConfig(8, 8), shape=SHAPE)
    scales = collect_output_scales(student, [images(0, 16, SHAPE)])
    for flavour, modes in (("tensorrt", [False]), ("onnxruntime", [False, True])):
        deployed = convert(student, flavour, scales)  # type: ignore[arg-type]
        model = onnx_from_deployed(deployed, x, {})
        assert verify_file(model, x.numpy(), torch_digests(deployed, x), modes)["failures"] == []
