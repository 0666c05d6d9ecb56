"""Sizes and types of what a network computes, without computing it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
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
    own = itertools.chain(network.parameters(), network.buffers())
    dtype = next((tensor.dtype for tensor in own if tensor.is_floating_point()), torch.float32)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        two, three = (_run(network, (count, *example.shape[1:]), dtype) for count in BATCH)
    return {
        node: TensorFacts(tuple(a if a == b else (a, b) for a, b in zip(shape, three[node][0], strict=True)), dtype)
        for node, (shape, dtype) in two.items()
    }


class _Run(fx.Interpreter):
    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.found: dict[fx.Node, tuple[tuple[int, ...], torch.dtype]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n] = (tuple(result.shape), result.dtype)
        return result


def _run(network: fx.GraphModule, shape: tuple[int, ...], dtype: torch.dtype) -> dict[fx.Node, Any]:
    run = _Run(network)
    run.run(torch.empty(shape, dtype=dtype))
    return run.found
