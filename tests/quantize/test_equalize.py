"""Equalization: exact in float, folded where it can be, and never where something else reads the channels."""

from __future__ import annotations

from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from faqd.quantize.capture.capture import capture
from faqd.quantize.config import QuantConfig
from faqd.quantize.equalize import Equalized, equalized
from faqd.quantize.exponents import LARGEST
from faqd.quantize.without_training import CalibrationMethod, Equalize, Untrained, best_without_training

X = torch.randn(12, 3, 10, 10, generator=torch.Generator().manual_seed(0))
SEEN = torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(1))
EIGHT = QuantConfig()


Layer = TypeVar("Layer", nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def uneven(layer: Layer, factor: float = 50.0) -> Layer:
    """The first output channel is `factor` times as large as the others."""
    with torch.no_grad():
        weight = layer.weight
        weight[0 if not isinstance(layer, nn.ConvTranspose2d) else slice(None), :1] *= factor
        if not isinstance(layer, nn.ConvTranspose2d):
            weight[0] *= factor
    return layer


class Forked(nn.Module):
    """Two tensors of a shared scale, joined, pooled, and read by a depthwise and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = uneven(nn.Conv2d(3, 4, 1)), nn.Conv2d(3, 4, 3, padding=1)
        self.relu, self.silu, self.pool = nn.ReLU(), nn.SiLU(), nn.MaxPool2d(2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.dense = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        both = self.pool(torch.cat((self.relu(self.a(x)), self.silu(self.b(x))), 1))
        return self.depthwise(both), self.dense(both)


class Residual(nn.Module):
    """The channels of `a` are added to others and cannot be multiplied; those of the sum can."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = uneven(nn.Conv2d(3, 4, 1)), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu(self.a(x))
        found: Tensor = self.c(a + self.b(a))
        return found


class Twice(nn.Module):
    """One layer reads two tensors: it cannot be divided for either."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = uneven(nn.Conv2d(3, 4, 1)), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.relu, self.silu = nn.ReLU(), nn.SiLU()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.silu(self.a(x))), self.head(self.relu(self.b(x)))


class Tied(Twice):
    """The same, as two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(4, 4, 1)
        self.other.weight = self.head.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.silu(self.a(x))), self.other(self.relu(self.b(x)))


class TiedProducers(Twice):
    """What makes a tensor makes another one too, which nobody multiplies: a product stands behind the first."""

    def __init__(self) -> None:
        super().__init__()
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.relu(self.a(x))), self.b(x)


class Gated(nn.Module):
    """Squeeze and excite: an average and a product read the channels, `wrong` in a way that no factor goes through."""

    def __init__(self, activation: nn.Module, wrong: str = "") -> None:
        super().__init__()
        self.a, self.act, self.wrong = uneven(nn.Conv2d(3, 8, 3)), activation, wrong
        self.squeeze, self.excite, self.head = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x))
        gate = self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        if self.wrong == "squared":
            gate = x
        elif self.wrong == "itself":
            gate = nn.functional.max_pool2d(x, 3, 1, 1)
        elif self.wrong == "over channels":
            gate = x.mean(1, keepdim=True)
        found: Tensor = self.head(x * gate)
        return found


def normed(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    with torch.no_grad():
        assert norm.running_var is not None and norm.running_mean is not None
        norm.running_var.uniform_(0.5, 2)
        norm.running_mean.normal_()
    return norm


torch.manual_seed(0)
NETWORKS: dict[str, tuple[nn.Module, int, int]] = {
    "relu": (nn.Sequential(uneven(nn.Conv2d(3, 6, 3)), nn.ReLU(), nn.Conv2d(6, 4, 3)), 1, 0),
    "batch norm": (
        nn.Sequential(uneven(nn.Conv2d(3, 6, 3)), normed(nn.BatchNorm2d(6)), nn.ReLU(), nn.Conv2d(6, 4, 3)),
        1,
        0,
    ),
    "batch norm without weights": (
        nn.Sequential(nn.Conv2d(3, 6, 3), normed(nn.BatchNorm2d(6, affine=False)), nn.LeakyReLU(), nn.Conv2d(6, 4, 3)),
        1,
        1,
    ),
    "prelu": (nn.Sequential(uneven(nn.Conv2d(3, 6, 3)), nn.PReLU(6), nn.Conv2d(6, 4, 3)), 1, 0),
    "silu": (nn.Sequential(uneven(nn.Conv2d(3, 6, 3)), nn.SiLU(), nn.Conv2d(6, 4, 3, padding=1)), 1, 1),
    "relu6": (nn.Sequential(uneven(nn.Conv2d(3, 6, 3), 4), nn.ReLU6(), nn.Conv2d(6, 4, 3)), 1, 1),
    "no activation": (nn.Sequential(uneven(nn.Conv2d(3, 6, 3)), nn.Conv2d(6, 4, 3)), 1, 0),
    "groups": (nn.Sequential(uneven(nn.Conv2d(3, 6, 3)), nn.ReLU(), nn.Conv2d(6, 9, 3, groups=3)), 1, 0),
    "transposed": (
        nn.Sequential(uneven(nn.ConvTranspose2d(3, 6, 2)), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3)),
        1,
        0,
    ),
    "transposed groups first": (
        nn.Sequential(nn.Conv2d(3, 6, 1), uneven(nn.ConvTranspose2d(6, 8, 2, groups=2)), nn.ReLU(), nn.Conv2d(8, 4, 3)),
        1,
        0,
    ),
    "linear": (nn.Sequential(nn.Flatten(), uneven(nn.Linear(300, 6)), nn.ReLU(), nn.Linear(6, 4)), 1, 0),
    "joined": (Forked(), 2, 1),
    "flattened": (nn.Sequential(uneven(nn.Conv2d(3, 6, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(384, 4)), 0, 0),
    "added": (Residual(), 1, 1),
    "a layer called twice": (Twice(), 0, 0),
    "a tied weight": (Tied(), 0, 0),
    "tied in front": (TiedProducers(), 1, 1),
    "a computed weight": (
        nn.Sequential(uneven(nn.Conv2d(3, 6, 3)), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 4, 3))),
        1,
        0,
    ),
    "a gate": (Gated(nn.ReLU()), 3, 2),
    "a gate behind a silu": (Gated(nn.SiLU()), 3, 3),
    "a square": (Gated(nn.ReLU(), "squared"), 1, 1),
    "a product of one tensor's": (Gated(nn.ReLU(), "itself"), 1, 1),
    "a mean over channels": (Gated(nn.ReLU(), "over channels"), 1, 1),
    "resized": (
        nn.Sequential(uneven(nn.Conv2d(3, 6, 3)), nn.SiLU(), nn.UpsamplingBilinear2d(16), nn.Conv2d(6, 4, 3)),
        1,
        1,
    ),
    "averaged": (nn.Sequential(uneven(nn.Conv2d(3, 6, 3)), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(6, 4, 3)), 1, 0),
    "an output": (nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()), 0, 0),
}


def outputs(network: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        found = network(SEEN)
    return list(found) if isinstance(found, tuple) else [found]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_stays_and_the_network_too(name: str) -> None:
    network, tensors, products = NETWORKS[name]
    traced = capture(network.eval(), X[:2])
    before = {key: value.clone() for key, value in traced.state_dict().items()}
    made = equalized(traced, EIGHT, X.split(4))
    assert (len(made.tensors), len(made.products)) == (tensors, products)
    for ours, wanted in zip(outputs(made.network), outputs(traced), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert all(torch.equal(value, before[key]) for key, value in traced.state_dict().items())


@pytest.mark.parametrize("name", [name for name, (_, tensors, _) in NETWORKS.items() if tensors])
def test_it_pays_in_int8(name: str) -> None:
    network = NETWORKS[name][0]
    traced = capture(network.eval(), X[:2])
    plain, equal = (best_without_training(traced, EIGHT, X.split(4), SEEN, "max", how) for how in ("never", "always"))
    assert plain.equalized is None and equal.equalized is not None
    assert equal.distance < 1.2 * plain.distance


def test_channels_come_as_near_as_they_may() -> None:
    network = nn.Sequential(uneven(nn.Conv2d(3, 6, 1, bias=False), 1e4), nn.ReLU(), nn.Conv2d(6, 6, 1, groups=6))
    traced = capture(network.eval(), X[:2])
    made = equalized(traced, EIGHT, [X])
    ratio = made.network.state_dict()["0.weight"] / traced.state_dict()["0.weight"]
    t = ratio.flatten(1)[:, 1]
    assert t[0] == 1 and torch.allclose(t[1:], torch.tensor(LARGEST), rtol=1e-4)


def test_a_channel_that_is_always_zero_stays() -> None:
    first = nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        assert first.bias is not None
        first.weight[1], first.bias[1] = 0, 0
    made = equalized(capture(nn.Sequential(first, nn.ReLU(), nn.Conv2d(4, 4, 1)).eval(), X[:2]), EIGHT, [X])
    assert all(torch.isfinite(value).all() for value in made.network.state_dict().values())


# The search ------------------------------------------------------------------------------------------------------


def searched(
    network: nn.Module, calibration: CalibrationMethod = "auto", equalize: Equalize = "auto"
) -> tuple[Untrained, list[str]]:
    said: list[str] = []
    traced = capture(network.eval(), X[:2])
    best = best_without_training(
        traced,
        EIGHT,
        X.split(4),
        SEEN,
        calibration,
        equalize,
        lambda one: said.append(one.in_words()),
    )
    return best, said


def test_what_is_kept_is_not_looked_at_further() -> None:
    torch.manual_seed(0)
    best, said = searched(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)))
    assert len(said) == 1 and said[0].startswith("mse scales, not equalized: fidelity 0.99")
    assert best.equalized is None and best.fidelity > 0.99


def very_uneven() -> nn.Module:
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
    with torch.no_grad():
        first.weight[:4] *= 1000
        last.weight[:, :4] *= 1e-3
    return nn.Sequential(first, nn.SiLU(), last)


def test_what_is_lost_is_won_back() -> None:
    best, said = searched(very_uneven())
    assert len(said) >= 2 and "not equalized" in said[0] and isinstance(best.equalized, Equalized)
    assert (best.fidelity > 0.9 and "tensors equalized" in best.in_words()) or "tensor equalized" in best.in_words()


@pytest.mark.parametrize(
    ("calibration", "equalize", "wanted"),
    [
        ("mse", "never", ["mse scales, not"]),
        ("percentile", "never", ["percentile scales, not"]),
        ("max", "always", ["max scales, 1 tensor"]),
        ("auto", "never", ["mse scales, not", "percentile scales, not"]),
    ],
)
def test_what_is_asked_for_is_tried_and_nothing_else(
    calibration: CalibrationMethod, equalize: Equalize, wanted: list[str]
) -> None:
    _, said = searched(very_uneven(), calibration, equalize)
    assert [text[: len(start)] for text, start in zip(said, wanted, strict=True)] == wanted


def test_nothing_to_equalize_is_the_network_itself() -> None:
    torch.manual_seed(0)
    best, said = searched(NETWORKS["flattened"][0], "mse", "always")
    assert best.equalized is None and len(said) == 1
