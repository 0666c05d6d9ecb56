"""Which layers read the channels of a tensor: each channel as an input channel of their own, and nothing else does."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from faqd.quantize import nodes
from faqd.quantize.operators.layer import TRANSPOSED
from faqd.quantize.operators.pad import Pad
from faqd.quantize.operators.shape import Reshape
from faqd.quantize.operators.slice import Part

_POOLING = (nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)
"""Modules that hand on the channels of axis 1, and multiples of them multiplied."""


@dataclass(frozen=True)
class Reader:
    """A layer that reads a tensor as its input channels from `start` on, and the node that calls it."""

    node: fx.Node
    layer: Any
    start: int

    @property
    def depthwise(self) -> bool:
        return getattr(self.layer, "groups", 1) > 1 and self.layer.groups == self.layer.in_channels

    def divided(self, weight: Tensor, t: Tensor) -> Tensor:
        """A copy of the layer's weight, in which what meets these channels is divided by t (channels) float64."""
        weight, t = weight.clone(), t.to(weight)
        places = torch.arange(self.start, self.start + len(t), device=weight.device)
        if isinstance(self.layer, TRANSPOSED):
            weight[places] /= t.reshape(-1, *[1] * (weight.dim() - 1))
            return weight
        groups = getattr(self.layer, "groups", 1)
        columns = weight.view(groups, weight.shape[0] // groups, *weight.shape[1:])
        group, column = places // weight.shape[1], places % weight.shape[1]
        columns[group, :, column] /= t.reshape(-1, *[1] * (weight.dim() - 1))
        return weight


class Channels(NamedTuple):
    """The axis of a tensor that counts its channels, and every layer that reads them. passed: averages and products on
    the way to those, which are multiplied as the tensor is, and where its channels stand in them."""

    axis: int
    readers: list[Reader]
    passed: dict[fx.Node, set[Place]]


class Place(NamedTuple):
    """Where the channels of a tensor stand in one that is made of it: on which axis, from where on."""

    axis: int
    start: int


def channels_of(network: fx.GraphModule, node: fx.Node) -> Channels | None:
    """Shapes propagated. None where something else than layers reads the tensor, or not by channel."""
    if node.op == "placeholder" or nodes.is_own(node) or len(nodes.shape(node)) < 2:
        return None
    for axis in dict.fromkeys((1, len(nodes.shape(node)) - 1)):  # of a convolution, and of a linear layer
        if (channels := _channels(network, node, axis)) is not None and channels.readers:
            return channels
    return None


def _channels(network: fx.GraphModule, node: fx.Node, axis: int) -> Channels | None:
    found: list[Reader] = []
    places: dict[fx.Node, set[Place]] = {}
    joins, passed = set[fx.Node](), set[fx.Node]()
    ahead = [(node, Place(axis, 0))]
    while ahead:
        read, place = ahead.pop()
        if place in places.setdefault(read, set()):
            continue
        places[read].add(place)
        for reader in read.users:
            module: Any = nodes.module_of(network, reader)
            if nodes.role(network, reader) == "compute":
                if module is None or list(reader.args) != [read] or place.axis != _input_axis(module, read):
                    return None
                found.append(Reader(reader, module, place.start))
            elif nodes.role(network, reader) == "concat":
                joined = _places_in(reader, read, place)
                if joined is None:
                    joins.add(reader)
                ahead += [(reader, each) for each in joined or [place]]
            elif (moved := axis_behind(network, reader, place.axis)) is not None:
                ahead.append((reader, Place(moved, place.start)))
            elif (linear := _axis_of_multiples(network, reader, read, place.axis)) is not None:
                passed.add(reader)
                ahead.append((reader, Place(linear, place.start)))
            else:
                return None
    for join in joins:  # on another axis than that of the channels, of which every piece has to be a piece of theirs
        pieces = [places.get(operand) for operand in nodes.tensor_inputs(join)]
        if any(piece != pieces[0] for piece in pieces):
            return None
    for product in passed:  # of which one side alone may be multiplied
        if nodes.role(network, product) == "multiply" and all(each in places for each in product.all_input_nodes):
            return None
    return Channels(axis, found, {each: places[each] for each in passed})


def _axis_of_multiples(network: fx.GraphModule, node: fx.Node, read: fx.Node, axis: int) -> int | None:
    """The axis of the channels of `read` in an average along other axes, or in a product with another tensor, such as a
    gate; None for any other node."""
    module: Any = nodes.module_of(network, node)
    given: Any = node.args
    kind = nodes.role(network, node)
    if kind not in ("average", "multiply"):
        return None
    before, after = nodes.shape(read), nodes.shape(node)
    if kind == "multiply":
        same = all(len(nodes.shape(each)) == len(after) for each in node.all_input_nodes)
        return axis if same and len(node.all_input_nodes) == 2 and before[axis] == after[axis] else None
    if node.target is not torch.mean:
        return axis if module is not None and axis == 1 else None
    averaged = [each % len(before) for each in given[1]]
    kept = len(before) == len(after)
    return None if axis in averaged else axis - (0 if kept else sum(each < axis for each in averaged))


def _input_axis(layer: nn.Module, read: fx.Node) -> int:
    return len(nodes.shape(read)) - 1 if isinstance(layer, nn.Linear) else 1


def _places_in(concat: fx.Node, read: fx.Node, place: Place) -> list[Place] | None:
    """Where the channels of a tensor begin in a concatenation of channels; None where it joins along another axis."""
    operands = nodes.tensor_inputs(concat)
    widths = [nodes.shape(operand)[place.axis] for operand in operands]
    if nodes.shape(concat)[place.axis] != sum(widths):
        return None
    starts = [place.start + sum(widths[:i]) for i, operand in enumerate(operands) if operand is read]
    return [Place(place.axis, start) for start in starts]


def axis_behind(network: fx.GraphModule, node: fx.Node, axis: int) -> int | None:
    """The axis of the channels in what a node makes of a tensor, where it only moves values, so that multiples of
    channels come out multiplied; None for any other node, and where channels are taken apart or joined."""
    if not node.all_input_nodes or not nodes.is_tensor(before := nodes.operand(node)):
        return None
    module: Any = nodes.module_of(network, node)
    given: Any = node.args[1:]
    if isinstance(module, nn.Identity):
        return axis
    if isinstance(module, _POOLING):
        return axis if axis == 1 else None
    if isinstance(module, Pad):
        behind = len(nodes.shape(before)) - 1 - axis
        return None if module.value or any(module.widths[2 * behind : 2 * behind + 2]) else axis
    if isinstance(module, Part):
        return None if axis == module.axis else axis
    if isinstance(module, Reshape) or node.target is torch.flatten:
        sizes = nodes.shape(before)
        return _axis_in(nodes.shape(node), sizes[axis], math.prod(sizes[:axis]))
    if node.target is torch.permute:
        return [each % len(given[0]) for each in given[0]].index(axis)
    if node.target is torch.ops.aten.roll.default:
        return axis if given[1:] and all(each % len(nodes.shape(before)) != axis for each in given[1]) else None
    if node.target is operator.getitem:
        index = given[0] if isinstance(given[0], tuple) else (given[0],)
        whole = axis >= len(index) or index[axis] == slice(None)
        return axis - sum(isinstance(each, int) for each in index[:axis]) if whole else None
    return None


def _axis_in(sizes: tuple[int, ...], size: int, before: int) -> int | None:
    """The axis of that size in front of which there are that many combinations of places."""
    fits = (axis for axis, own in enumerate(sizes) if own == size and math.prod(sizes[:axis]) == before)
    return next(fits, None)
