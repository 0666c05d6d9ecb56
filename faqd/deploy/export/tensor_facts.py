"""Sizes and types of what a network computes, without computing it."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from faqd.quantize.operators.emit import Size

BATCH = (2, 3)
"""A size that is the number of images."""


@dataclass(frozen=True)
class TensorFacts:
    """sizes: of each axis, two of one that depends on how many images there are (`emit.Size`)."""

    sizes: tuple[Size, ...]
    dtype: torch.dtype


def facts_of(network: fx.GraphModule, example: Tensor) -> dict[fx.Node, TensorFacts]:
    """Of the nodes whose results are tensors. example: (N, C, H, W), of which only C, H and W count."""
    shapes = [(count, *example.shape[1:]) for count in BATCH]
    try:
        with torch.device("meta"):
            two, three = _run(_without_numbers(network), shapes)
    except RuntimeError:
        # An operator has tensors of its own, on the CPU. Here they may meet, at five times the seconds.
        with FakeTensorMode(allow_non_fake_inputs=True):
            two, three = _run(network, shapes)
    return {
        node: TensorFacts(
            tuple(a if a == b else (a, b) for a, b in zip(two[node.name].shape, three[node.name].shape, strict=True)),
            two[node.name].dtype,
        )
        for node in network.graph.nodes
        if node.name in two
    }


def _without_numbers(network: fx.GraphModule) -> fx.GraphModule:
    """A copy whose parameters and buffers have sizes and types alone."""
    held = [(tensor, torch.empty_like(tensor, device="meta")) for tensor in network.buffers()]
    held += [(weight, nn.Parameter(torch.empty_like(weight, device="meta"), False)) for weight in network.parameters()]
    return copy.deepcopy(network, {id(tensor): empty for tensor, empty in held})


class _Run(fx.Interpreter):
    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n.name] = result
        return result


@torch.no_grad()
def _run(network: fx.GraphModule, shapes: list[tuple[int, ...]]) -> list[dict[str, Tensor]]:
    """What each node computes of images of these shapes, by its name."""
    own = itertools.chain(network.parameters(), network.buffers())
    dtype = next((tensor.dtype for tensor in own if tensor.is_floating_point()), torch.float32)
    runs = []
    for shape in shapes:
        runs.append(_Run(network))
        runs[-1].run(torch.empty(shape, dtype=dtype))
    return [run.found for run in runs]
