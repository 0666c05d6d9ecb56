"""Equalization: channels of very different sizes that share one scale are made alike, exactly in float.

A tensor is multiplied by t for each channel in front of its rounding, and the input channels of every layer that reads
it are divided by t: the function stays, and a small channel gets more codes. Behind a layer, its batch norm, a ReLU or
a PReLU the multiplication goes into that layer (cross-layer equalization, arXiv 1906.04721); behind anything else it
stays, one product per channel in float.
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
from faqd.quantize.config import QuantConfig
from faqd.quantize.operators.arithmetic import Scaled
from faqd.quantize.operators.layer import TRANSPOSED
from faqd.quantize.operators.norm import NORM
from faqd.quantize.placement import place

LARGEST = 64.0
"""Of all t: channels that are hardly there need no more."""
DENSE, DEPTHWISE = 0.75, 1.0
"""How far t goes towards equal peaks: in a dense layer columns that are divided by it lose codes of their weights, in a
depthwise one each has a scale of its own."""
_PASSING = (nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Identity)
"""Modules that hand on channels in their order, and multiples of them multiplied."""


@dataclass(frozen=True)
class Equalized:
    """network: a captured network like the one that was given, with parameters of its own. tensors: the places of those
    that were multiplied; products: of them those whose multiplication stayed."""

    network: fx.GraphModule
    tensors: tuple[str, ...]
    products: tuple[str, ...]


@dataclass(frozen=True)
class _Reader:
    """A layer that reads a tensor as its input channels from `start` on."""

    layer: Any
    start: int

    @property
    def depthwise(self) -> bool:
        return getattr(self.layer, "groups", 1) > 1 and self.layer.groups == self.layer.in_channels

    def divide(self, t: Tensor) -> None:
        """The weights that meet these channels, by t (channels) float64."""
        weight = self.layer.weight
        t = t.to(weight)
        places = torch.arange(self.start, self.start + len(t), device=weight.device)
        if isinstance(self.layer, TRANSPOSED):
            weight[places] /= t.reshape(-1, *[1] * (weight.dim() - 1))
            return
        groups = getattr(self.layer, "groups", 1)
        columns = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        group, column = places // weight.shape[1], places % weight.shape[1]
        columns[group, :, column] /= t.reshape(-1, *[1] * (weight.dim() - 1))


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
    peaks = _Peaks(network, grids).of(parts)
    largest = {node: float(peak.max()) for node, peak in peaks.items()}
    for group in placement.shared:
        largest |= dict.fromkeys(group, max(largest[node] for node in group))
    names, uses = nodes.places(network), _uses(network)
    tensors, products = [], []
    for node, grid in grids.items():
        readers, producer = _readers(network, node), _producer(network, node, keep)
        if producer is not None and not all(_is_own(own, uses) for own in (producer.weight, producer.bias)):
            producer = None
        if readers is None or not all(_is_own(reader.layer.weight, uses) for reader in readers):
            continue
        if producer is None and grid.high < SIGNED_8.high:
            continue
        exponent = DEPTHWISE if any(reader.depthwise for reader in readers) else DENSE
        t = (largest[node] / peaks[node]).nan_to_num(1.0, posinf=1.0).pow(exponent).clamp(1.0, LARGEST)
        if bool((t == 1).all()):
            continue
        tensors.append(names[node])
        for reader in readers:
            reader.divide(t)
        if producer is not None:
            _multiply(producer, t)
            continue
        products.append(names[node])
        factor = t.reshape(1, -1, *[1] * (len(nodes.shape(node)) - 2)).to(parts[0].dtype)
        _put_product(network, node, names[node], factor)
    network.recompile()
    return Equalized(network, tuple(tensors), tuple(products))


def _uses(network: fx.GraphModule) -> Counter[int]:
    """In how many calls each parameter is used, by its id."""
    called = [module for node in network.graph.nodes if (module := nodes.module_of(network, node)) is not None]
    read = [nodes.held_tensor(network, node) for node in network.graph.nodes if node.op == "get_attr"]
    return Counter(map(id, [*(own for module in called for own in module.parameters()), *read]))


def _is_own(tensor: Tensor | None, uses: Counter[int]) -> bool:
    """Whether a layer's tensor can be changed for it alone: no tied one, none of a layer that is called twice, and no
    filter that training does not touch."""
    return tensor is None or (isinstance(tensor, nn.Parameter) and uses[id(tensor)] == 1)


def with_products(traced: fx.GraphModule, places: Sequence[str]) -> fx.GraphModule:
    """A captured network with products by one behind these places, into which the weights of an equalized one fit."""
    if not places:
        return traced
    network = copy.deepcopy(traced)
    node_at = {name: node for node, name in nodes.places(network).items()}
    for name in places:
        node = node_at[name]
        factor = torch.ones(1, nodes.shape(node)[1], *[1] * (len(nodes.shape(node)) - 2))
        _put_product(network, node, name, factor)
    network.recompile()
    return network


def _put_product(network: fx.GraphModule, node: fx.Node, name: str, factor: Tensor) -> None:
    nodes.called_behind(network, node, f"{name}_equalized", Scaled(factor, 0.0))


def _readers(network: fx.GraphModule, node: fx.Node) -> list[_Reader] | None:
    """Every layer that reads a tensor; None where something else does, or where it is no tensor of channels."""
    if node.op == "placeholder" or nodes.is_own(node) or len(nodes.shape(node)) < 2:
        return None
    found: list[_Reader] = []
    ahead = [(node, reader, 0) for reader in node.users]
    while ahead:
        read, reader, start = ahead.pop()
        module: Any = nodes.module_of(network, reader)
        if nodes.role(network, reader) == "compute":
            if module is None or list(reader.args) != [read] or not _by_channel(module, read):
                return None
            found.append(_Reader(module, start))
        elif isinstance(module, _PASSING):
            ahead += [(reader, after, start) for after in reader.users]
        elif nodes.role(network, reader) == "concat" and (places := _places_in(reader, read)) is not None:
            ahead += [(reader, after, start + each) for each in places for after in reader.users]
        else:
            return None
    return found or None


def _by_channel(layer: Any, read: fx.Node) -> bool:
    """Whether a layer takes axis 1 of what it reads for its input channels."""
    return not isinstance(layer, nn.Linear) or len(nodes.shape(read)) == 2


def _places_in(concat: fx.Node, read: fx.Node) -> list[int] | None:
    """Where the channels of a tensor begin in a concatenation of channels; None where it joins something else."""
    operands = nodes.tensor_inputs(concat)
    widths = [nodes.shape(operand)[1] for operand in operands]
    if nodes.shape(concat)[1] != sum(widths) or len(nodes.shape(concat)) != len(nodes.shape(read)):
        return None
    if any(nodes.shape(operand)[2:] != nodes.shape(concat)[2:] for operand in operands):
        return None
    return [sum(widths[:i]) for i, operand in enumerate(operands) if operand is read]


def _producer(network: fx.GraphModule, node: fx.Node, keep: Collection[str]) -> Any:
    """The layer or batch norm into which the multiplication of a tensor goes; None where there is none, or where it
    changes what has to stay."""
    module = nodes.module_of(network, node)
    if node.name in keep:
        return None
    if nodes.role(network, node) == "rectify" or isinstance(module, nn.LeakyReLU | nn.PReLU):
        node = nodes.operand(node)
        if len(node.users) != 1 or node.name in keep:
            return None
    module = nodes.module_of(network, node)
    if isinstance(module, NORM):
        return module if module.affine else None
    return module if nodes.role(network, node) == "compute" and module is not None else None


def _multiply(module: Any, t: Tensor) -> None:
    """The output channels of a layer, or of a batch norm."""
    if isinstance(module, NORM):
        module.weight.mul_(t.to(module.weight))
    elif isinstance(module, TRANSPOSED):
        weight = module.weight
        columns: Tensor = weight.reshape(module.groups, weight.shape[0] // module.groups, *weight.shape[1:])
        columns.mul_(t.to(weight).reshape(module.groups, 1, weight.shape[1], *[1] * (weight.dim() - 2)))
    else:
        module.weight.mul_(t.to(module.weight).reshape(-1, *[1] * (module.weight.dim() - 1)))
    if module.bias is not None:
        module.bias.mul_(t.to(module.bias))


class _Peaks(fx.Interpreter):
    """The largest magnitude of every channel of some tensors."""

    def __init__(self, network: fx.GraphModule, wanted: Iterable[fx.Node]) -> None:
        super().__init__(network)
        self._wanted = set(wanted)
        self._found: dict[fx.Node, Tensor] = {}

    def of(self, batches: Iterable[Tensor]) -> dict[fx.Node, Tensor]:
        for batch in batches:
            self.run(batch)
        return self._found

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self._wanted:
            by_channel = (
                result.detach().abs().reshape(1, -1) if result.dim() < 2 else result.detach().abs().transpose(0, 1)
            )
            peak = by_channel.flatten(1).amax(1).double()
            self._found[n] = torch.maximum(peak, self._found.get(n, peak))
        return result
