"""What a schedule leaves open, the rate over a run, and terms that count by their share of what they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from faqd.train.loop.accumulate import backward
from faqd.train.loop.batches import Batch
from faqd.train.loop.distributed import ProcessGroup
from faqd.train.loop.trainer import _rate
from faqd.train.recipes import Training, open_training, relative_rate, usual_training


@pytest.mark.parametrize(
    ("training", "scratch", "pixels", "wanted"),
    [
        (open_training(20), False, 32**2, {"optimizer": "relative", "lr": None, "frozen_norm": 1.0, "batch_size": 100}),
        (open_training(20), True, 32**2, {"optimizer": "sgd", "lr": 0.05, "warmup": 0.0, "frozen_norm": 0.1}),
        (open_training(20), False, 224**2, {"batch_size": 20}),
        (open_training(20), False, 416**2, {"batch_size": 8}),
        (open_training(20, 64), False, 416**2, {"batch_size": 64}),
        (replace(open_training(20), optimizer="sgd"), False, 32**2, {"lr": 0.002, "warmup": 0.0, "frozen_norm": 1.0}),
        (replace(open_training(20), lr=0.1), False, 32**2, {"lr": 0.1, "warmup": 0.05}),
        (Training(3, 16, 0.01), True, 32**2, {"optimizer": "sgd", "lr": 0.01, "frozen_norm": 0.1, "batch_size": 16}),
    ],
)
def test_what_is_left_open_follows_from_the_start(
    training: Training, scratch: bool, pixels: int, wanted: dict[str, Any]
) -> None:
    found = usual_training(training, scratch, pixels)
    assert {name: getattr(found, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("distance", "bits", "rate"), [(0.25, 8, 1e-3), (4.0, 8, 2e-3), (0.0, 8, 2e-5), (0.25, 4, 2.5e-3), (3.0, 1, 1e-2)]
)
def test_who_is_far_steps_farther(distance: float, bits: int, rate: float) -> None:
    assert relative_rate(distance, bits) == pytest.approx(rate)


@pytest.mark.parametrize("total", [1, 3, 20, 200])
def test_a_warm_up_never_passes_the_peak(total: int) -> None:
    training = Training(1, 16, 0.1, warmup=0.05)
    rates = [_rate(training, iteration, total) for iteration in range(total)]
    assert max(rates) == pytest.approx(0.1) and rates[-1] == min(rates[-1:] + rates[total // 2 :])


def test_balanced_terms_count_alike_whatever_their_units() -> None:
    def gradient(units: float, balanced: dict[str, float], at: tuple[float, ...] = (0.5, 2.0, 3.0, 4.0)) -> list[float]:
        x = nn.Parameter(torch.tensor(at))

        def losses_of(_: Batch) -> dict[str, Tensor]:
            return {"logit a": units * x[0] ** 2, "logit b": units * x[1] ** 2, "affinity": x[2], "label": x[3] ** 2}

        whole = [Batch(x, None, None)]
        backward(whole, losses_of, nn.ParameterList([x]), balanced, lambda loss: loss, ProcessGroup())
        assert x.grad is not None
        found: list[float] = x.grad.tolist()
        return found

    balanced = {"logit": 1.0, "affinity": 2.0}
    # 2 x / (0.25 + 4) of the two outputs together, 2 / 3 of the affinity; a label has units of its own.
    wanted = [1 / 4.25, 4 / 4.25, 2 / 3, 8.0]
    assert [gradient(units, balanced) for units in (1, 1000)] == [pytest.approx(wanted)] * 2
    assert gradient(2, {}) == pytest.approx([2, 8, 1, 8])
    assert gradient(1, {"logit": 1.0}, (0.0, 0.0, 3.0, 4.0))[:2] == [0, 0]
