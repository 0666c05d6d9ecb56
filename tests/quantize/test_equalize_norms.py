"""Equalization behind norms and in front of linear layers: their channels stand on other axes, and go through moves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faqd.quantize.capture.capture import capture
from faqd.quantize.config import QuantConfig
from faqd.quantize.equalize import equalized, with_products
from faqd.quantize.without_training import best_without_training

WIDTH = 8
X = torch.randn(12, WIDTH, 4, 4, generator=torch.Generator().manual_seed(0))
SEEN = torch.randn(8, WIDTH, 4, 4, generator=torch.Generator().manual_seed(1))
EIGHT = QuantConfig()


def spread() -> nn.Parameter:
    """Sizes of channels that differ as those of trained norms do, the first by most."""
    return nn.Parameter(torch.tensor([40.0] + [0.3 + 0.1 * channel for channel in range(WIDTH - 1)]))


def uneven(norm: nn.Module) -> nn.Module:
    norm.weight = spread()
    if getattr(norm, "bias", None) is not None:
        norm.bias = nn.Parameter(torch.randn(WIDTH, generator=torch.Generator().manual_seed(2)))
    return norm


class Written(nn.Module):
    """norm: a function of (x, weight, bias)."""

    def __init__(self, norm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.weight, self.bias = norm, spread(), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight, self.bias)


def rms_by_hand(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def layer_norm_by_hand(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight + bias


class Tokens(nn.Module):
    """body: a function of (network, tokens (N, 16, WIDTH)) that gives any tensor. Its layers all have other weights."""

    def __init__(self, body: Callable[[Tokens, Tensor], Any], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.norm = uneven(nn.LayerNorm(WIDTH)) if norm is None else norm
        self.q, self.k, self.v, self.fc1 = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fc2, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.gelu, self.relu = nn.GELU(), nn.ReLU()
        self.depthwise, self.dense = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.Conv2d(WIDTH, 6, 1)
        self.fc1.weight.data[1] *= 40
        self.fc2.weight.data[:, 1] /= 40  # what is large in front of a trained layer has small weights there
        for layer in (self.q, self.k, self.v, self.fc1, self.head, self.dense):
            layer.weight.data[:, 0] /= 40

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x.flatten(2).transpose(1, 2))


def pre_norm(net: Tokens, x: Tensor) -> Any:
    return x + net.fc2(net.gelu(net.fc1(net.norm(x))))


def post_norm(net: Tokens, x: Tensor) -> Any:
    x = net.norm(x)
    return x + net.fc2(net.relu(net.fc1(x)))


def attention(net: Tokens, x: Tensor) -> Any:
    x = net.norm(x)
    return F.scaled_dot_product_attention(net.q(x), net.k(x), net.v(x))


def windows(net: Tokens, x: Tensor) -> Any:
    """Shifted, padded and cut into windows, as Swin does."""
    x = torch.roll(net.norm(x).view(-1, 4, 4, WIDTH), (1, 1), (1, 2))
    x = F.pad(x, (0, 0, 0, 2, 0, 2)).view(-1, 3, 2, 3, 2, WIDTH).permute(0, 1, 3, 2, 4, 5)
    return net.q(x.reshape(-1, 4, WIDTH)).reshape(-1, 9, 4, WIDTH)


def channels_first(net: Tokens, x: Tensor) -> Any:
    return net.dense(net.norm(x).transpose(1, 2).reshape(-1, WIDTH, 4, 4))


def rolled_along_channels(net: Tokens, x: Tensor) -> Any:
    return net.q(torch.roll(net.norm(x), 1, 2))


def put_together_again(net: Tokens, x: Tensor) -> Any:
    """Pieces of one tensor, which one layer reads."""
    x = net.relu(net.fc1(x))
    return net.fc2(torch.cat((x[:, 8:], x[:, :8]), 1))


def of_two(net: Tokens, x: Tensor) -> Any:
    """A layer that reads places of two tensors cannot be divided for either."""
    return net.fc2(torch.cat((net.relu(net.fc1(x)), net.relu(net.q(x))), 1))


torch.manual_seed(0)
NETWORKS: dict[str, tuple[nn.Module, int, int]] = {
    "pre-norm": (Tokens(pre_norm), 2, 1),
    "post-norm: the sum reads it too": (Tokens(post_norm), 1, 0),
    "queries, keys and values": (Tokens(attention), 1, 0),
    "an output": (Tokens(lambda net, x: (net.q(y := net.norm(x)), y)), 0, 0),
    "one norm at two places": (Tokens(lambda net, x: net.q(net.norm(x)) + net.k(net.norm(x + 1))), 2, 2),
    "windows": (Tokens(windows), 1, 0),
    "a convolution": (Tokens(channels_first), 1, 0),
    "the class token": (Tokens(lambda net, x: net.head(net.norm(x)[:, 0])), 1, 0),
    "rolled along the channels": (Tokens(rolled_along_channels), 1, 1),
    "pieces of one": (Tokens(put_together_again), 1, 0),
    "pieces of two": (Tokens(of_two), 0, 0),
    "RMS norm": (Tokens(pre_norm, uneven(nn.RMSNorm(WIDTH))), 2, 1),
    "F.rms_norm": (Tokens(pre_norm, Written(lambda x, weight, _: F.rms_norm(x, (WIDTH,), weight))), 2, 1),
    "F.layer_norm": (Tokens(pre_norm, Written(lambda x, *own: F.layer_norm(x, (WIDTH,), *own))), 2, 1),
    "RMS norm by hand": (Tokens(pre_norm, Written(rms_by_hand)), 2, 1),
    "layer norm by hand": (Tokens(pre_norm, Written(layer_norm_by_hand)), 2, 1),
    "without a bias": (Tokens(pre_norm, uneven(nn.LayerNorm(WIDTH, bias=False))), 2, 1),
    "without weights": (Tokens(pre_norm, nn.LayerNorm(WIDTH, elementwise_affine=False)), 2, 2),
    "channels last": (
        Tokens(lambda net, x: pre_norm(net, net.depthwise(x.transpose(1, 2).reshape(-1, WIDTH, 4, 4)).movedim(1, -1))),
        2,
        1,
    ),
    "group norm": (nn.Sequential(uneven(nn.GroupNorm(2, WIDTH)), nn.Conv2d(WIDTH, 6, 1)), 1, 0),
    "layers without a norm": (Tokens(lambda net, x: net.fc2(net.relu(net.fc1(x)))), 1, 0),
}


def outputs(network: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        found = network(SEEN)
    return list(found) if isinstance(found, tuple) else [found]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_stays(name: str) -> None:
    network, tensors, products = NETWORKS[name]
    traced = capture(network.eval(), X[:2])
    before = {key: value.clone() for key, value in traced.state_dict().items()}
    made = equalized(traced, EIGHT, X.split(4))
    assert (len(made.tensors), len(made.products)) == (tensors, products)
    for ours, wanted in zip(outputs(made.network), outputs(traced), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert all(torch.equal(value, before[key]) for key, value in traced.state_dict().items())
    of_a_run = copy.deepcopy(with_products(traced, made.products))
    of_a_run.load_state_dict(made.network.state_dict())
    assert all(map(torch.equal, outputs(of_a_run), outputs(made.network)))


@pytest.mark.parametrize("name", [name for name, (_, tensors, products) in NETWORKS.items() if tensors > products])
def test_it_pays_in_int8(name: str) -> None:
    traced = capture(NETWORKS[name][0].eval(), X[:2])
    plain, equal = (best_without_training(traced, EIGHT, X.split(4), SEEN, "mse", how) for how in ("never", "always"))
    assert plain.equalized is None and equal.equalized is not None
    assert equal.distance < plain.distance
