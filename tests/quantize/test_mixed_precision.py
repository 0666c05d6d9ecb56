"""Which few places stay float, searched together with scales and equalization."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, fx, nn

from faqd.fidelity import KEPT
from faqd.quantize import nodes
from faqd.quantize.capture.capture import capture
from faqd.quantize.config import QuantConfig
from faqd.quantize.mixed_precision import mixed_precision
from faqd.quantize.sensitivity import Trial
from faqd.quantize.without_training import Equalize, Untrained, best_without_training

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SEEN = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


ENOUGH = 0.95


class Sum(nn.Module):
    """What several layers make of one tensor, added."""

    def __init__(self, layers: list[nn.Conv2d]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.layers[0](x)
        for layer in self.layers[1:]:
            total = total + layer(x)
        return total


def bad(tensors: int, readers: int = 1) -> nn.Sequential:
    """Has tensors of which one channel is ten thousand times as large as those that the outputs live on; each is read
    by so many layers, `bad0.layers.0` and on."""
    torch.manual_seed(0)
    network = nn.Sequential()
    network.add_module("first", nn.Conv2d(3, 8, 3))
    for index in range(tensors):
        wide, narrow = nn.Conv2d(8, 8, 1), [nn.Conv2d(8, 8, 1) for _ in range(readers)]
        with torch.no_grad():
            wide.weight[0] = 1e4 * wide.weight[0].abs()  # behind a ReLU, so never negative
            for layer in narrow:
                layer.weight[:, 0] *= 1e-4
        parts = {"relu": nn.ReLU(), "wide": wide, "rectified": nn.ReLU(), "bad": Sum(narrow)}
        for name, module in parts.items():
            network.add_module(f"{name}{index}", module)
    for name, module in {"last": nn.ReLU(), "flat": nn.Flatten(), "head": nn.Linear(8 * 36, 5)}.items():
        network.add_module(name, module)
    return network


def searched(
    network: nn.Module, most: int, enough: float = KEPT, bits: QuantConfig | None = None
) -> tuple[Untrained, list[Trial], fx.GraphModule]:
    trials: list[Trial] = []
    traced = capture(network.eval(), X[:2])

    def best_of(config: QuantConfig, equalize: Equalize) -> Untrained:
        return best_without_training(traced, config, [X], SEEN, "auto", equalize, enough=enough)

    best = mixed_precision(best_of, bits or QuantConfig(), "never", [X], SEEN, most, enough, trials.append)
    return best, trials, traced


def floats_of(best: Untrained, traced: fx.GraphModule) -> set[str]:
    names = nodes.places(traced).values()
    return {name for name in names for pattern in best.student.config.exclude if re.search(pattern, name)}


@pytest.mark.parametrize(
    ("tensors", "readers", "most", "floats", "cured"),
    [
        (0, 1, 3, set(), True),
        (1, 1, 3, {"bad0.layers.0"}, True),
        (2, 1, 3, {"bad0.layers.0", "bad1.layers.0"}, True),
        (1, 2, 3, {"bad0.layers.0", "bad0.layers.1"}, True),
        (2, 1, 1, None, False),
        (1, 2, 1, None, False),
        (1, 1, 0, set(), False),
    ],
)
def test_the_fewest_that_cure_it(tensors: int, readers: int, most: int, floats: set[str] | None, cured: bool) -> None:
    best, trials, traced = searched(bad(tensors, readers), most, ENOUGH)
    found = floats_of(best, traced)
    assert len(found) <= most and (floats is None or found == floats)
    assert (best.fidelity >= ENOUGH) == cured
    assert best.fidelity == max(trial.fidelity for trial in trials) and trials[0].exclude == ""
    assert all(trial.floats <= most for trial in trials)


def test_a_place_that_others_made_needless_is_rounded_again() -> None:
    """Where a rounding costs most alone, but nothing beside those that come after it."""
    best, trials, traced = searched(bad(2), 3, ENOUGH)
    assert best.fidelity >= ENOUGH
    assert len(floats_of(best, traced)) == min(trial.floats for trial in trials if trial.fidelity >= ENOUGH)


def test_what_the_user_keeps_float_stays_so_and_does_not_count() -> None:
    best, trials, traced = searched(bad(1), 1, bits=QuantConfig(exclude=("^first$",)))
    assert floats_of(best, traced) == {"first", "bad0.layers.0"} and best.fidelity >= KEPT
    assert trials[-1].floats == 1 and trials[-1].exclude == r"^bad0\.layers\.0$"


def test_it_searches_the_same_way_twice() -> None:
    network = bad(2)
    first, second = (searched(network, 2) for _ in range(2))
    assert first[1] == second[1] and first[0].distance == second[0].distance
