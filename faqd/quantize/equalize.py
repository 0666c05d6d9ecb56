"""Equalization: channels of very different sizes that share one scale are made alike, exactly in float.

A tensor is multiplied by t for each channel in front of its rounding, and the input channels of every layer that reads
it are divided by t: the function stays, and a small channel gets more codes. Behind a layer, its batch norm, a ReLU or
a PReLU the multiplication goes into that layer (cross-layer equalization, arXiv 1906.04721), behind a layer norm, an
RMS norm or a group norm into its weight and bias (SmoothQuant, arXiv 2211.10438); behind anything else it stays, one
product per channel in float.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from faqd.quant import SIGNED_8
from faqd.quantize import nodes
from faqd.quantize.channel_producer import producer_of
from faqd.quantize.channel_readers import channels_of
from faqd.quantize.config import QuantConfig
from faqd.quantize.exponents import Trial, factors
from faqd.quantize.operators.arithmetic import Scaled
from faqd.quantize.placement import place

DENSE, DEPTHWISE = 0.75, 1.0
"""How far t goes towards equal peaks in maps: in a dense layer columns that are divided by it lose codes of their
weights, in a depthwise one each has a scale of its own. Behind norms and on tokens, whose channels differ by less, it
is tried."""
TRIED_ON = 8
"""Images that this is tried on."""


@dataclass(frozen=True)
class Equalized:
    """network: a captured network like the one that was given, with parameters of its own. tensors: the places of those
    that were multiplied; products: of them those whose multiplication stayed."""

    network: fx.GraphModule
    tensors: tuple[str, ...]
    products: tuple[str, ...]


@torch.no_grad()
def equalized(
    traced: fx.GraphModule, bits: QuantConfig, batches: Iterable[Tensor], keep: Collection[str] = ()
) -> Equalized:
    """batches: unlabelled network input (N, C, H, W), for the largest values of every channel.
    keep: the nodes whose values must not change; behind them there is a product instead."""
    network = copy.deepcopy(traced)
    parts = list(batches)
    nodes.propagate(network, nodes.two_of(parts[0]))
    placement = place(network, bits)
    grids = placement.activations
    # Means of codes times a factor lie at ties too often: an average is equalized by what it averages alone.
    sources = (node for node in grids if nodes.role(network, node) != "average")
    found = {node: channels for node in sources if (channels := channels_of(network, node)) is not None}
    watched = _Peaks(network, {node: found[node].axis if node in found else None for node in grids})
    *others, unseen = _apart(parts)
    peaks = watched.of(others)
    tried = {node: each.readers for node, each in found.items() if _is_tried(network, node, each.axis)}
    trial = Trial(network, placement, tried, peaks)
    trial.run(unseen)
    peaks = watched.of([unseen])
    sharing = {node: group for group in placement.shared for node in group}
    names, uses = nodes.places(network), _uses(network)
    tensors, products = [], []
    for node, (axis, readers, passed) in found.items():
        if not all(_is_own(reader.layer.weight, uses) for reader in readers):
            continue
        producer = producer_of(network, node, axis, keep)
        if producer is not None and not all(_is_own(own, uses) for own, _ in producer):
            producer = None
        if producer is None and grids[node].high < SIGNED_8.high:
            continue
        fixed = DEPTHWISE if any(reader.depthwise for reader in readers) else DENSE
        largest = max(float(peaks[each].max()) for each in sharing.get(node, [node]))
        t = factors(peaks[node], largest, trial.best(node) if node in tried else fixed)
        if bool((t == 1).all()):
            continue
        tensors.append(names[node])
        for reader in readers:
            reader.layer.weight.copy_(reader.divided(reader.layer.weight, t))
        for multiplied, places in passed.items():
            for start in {each.start for each in places} if multiplied in peaks else ():
                part = peaks[multiplied][start : start + len(t)]
                part.mul_(t if len(part) == len(t) else t.max())
        if producer is not None:
            for own, meeting in producer:
                own.mul_(meeting(t).to(own))
            continue
        products.append(names[node])
        _put_product(network, node, names[node], axis, t.to(parts[0].dtype))
    network.recompile()
    return Equalized(network, tuple(tensors), tuple(products))


def _apart(parts: list[Tensor]) -> list[Tensor]:
    """The same images, of which the last few are a batch of their own; one image is both."""
    *others, last = parts
    if not others and len(last) == 1:
        return [last, last]
    count = min(TRIED_ON, len(last) if others else len(last) // 2)
    return [*others, *([last[:-count]] if count < len(last) else []), last[-count:]]


def _is_tried(network: fx.GraphModule, node: fx.Node, axis: int) -> bool:
    """Whether a tensor is one of tokens, or what a norm makes, which has no role."""
    return axis > 1 or nodes.role(network, node) == "other"


def _uses(network: fx.GraphModule) -> Counter[int]:
    """In how many calls each parameter is used, by its id."""
    called = [module for node in network.graph.nodes if (module := nodes.module_of(network, node)) is not None]
    read = [
        nodes.held_tensor(network, node) for node in network.graph.nodes if node.op == "get_attr" for _ in node.users
    ]
    return Counter(map(id, [*(own for module in called for own in module.parameters()), *read]))


def _is_own(tensor: Tensor, uses: Counter[int]) -> bool:
    """Whether a tensor can be changed for one call alone: no tied one, none of a layer that is called twice, and no
    filter that training does not touch."""
    return isinstance(tensor, nn.Parameter) and uses[id(tensor)] == 1


def with_products(traced: fx.GraphModule, places: Sequence[str]) -> fx.GraphModule:
    """A captured network with products by one behind these places, into which the weights of an equalized one fit."""
    if not places:
        return traced
    network = copy.deepcopy(traced)
    node_at = {name: node for node, name in nodes.places(network).items()}
    for name in places:
        node = node_at[name]
        channels = channels_of(network, node)
        assert channels is not None
        _put_product(network, node, name, channels.axis, torch.ones(nodes.shape(node)[channels.axis]))
    network.recompile()
    return network


def _put_product(network: fx.GraphModule, node: fx.Node, name: str, axis: int, t: Tensor) -> None:
    sizes = [1] * len(nodes.shape(node))
    sizes[axis] = -1
    nodes.called_behind(network, node, f"{name}_equalized", Scaled(t.reshape(sizes), 0.0))


class _Peaks(fx.Interpreter):
    """The largest magnitude of every channel of some tensors, or of all of a tensor that has none."""

    def __init__(self, network: fx.GraphModule, axes: dict[fx.Node, int | None]) -> None:
        super().__init__(network)
        self._axes = axes
        self._found: dict[fx.Node, Tensor] = {}

    def of(self, batches: Iterable[Tensor]) -> dict[fx.Node, Tensor]:
        """Of these and of all before."""
        for batch in batches:
            self.run(batch)
        return dict(self._found)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self._axes:
            axis, magnitudes = self._axes[n], result.detach().abs()
            by_channel = magnitudes.reshape(1, -1) if axis is None else magnitudes.movedim(axis, 0).flatten(1)
            peak = by_channel.amax(1).double()
            self._found[n] = torch.maximum(peak, self._found.get(n, peak))
        return result
