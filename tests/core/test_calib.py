"""Scales from observed values: each method on distributions whose answer is known."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from faqd.calib.ranges import METHODS, Method, scale_entropy, scale_from, scale_max, scale_mse, scale_percentile
from faqd.quant import Quant, activation_quant, weight_quant

QUANTILES = np.array([NormalDist().inv_cdf((i + 0.5) / 100_000) for i in range(100_000)], np.float32)
"""A unit normal without chance."""
BEST_SCALE = {1: 1.2240, 2: 0.6508, 3: 0.3534, 4: 0.1932, 5: 0.1055, 6: 0.0573, 7: 0.0309}
"""Of the rectified unit normal, by bits."""
BEST_ERROR = {1: 0.190, 2: 0.0469, 3: 0.0129, 4: 0.0037, 5: 0.0011, 6: 0.00031, 7: 0.000088}


@pytest.mark.parametrize("bits", BEST_SCALE)
def test_mse_finds_the_best_scale_of_a_normal_distribution(bits: int) -> None:
    quant = activation_quant(bits, "tensorrt")
    scale = scale_mse(QUANTILES, quant)
    assert scale == pytest.approx(BEST_SCALE[bits], rel=0.01)
    wanted = np.maximum(QUANTILES, 0)
    rounded = np.clip(np.rint(wanted / scale), quant.low, quant.high) * scale
    assert np.square(rounded - wanted).sum() / np.square(wanted).sum() == pytest.approx(BEST_ERROR[bits], rel=0.05)


def test_max_clips_nothing() -> None:
    values = np.array([-6.35, 0.1, 2.54], np.float32)
    assert scale_max(values, Quant(-128, 127)) == pytest.approx(0.05)
    assert scale_max(values, Quant(0, 127)) == pytest.approx(0.02)


def test_percentile_clips_its_share() -> None:
    values = np.linspace(-1, 1, 20_001, dtype=np.float32)
    assert scale_percentile(values, Quant(0, 15), 90) == pytest.approx(0.9 / 15, rel=1e-3)
    assert scale_percentile(values, weight_quant(8, None), 50) == pytest.approx(0.5 / 127, rel=1e-3)


def test_entropy_keeps_a_uniform_range_whole_and_cuts_a_lone_outlier() -> None:
    uniform = np.linspace(0.001, 1, 50_000, dtype=np.float32)
    assert scale_entropy(uniform, Quant(0, 15)) == pytest.approx(1 / 15, rel=0.05)
    with_outlier = np.append(np.abs(QUANTILES), np.float32(100))
    assert scale_entropy(with_outlier, Quant(0, 127)) * 127 < 50


@pytest.mark.parametrize("values", [np.zeros(100), np.full(100, -1.0), np.full(100, 1e-42), np.zeros(0)])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_above_zero_still_gives_a_scale_that_float32_can_hold(method: Method, values: NDArray[Any]) -> None:
    assert np.float32(scale_from(values.astype(np.float32), Quant(0, 15), method)) >= np.finfo(np.float32).tiny


@pytest.mark.parametrize("method", METHODS)
def test_a_signed_grid_sees_negative_values(method: Method) -> None:
    assert scale_from(-np.abs(QUANTILES), Quant(-128, 127), method) < 0.05
