"""Weight quantizers against the least-squares optimum, activation quantizers against exact arithmetic and slopes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight
from torch.nn.utils import parametrize

from faqd.quant import Quant, activation_quant, weight_quant
from faqd.quantize.calibrate import sampled
from faqd.quantize.config import QuantConfig
from faqd.quantize.convert import convert
from faqd.quantize.operators.layer import IntegerLayer
from faqd.quantize.quantizers.activation import ActivationQuantizer
from faqd.quantize.quantizers.weight import WeightQuantizer, _alternate, _exact, _scan, project
from tests.fixtures.networks import Residual, calibrated, images, lively

EXAMPLE = torch.tensor([[0.9, -0.4, 0.05, 0.3, -1.2, 0.1, 0.6, -0.02]])
NORMAL = torch.randn(36, 1024, generator=torch.Generator().manual_seed(0))
NORMAL_ERROR = {1: 0.3634, 2: 0.1902, 3: 0.0469, 4: 0.01289, 5: 0.00369, 6: 0.00107, 7: 0.00031, 8: 0.000088}
"""Relative squared error of the best scale for normally distributed weights."""


def relative_error(weight: Tensor, bits: int, axis: int | None) -> float:
    codes, scale = project(weight, weight_quant(bits, axis))
    return float((weight - codes * scale[:, None]).square().sum() / weight.square().sum())


def converged(scale: float, high: int) -> tuple[Tensor, Tensor]:
    codes, fitted = _alternate(EXAMPLE, torch.tensor([scale]), high)
    return (codes, fitted) if abs(float(fitted) - scale) < 1e-7 else converged(float(fitted), high)


def test_the_worked_example_binary_and_ternary() -> None:
    codes, scale = project(EXAMPLE, weight_quant(1, None))
    assert codes.tolist() == [[1, -1, 1, 1, -1, 1, 1, -1]] and scale.item() == pytest.approx(0.44625)
    codes, scale = project(EXAMPLE, weight_quant(2, None))
    assert codes.tolist() == [[1, 0, 0, 0, -1, 0, 1, 0]] and scale.item() == pytest.approx(0.9)
    assert relative_error(EXAMPLE, 2, None) == pytest.approx(0.1542, abs=1e-4)


@pytest.mark.parametrize(
    ("bits", "scale", "codes"),
    [(3, 0.341667, [3, -1, 0, 1, -3, 0, 2, 0]), (4, 0.160909, [6, -2, 0, 2, -7, 1, 4, 0])],
)
def test_the_worked_example_alternating_from_the_usual_start(bits: int, scale: float, codes: list[int]) -> None:
    found, fitted = converged(2 * 1.2 / (2**bits - 1), 2 ** (bits - 1) - 1)
    assert found.tolist() == [codes] and fitted.item() == pytest.approx(scale, abs=1e-6)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_error_on_normal_weights_is_that_of_the_best_scale(bits: int, axis: int | None) -> None:
    error = relative_error(NORMAL, bits, axis)
    assert error < 1.03 * NORMAL_ERROR[bits]
    # Channels of 1,024 weights lack the tails of a large tensor, which counts most where steps are fine.
    assert error > (0.97 if axis is None else 1 - 0.04 * bits) * NORMAL_ERROR[bits]


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([1, 2, 3, 4]),
    values=st.lists(st.floats(-3, 3, width=32).filter(lambda w: w == 0 or abs(w) > 1e-3), min_size=1, max_size=4),
)
def test_no_codes_at_all_are_better(bits: int, values: list[float]) -> None:
    quant, row = weight_quant(bits, 0), np.array(values)
    levels = [q for q in range(quant.low, quant.high + 1) if q or quant.holds_zero]
    every = np.array(list(itertools.product(levels, repeat=len(row))))
    every = every[np.square(every).sum(1) > 0]
    least = np.square(row).sum() - (np.maximum(every @ row, 0) ** 2 / np.square(every).sum(1)).max()
    codes, scale = project(torch.from_numpy(row)[None], quant)
    assert set(codes.flatten().tolist()) <= set(levels) or not row.any()
    error = float((torch.from_numpy(row) - codes[0] * scale).square().sum())
    assert error == pytest.approx(least, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_the_scan_of_a_large_tensor_is_close_to_its_global_optimum(bits: int) -> None:
    high = weight_quant(bits, None).high
    for rows in (NORMAL.reshape(1, -1), NORMAL.reshape(1, -1).pow(3)):
        errors = [
            float((rows - codes * scale[:, None]).square().sum())
            for codes, scale in (_scan(rows, high), _exact(rows, high))
        ]
        assert errors[1] <= errors[0] * (1 + 1e-6) and errors[0] <= 1.03 * errors[1]


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_slice_of_zeros_gets_zero_codes_and_an_ordinary_scale(bits: int) -> None:
    weight = NORMAL[:4].clone()
    weight[2] = 0
    codes, scale = project(weight, weight_quant(bits, 0))
    assert codes[2].count_nonzero() == 0 and codes[1].count_nonzero() > 0
    assert scale.min() == scale[[0, 1, 3]].min() and scale.max() == scale[[0, 1, 3]].max()
    codes, scale = project(0 * weight, weight_quant(bits, None))
    assert codes.count_nonzero() == 0 and scale.item() > 0


@pytest.mark.parametrize("factor", [1e-4, 0.3, 1.0, 3.0, 1e4])
@pytest.mark.parametrize("bits", [3, 8])
def test_a_warm_start_finds_the_scale_again_after_the_weights_changed(bits: int, factor: float) -> None:
    quant = weight_quant(bits, 0)
    scale = project(NORMAL, quant)[1] * factor
    for _ in range(60):
        codes, scale = project(NORMAL, quant, scale)
    error = float((NORMAL - codes * scale[:, None]).square().sum() / NORMAL.square().sum())
    # One pass per step is slow at 8 bits; what counts is that it does not get stuck.
    assert error < 10 * NORMAL_ERROR[bits]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_weight_gradient_passes_straight_through(bits: int) -> None:
    layer = nn.Conv2d(3, 4, 3)
    parametrize.register_parametrization(layer, "weight", WeightQuantizer(weight_quant(bits, 0), layer.weight.detach()))
    x, upstream = images(1, 2), torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(2))
    layer(x).backward(upstream)
    wanted = conv2d_weight(x, [4, 3, 3, 3], upstream)
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, wanted)  # type: ignore[union-attr]


def test_evaluation_uses_the_codes_that_export_uses() -> None:
    weight = NORMAL[:4]
    quantizer = WeightQuantizer(weight_quant(4, 0), weight)
    quantizer.train()(weight * 1.1)
    quantizer.eval()
    codes, scale = quantizer.codes(weight)
    assert torch.equal(quantizer(weight), codes * scale[:, None])
    assert torch.equal(quantizer(weight), quantizer(weight))


def quantizer_of(quant: Quant, scale: float) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(quant, rectifies=not quant.signed)
    quantizer.scale.data.fill_(scale)
    return quantizer


GRIDS = [activation_quant(bits, "tensorrt") for bits in range(1, 9)] + [Quant(0, 255), Quant(-128, 127)]


@pytest.mark.parametrize("quant", GRIDS, ids=lambda quant: quant.label)
def test_the_forward_is_rounding_half_to_even_and_clipping(quant: Quant) -> None:
    scale = 0.25  # halves of it are exact, so that ties are met
    x = torch.arange(-2 * 256, 2 * 256 + 1) * scale / 2
    wanted = [scale * min(max(round(float(v) / scale), quant.low), quant.high) for v in x]
    found = quantizer_of(quant, scale)(x)
    assert found.tolist() == wanted
    assert len(found.unique()) == quant.high - quant.low + 1


@pytest.mark.parametrize("quant", GRIDS, ids=lambda quant: quant.label)
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_the_gradients_are_those_of_lsq(quant: Quant, mean: float) -> None:
    generator = torch.Generator().manual_seed(3)
    scale = 0.1
    x = torch.randn(4, 8, 32, 32, generator=generator) * quant.high * scale
    upstream = torch.randn(x.shape, generator=generator) + mean
    x.requires_grad_()
    quantizer = quantizer_of(quant, scale)
    quantizer(x).backward(upstream)
    step = quantizer.scale.detach().double()
    u, g = x.detach().double() / step, upstream.double()
    inside = (u >= quant.low) & (u <= quant.high)
    slope = torch.where(inside, u.round() - u, u.clamp(quant.low, quant.high))
    wanted = float((slope * g).sum()) / math.sqrt(quant.high * x[0].numel())
    assert x.grad is not None and quantizer.scale.grad is not None
    assert torch.equal(x.grad, upstream * inside)
    assert quantizer.scale.grad.item() == pytest.approx(wanted, rel=1e-4)


def test_the_scale_gradient_is_the_slope_of_the_loss_where_all_is_clipped() -> None:
    quant, x = activation_quant(4, "tensorrt"), torch.full((2, 3), 9.0)

    def loss(quantizer: ActivationQuantizer) -> Tensor:
        return quantizer(x).square().sum()  # type: ignore[no-any-return]

    quantizer = quantizer_of(quant, 0.25)
    loss(quantizer).backward()
    slope = (loss(quantizer_of(quant, 0.251)).item() - loss(quantizer_of(quant, 0.249)).item()) / 0.002
    assert quantizer.scale.grad is not None
    assert quantizer.scale.grad.item() == pytest.approx(slope / math.sqrt(15 * 3), rel=1e-3)


def test_one_iteration_changes_a_scale_by_a_bounded_share_of_itself() -> None:
    quantizer = quantizer_of(Quant(0, 15), 0.5)
    quantizer(torch.rand(3))
    for moved, step, kept in [(9.0, 0.02, 0.51), (-9.0, 0.02, 0.49), (0.505, 0.02, 0.505), (9.0, None, 9.0)]:
        with torch.no_grad():
            quantizer.scale.fill_(moved)
        quantizer.keep_scale(step)
        assert quantizer.scale.item() == pytest.approx(kept)
    with torch.no_grad():
        quantizer.scale.fill_(-1.0)
    quantizer.keep_scale(None)
    assert 0 < quantizer.scale.item() < 1e-5


def test_a_channels_last_gradient_is_summed_alike() -> None:
    x = images(5, 4, (6, 5, 7)).requires_grad_()
    upstream = images(6, 4, (6, 5, 7))
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        quantizer = quantizer_of(Quant(0, 15), 0.1)
        quantizer(x.contiguous(memory_format=layout)).backward(upstream.contiguous(memory_format=layout))
        assert quantizer.scale.grad is not None
        found.append(quantizer.scale.grad.item())
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_every_scale_of_a_network_learns(bits: int) -> None:
    student = calibrated(lively(Residual(), 1), QuantConfig(4, bits))
    quantizers = student.quantizers()
    before = {name: quantizer.scale.item() for name, quantizer in quantizers.items()}
    reached: dict[str, int] = {}
    for name, quantizer in quantizers.items():
        quantizer.register_forward_hook(lambda module, _, y, n=name: reached.update({n: len(y.unique())}))
    optimizer = torch.optim.SGD(student.network.parameters(), lr=0.1)
    student.network.train()
    (student.network(images(1)) - images(2, 64, (10,))).square().mean().backward()
    optimizer.step()
    for name, quantizer in quantizers.items():
        assert quantizer.scale.grad is not None and quantizer.scale.grad != 0, name
        assert quantizer.scale.item() != before[name], name
        assert 1 < reached[name] <= quantizer.quant.high - quantizer.quant.low + 1, name


def test_the_sample_of_a_large_map_sees_all_its_columns() -> None:
    columns = torch.arange(8.0).expand(64, 32, 64, 8)
    drawn = sampled(columns)
    shares = np.bincount(drawn.astype(int)) / len(drawn)
    assert np.allclose(shares, 1 / 8, atol=0.01)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_what_is_exported_is_what_was_trained_bit_for_bit(bits: int, per_channel: bool) -> None:
    student = calibrated(lively(Residual(), 1), QuantConfig(bits, 4, per_channel=per_channel))
    optimizer = torch.optim.SGD(student.network.parameters(), lr=0.05)
    for step in range(3):
        student.network.train()
        optimizer.zero_grad()
        (student.network(images(step)) - images(9, 64, (10,))).square().mean().backward()
        optimizer.step()
    student.network.eval()
    read_again = calibrated(lively(Residual(), 2), QuantConfig(bits, 4, per_channel=per_channel))
    read_again.network.load_state_dict(student.network.state_dict())
    deployed = convert(read_again, "tensorrt").network
    layers = {name: m for name, m in student.network.named_modules() if parametrize.is_parametrized(m, "weight")}
    for name, module in layers.items():
        layer: Any = module
        exported, quantizer = deployed.get_submodule(name), layer.parametrizations.weight[0]
        codes, scale = quantizer.codes(layer.parametrizations.weight.original)
        assert isinstance(exported, IntegerLayer)
        # A negative batch-norm factor turns the sign of a channel's codes, no more.
        alike = [torch.equal(a, b) or torch.equal(a, -b) for a, b in zip(exported.codes, codes, strict=True)]
        assert all(alike), name
        assert torch.equal(layer.weight, codes * scale.reshape(-1, *[1] * (codes.dim() - 1)))
        assert len(scale) == (len(codes) if per_channel else 1)
    assert isinstance(exported, IntegerLayer)
    assert torch.equal(exported.weight_scale, scale.expand(len(codes)))  # the last layer has no batch norm
    assert torch.equal(student.network(images(7)), read_again.network.eval()(images(7)))
