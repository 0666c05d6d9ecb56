"""What torch settles by sizes, and what is made of a network's own tensors: captured, it is the same in few terms."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faqd.errors import UserError
from faqd.quantize import nodes
from faqd.quantize.capture.capture import capture
from faqd.quantize.config import QuantConfig
from faqd.quantize.operators.arithmetic import Scaled
from faqd.quantize.operators.norm import FixedNorm1d, FixedNorm2d
from faqd.quantize.operators.pad import Pad
from faqd.quantize.operators.shape import Constant
from faqd.quantize.placement import place

X = torch.randn(4, 3, 13, 16, generator=torch.Generator().manual_seed(0))


class Around(nn.Module):
    """A layer, what is to be looked at, and a layer; with tensors of its own."""

    grid: Tensor
    filters: Tensor
    factor: Tensor
    offset: Tensor
    mean: Tensor
    var: Tensor

    def __init__(self, between: Callable[[Around, Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(channels, 4, 1), between
        self.up = nn.ConvTranspose2d(8, 8, 3, 2, 1)
        draw = torch.Generator().manual_seed(1)
        self.register_buffer("grid", torch.randn(1, 2, 40, 40, generator=draw))
        self.register_buffer("filters", torch.randn(8, 8, 2, 2, generator=draw))
        self.learned = nn.Parameter(torch.randn(8, generator=draw))
        for name in ("factor", "offset", "mean", "var"):
            self.register_buffer(name, torch.rand(8, generator=draw) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x)))  # type: ignore[no-any-return]


def captured(between: Callable[[Around, Tensor], Tensor], channels: int = 8) -> torch.fx.GraphModule:
    network = Around(between, channels).eval()
    traced = capture(network, X[:2])
    place(traced, QuantConfig(8, 8))
    torch.testing.assert_close(traced(X), network(X), rtol=1e-5, atol=1e-6)
    return traced


def modules(traced: torch.fx.GraphModule, *kinds: type[nn.Module]) -> list[Any]:
    return [module for module in traced.modules() if isinstance(module, kinds)]


POOLS = [
    (kernel, stride, padding, dilation)
    for kernel, stride, padding, dilation in product((1, 2, 3), (2, 3), (0, 1), (1, 2))
    if 2 * padding <= kernel
]


@pytest.mark.parametrize("geometry", POOLS)
def test_a_window_in_the_padding_is_none(geometry: tuple[int, int, int, int]) -> None:
    """What is left of ceil_mode gives every axis that it can one more window: no runtime disagrees about those."""
    kernel, stride, padding, dilation = geometry
    pools: list[Callable[[Around, Tensor], Tensor]] = [
        lambda _, x: F.max_pool2d(x.relu(), kernel, stride, padding, dilation, ceil_mode=True),
        lambda _, x: F.max_pool1d(x.relu()[..., 0], kernel, stride, padding, dilation, ceil_mode=True)[..., None],
    ]
    if dilation == 1:
        pools += [
            lambda _, x: F.avg_pool2d(x.relu(), kernel, stride, padding, ceil_mode=True, count_include_pad=False),
            lambda _, x: F.avg_pool1d(x.relu()[..., 0], kernel, stride, padding, True, False)[..., None],
        ]
    for pool in pools:
        traced = captured(pool)
        (node,) = (n for n in traced.graph.nodes if "pool" in n.name and "_pad" not in n.name)
        before, after = (nodes.shape(n)[2:] for n in (nodes.operand(node), node))
        room = [size + 2 * padding - dilation * (kernel - 1) - 1 for size in before]
        module = nodes.module_of(traced, node)
        kept = module is None or bool(module.ceil_mode)
        assert list(after) == [-(-space // stride) + 1 if kept else space // stride + 1 for space in room]


def test_a_window_more_along_one_axis_alone() -> None:
    traced = captured(lambda _, x: F.max_pool2d(x.relu(), 2, 4, ceil_mode=True))
    (pad,) = modules(traced, Pad)
    assert (pad.widths, pad.mode) == ((0, 0, 0, 1), "replicate")
    for refused in (
        lambda _, x: F.avg_pool2d(x.relu(), 2, 4, ceil_mode=True, count_include_pad=False),
        lambda _, x: F.max_pool2d(x.relu(), 2, 4, dilation=2, ceil_mode=True)[..., :3],
    ):
        with pytest.raises(UserError, match=r"pool2d \(.*test_sized.py:\d+\): ceil_mode gives this pooling"):
            captured(refused)


TOLD: dict[str, Callable[[Around, Tensor], Tensor]] = {
    "a constant": lambda s, x: s.up(x.relu(), [26, 31]),
    "by keyword": lambda s, x: s.up(x.relu(), output_size=(25, 32)),
    "a size": lambda s, x: s.up(x.relu()[..., :7, :8], output_size=x.shape[-2:]),
    "two sizes": lambda s, x: s.up(s.up(x.relu(), [26, 31]).relu(), [52, 61]),
    "unlike sizes": lambda s, x: s.up(s.up(x.relu(), [26, 31]).relu(), [51, 61]),
    "none": lambda s, x: s.up(x.relu(), None),
    "a function": lambda s, x: F.conv_transpose2d(x.relu(), s.filters, None, 2),
}


@pytest.mark.parametrize("how", TOLD)
def test_a_transposed_convolution_has_its_output_padding(how: str) -> None:
    traced = captured(TOLD[how])
    assert all(len(n.args) == 1 and not n.kwargs for n in traced.graph.nodes if nodes.role(traced, n) == "compute")


def test_two_uses_of_a_told_convolution_share_its_weights() -> None:
    (layer,) = modules(captured(TOLD["two sizes"]), nn.ConvTranspose2d)
    assert layer.output_padding == (1, 0)
    first, second = modules(captured(TOLD["unlike sizes"]), nn.ConvTranspose2d)
    assert first.weight is second.weight and (first.output_padding, second.output_padding) == ((1, 0), (0, 0))


PADS = [(-1, 2, -2, 0), (1, -1, 2, -1), (0, -2, 0, -2), (3, -5, -4, 3), (-1, -1, -1, -1)]


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate"])
@pytest.mark.parametrize("pad", PADS)
def test_a_negative_padding_is_a_slice(mode: str, pad: tuple[int, ...]) -> None:
    traced = captured(lambda _, x: F.pad(x.relu(), pad, mode))
    pads = [pad.widths for pad in modules(traced, Pad)]
    assert all(min(widths) >= 0 for widths in pads) and len(pads) == any(width > 0 for width in pad)


CROPS: list[nn.Module] = [
    nn.ZeroPad2d((0, -2, 0, -2)),
    nn.ConstantPad2d((1, -1, 2, -1), 0.0),
    nn.ReflectionPad2d((-1, 1, 2, -2)),
    nn.ReplicationPad2d((-1, 1, 2, -2)),
]


@pytest.mark.parametrize("crop", CROPS, ids=lambda crop: type(crop).__name__)
def test_a_module_that_crops_is_a_slice(crop: nn.Module) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), crop, nn.Conv2d(8, 4, 1)).eval()
    traced = capture(network, X[:2])
    place(traced, QuantConfig(8, 8))
    assert torch.equal(traced(X), network(X)) and not modules(traced, type(crop))


def test_a_padding_by_the_difference_of_two_maps() -> None:
    def between(_: Around, x: Tensor) -> Tensor:
        y = F.interpolate(F.max_pool2d(x.relu(), 2, ceil_mode=True), scale_factor=2)
        down, right = x.shape[2] - y.shape[2], x.shape[3] - y.shape[3]
        return F.pad(y, [right // 2, right - right // 2, down // 2, down - down // 2]) + x.relu()

    captured(between)


JOINED: dict[str, tuple[Callable[[Around, Tensor], Tensor], int]] = {
    "expanded": (lambda s, x: torch.cat([x.relu(), s.grid[..., :13, :16].expand(x.shape[0], -1, -1, -1)], 1), 10),
    "by sizes": (
        lambda s, x: torch.cat([x, s.grid[..., : x.size(2), : x.size(3)].expand(x.size(0), 2, -1, -1)], 1),
        10,
    ),
    "repeated": (lambda s, x: torch.cat([s.grid[..., :13, :16].repeat(x.shape[0], 1, 1, 1), x.relu()], 1), 10),
    "made in forward": (lambda s, x: torch.cat([x.relu(), _coordinates(x)], 1), 10),
}


def _coordinates(x: Tensor) -> Tensor:
    rows, columns = (torch.linspace(-1, 1, x.shape[axis], device=x.device) for axis in (2, 3))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).unsqueeze(0).expand(x.shape[0], -1, -1, -1)


@pytest.mark.parametrize("how", JOINED)
def test_what_is_expanded_to_the_batch_is_a_constant(how: str) -> None:
    between, channels = JOINED[how]
    traced = captured(between, channels)
    assert [tuple(constant.value.shape) for constant in modules(traced, Constant)] == [(1, 2, 13, 16)]


def _scale_and_shift(s: Around) -> tuple[Tensor, Tensor]:
    scale = s.factor * (s.var + 1e-5).rsqrt()
    return scale, s.offset - s.mean * scale


def _moved(value: Tensor) -> Tensor:
    return value.reshape(1, -1, 1, 1)


NORMS: dict[str, Callable[[Around, Tensor], Tensor]] = {
    "scale and shift": lambda s, x: x * _moved(_scale_and_shift(s)[0]) + _moved(_scale_and_shift(s)[1]),
    "by indices": lambda s, x: x * _scale_and_shift(s)[0][None, :, None, None] + s.offset[None, :, None, None],
    "in four steps": lambda s, x: (
        (x - _moved(s.mean)) / _moved((s.var + 1e-5).sqrt()) * _moved(s.factor) + _moved(s.offset)
    ),
    "addcmul": lambda s, x: torch.addcmul(_moved(s.offset), x, _moved(s.factor * (s.var + 1e-5).rsqrt())),
    "addcmul method": lambda s, x: _moved(s.offset).addcmul(x - _moved(s.mean), _moved(_scale_and_shift(s)[0])),
    "words": lambda s, x: torch.add(torch.multiply(x, _moved(s.factor)), _moved(s.offset), alpha=0.5),
    "of parameters": lambda s, x: x * _moved(s.learned * (s.var + 1e-5).rsqrt()) + _moved(s.offset - s.learned),
    "in one step": lambda s, x: _moved(s.factor) * x,
    "function": lambda s, x: F.batch_norm(x, s.mean, s.var, s.factor, s.offset, False, 0.0, 1e-5),
    "function by keywords": lambda s, x: F.batch_norm(
        x, s.mean, s.var, weight=s.learned, training=s.training, eps=1e-3
    ),
    "function without factors": lambda s, x: F.batch_norm(x, s.mean, s.var),
    "torch.batch_norm": lambda s, x: torch.batch_norm(x, s.factor, s.offset, s.mean, s.var, False, 0.1, 1e-5, False),
}


@pytest.mark.parametrize("how", NORMS)
def test_a_frozen_norm_is_a_batch_norm(how: str) -> None:
    traced = captured(lambda s, x: NORMS[how](s, x).relu())
    (norm,) = modules(traced, nn.BatchNorm2d)
    assert not modules(traced, Scaled) and "norm" in {nodes.role(traced, node) for node in traced.graph.nodes}
    trained = [name for name, parameter in norm.named_parameters() if parameter.requires_grad]
    assert trained == (["weight"] if how == "function by keywords" else [])


LEARNED: dict[str, tuple[Callable[[Around, Tensor], Tensor], list[str]]] = {
    "factor and offset": (
        lambda s, x: (x - _moved(s.mean)) / _moved((s.var + 1e-5).sqrt()) * _moved(s.learned) + _moved(s.learned),
        ["weight", "bias"],
    ),
    "factor alone": (lambda s, x: _moved(s.learned) * ((x - _moved(s.mean)) * _moved(s.var)), ["weight"]),
    "offset alone": (lambda s, x: (x * _moved(s.var)) + _moved(s.learned), ["bias"]),
    "addcmul": (
        lambda s, x: torch.addcmul(_moved(s.learned), x * _moved(s.var), _moved(s.learned)),
        ["weight", "bias"],
    ),
}


@pytest.mark.parametrize("how", LEARNED)
def test_a_written_norm_keeps_its_parameters(how: str) -> None:
    forward, trained = LEARNED[how]
    traced = captured(lambda s, x: forward(s, x).relu())
    (norm,) = modules(traced, nn.BatchNorm2d)
    assert not modules(traced, Scaled)
    assert [name for name, parameter in norm.named_parameters() if parameter.requires_grad] == trained


def test_nothing_moves_a_frozen_norm() -> None:
    for kind, shape in ((FixedNorm2d, (4, 2, 3, 3)), (FixedNorm1d, (4, 2))):
        norm = kind(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0]))
        norm.reset_running_stats()
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        before = norm(x)
        assert torch.equal(norm.train()(x + 5)[0], norm.eval()(x + 5)[0]) and torch.equal(norm(x), before)
        torch.testing.assert_close(before[:, 0], 2 * x[:, 0] + 0.5)


def test_a_number_that_is_made_of_parameters_is_no_norm_and_stands_still() -> None:
    (scaled,) = modules(captured(lambda s, x: x * (s.learned.relu().sum() + 1e-4)), Scaled)
    assert not list(scaled.parameters())


def test_weights_that_are_made_of_parameters_are_parameters_of_the_student() -> None:
    traced = captured(lambda s, x: F.conv2d(x, (s.learned * 2).reshape(8, 1, 1, 1), groups=8))
    layer = next(layer for layer in modules(traced, nn.Conv2d) if layer.groups == 8)
    assert isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad


def test_a_learned_factor_behind_a_layer_stays_one() -> None:
    assert len(modules(captured(lambda s, x: (x * _moved(s.learned)).relu()), Scaled)) == 1
