"""The outputs of a network by name: what a forward returns, tuples and dictionaries taken apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

SINGLE = "logits"
"""The name of an only output, and the beginning of the names of a tuple's."""


def named_outputs(returned: Any) -> dict[str, Any]:
    """The leaves of what a network returns, in torch's order: `logits`; `logits_0`, `logits_1` of a tuple; the keys of
    a dictionary; `boxes_0` where a dictionary holds a list."""
    return dict(_leaves("", returned))


def graph_outputs(network: fx.GraphModule) -> dict[str, Any]:
    """The nodes that a captured network returns, by the names of its outputs."""
    (output,) = (node for node in network.graph.nodes if node.op == "output")
    return named_outputs(output.args[0])


@torch.no_grad()
def run_batches(network: Any, inputs: Tensor, batch: int) -> dict[str, Tensor]:
    """float32 outputs of `network` for all of `inputs`, batch by batch."""
    parts = [named_outputs(network(some)) for some in inputs.split(batch)]
    return {name: torch.cat([part[name].float() for part in parts]) for name in parts[0]}


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        entries = [(re.sub(r"\W", "_", str(key)), entry) for key, entry in value.items()]
    elif isinstance(value, list | tuple):
        entries = [(str(index), entry) for index, entry in enumerate(value)]
        name = name or SINGLE
    else:
        yield name or SINGLE, value
        return
    for key, entry in entries:
        yield from _leaves(f"{name}_{key}" if name else key, entry)
