"""GELU by erf and layer norm by hand, as networks and older ONNX files write them, are what they are."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from faqd.quantize.capture.capture import capture

GELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "half behind": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) * 0.5,
    "half before": lambda x: 0.5 * x * (1.0 + torch.erf(x * 0.70710678)),
    "half in the gate": lambda x: x * (0.5 * (torch.erf(x / 1.4142135) + 1)),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "a third": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 3,
    "another width": lambda x: 0.5 * x * (1 + torch.erf(x / 1.5)),
    "of another": lambda x: 0.5 * x.abs() * (1 + torch.erf(x / math.sqrt(2))),
}


class Gate(nn.Module):
    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 4, 3), gate

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.conv(x))


class Norm(nn.Module):
    def __init__(self, axis: int, weight: bool, bias: bool, eps_inside: bool = True) -> None:
        super().__init__()
        self.axis, self.eps_inside, self.linear = axis, eps_inside, nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.rand(8) + 0.5) if weight else None
        self.bias = nn.Parameter(torch.rand(8)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        apart = x - x.mean(self.axis, keepdim=True)
        squares = (apart * apart).mean(self.axis, keepdim=True)
        y = apart / (torch.sqrt(squares + 1e-3) if self.eps_inside else torch.sqrt(squares) + 1e-3)
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize("name", GELUS)
def test_a_gelu_is_one(name: str) -> None:
    traced = capture(Gate(GELUS[name]), torch.zeros(2, 3, 8, 8))
    assert [type(module) for module in traced.children()] == [nn.Conv2d, nn.GELU]


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_like_a_gelu_is_none(name: str) -> None:
    traced = capture(Gate(OTHERS[name]), torch.zeros(2, 3, 8, 8))
    assert not any(isinstance(module, nn.GELU) for module in traced.modules())


@pytest.mark.parametrize(("weight", "bias"), [(True, True), (True, False), (False, False)])
def test_a_layer_norm_is_one(weight: bool, bias: bool) -> None:
    network = Norm(-1, weight, bias)
    traced = capture(network, torch.randn(2, 3, 6, 8))
    (norm,) = (module for module in traced.modules() if isinstance(module, nn.LayerNorm))
    assert (norm.weight is network.weight, norm.bias is network.bias, norm.eps) == (True, True, 1e-3)
    assert len([node for node in traced.graph.nodes if node.op != "output"]) <= 5


@pytest.mark.parametrize(
    "network", [Norm(1, False, False), Norm(-1, True, True, False)], ids=["channels", "eps outside"]
)
def test_what_is_like_a_layer_norm_is_none(network: nn.Module) -> None:
    traced = capture(network, torch.randn(2, 8, 8, 8))
    assert not any(isinstance(module, nn.LayerNorm) for module in traced.modules())
