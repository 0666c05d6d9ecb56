"""Where in a captured network tensors are maps, however they lie in memory, and what of tokens is a map.

The axes of every tensor follow from the graph: a convolution makes a map (B, C, H, W); reshapes, permutations and
slices carry its axes on, layers and what works position by position keep them, a sum has those of either operand. So
tokens (B, N, C) are known by where they come from: N = k + h * w, where the h x w positions of a map, flattened, were
concatenated with k tokens that stand for no position, as class and register tokens, which are the network's own, do
not. No number is guessed.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from faqd.quantize import nodes
from faqd.quantize.branches import is_probability
from faqd.quantize.operators.shape import Reshape
from faqd.quantize.operators.slice import Part
from faqd.quantize.quantizers.activation import ActivationQuantizer
from faqd.train.losses.axes import (
    Axes,
    concatenated,
    grid_of,
    holds_places,
    is_other,
    looks_like_map,
    of_map,
    regrouped,
    settled,
    sliced,
    whole,
)

_BY_PLACE = ("rectify", "clamp", "curve", "norm", "add", "multiply", "reshape")
"""Roles of operators that mix no positions."""
_NORMS = (torch.ops.aten.layer_norm.default, torch.ops.aten.rms_norm.default)
_KEEPING = (*_NORMS, torch.ops.aten.roll.default)
_KEEPERS = (ActivationQuantizer, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
"""What has no role, and leaves every axis where it is: functions, and modules."""
_PRODUCTS = (torch.ops.aten.matmul.default, torch.ops.aten.bmm.default, torch.matmul, torch.bmm, operator.matmul)
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Layout:
    """How a tensor is a map of `channels`. front: tokens that stand for no position, in front of those that do."""

    channels: int
    height: int
    width: int
    kind: str
    front: int = 0

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def __str__(self) -> str:
        tokens = " tokens" if self.kind == "tokens" else ""
        return f"{self.channels} x {self.height} x {self.width}{tokens}"


class Layouts:
    """Of a captured network with shapes: the layout of each node that is a map."""

    def __init__(self, network: fx.GraphModule) -> None:
        self._network = network
        self._axes: dict[fx.Node, Axes] = {}
        for node in network.graph.nodes:
            if nodes.is_tensor(node) and (found := self._axes_of(node)) is not None:
                self._axes[node] = found

    def of(self, node: fx.Node) -> Layout | None:
        """A map (B, C, H, W), a map (B, H, W, C) or tokens (B, N, C); None for what is none of them.

        Four axes whose meaning nothing tells are those of a map (B, C, H, W).
        """
        if not nodes.is_tensor(node) or len(shape := nodes.shape(node)) not in (3, 4):
            return None
        axes = self._axes.get(node)
        if len(shape) == 4 and (axes is None or looks_like_map(axes, shape)):
            return Layout(shape[1], shape[2], shape[3], "map")
        if axes is None or axes[0] != whole("images", shape[0]) or not is_other(axes[-1]):
            return None
        if len(shape) == 4:
            rows, columns = whole("rows", shape[1]), whole("columns", shape[2])
            return Layout(shape[3], shape[1], shape[2], "last") if axes[1:3] == (rows, columns) else None
        grid = grid_of(axes[1])
        return None if grid is None else Layout(shape[2], *grid[1], "tokens", grid[0])

    def is_read(self, node: fx.Node) -> bool:
        """Whether a layer reads the map's positions on the way to an output, and not the tokens in front alone.

        Behind the last attention of a network that is asked for its class token, all others go nowhere.
        """
        ahead: list[tuple[fx.Node, bool]] = [(node, False)]
        seen = set(ahead)
        while ahead:
            at, behind_layer = ahead.pop()
            for reader in at.users:
                layer = behind_layer or nodes.role(self._network, reader) == "compute"
                if reader.op == "output":
                    if layer:
                        return True
                    continue
                if not nodes.is_tensor(reader):
                    continue
                if not self._by_place(reader):
                    if layer or any(nodes.role(self._network, n) == "compute" for n in nodes.depending_on(reader)):
                        return True
                elif any(map(holds_places, self._axes[reader])) and (reader, layer) not in seen:
                    seen.add((reader, layer))
                    ahead.append((reader, layer))
        return False

    def _by_place(self, node: fx.Node) -> bool:
        """Whether nothing but the same position goes into each position of a node with known axes."""
        if node not in self._axes:
            return False
        module = nodes.module_of(self._network, node)
        if isinstance(module, nn.Linear):
            return is_other(self._axes[nodes.operand(node)][-1])
        if isinstance(module, ActivationQuantizer) or node.target is torch.cat:
            return True
        return self._is_norm(node) or nodes.role(self._network, node) in _BY_PLACE

    def _is_norm(self, node: fx.Node) -> bool:
        """Whether it normalises the last axis alone, and that is of channels."""
        module = nodes.module_of(self._network, node)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            sizes: tuple[int, ...] = tuple(module.normalized_shape)
        elif node.target in _NORMS and len(node.args) > 1 and isinstance(node.args[1], tuple | list):
            sizes = tuple(node.args[1])  # type: ignore[arg-type]
        else:
            return False
        return len(sizes) == 1 and node in self._axes and is_other(self._axes[node][-1])

    def _axes_of(self, node: fx.Node) -> Axes | None:
        shape = nodes.shape(node)
        if node.op == "placeholder":
            return of_map(shape) if len(shape) == 4 else None
        if nodes.is_own(node) or node.op == "output":
            return None
        module = nodes.module_of(self._network, node)
        role = nodes.role(self._network, node)
        read = [each for each in nodes.tensor_inputs(node) if not nodes.is_own(each)]
        if not read or role == "constant":
            return None
        axes, before = self._axes.get(read[0]), nodes.shape(read[0])
        if role == "compute":
            if isinstance(module, nn.Linear):
                return None if axes is None else settled((*axes[:-1], whole("other", shape[-1])))
            return of_map(shape) if len(shape) == 4 else None
        if node.target is torch.cat:
            return self._joined(node)
        if node.target in _PRODUCTS or node.target is _ATTENTION:
            last = self._axes.get(read[-1])
            of_shape = axes is not None and len(axes) == len(shape) and before[:-1] == shape[:-1]
            return (*axes[:-1], last[-1]) if axes is not None and last is not None and of_shape else None
        if axes is not None:
            if isinstance(module, Reshape) or node.target is torch.flatten:
                return regrouped(axes, shape)
            if node.target is torch.permute:
                order: tuple[int, ...] = node.args[1]  # type: ignore[assignment]
                return tuple(axes[axis] for axis in order)
            if node.target is operator.getitem:
                return sliced(axes, before, node.args[1])
            if isinstance(module, Part):
                return sliced(axes, before, (*[slice(None)] * module.axis, slice(module.start, module.end)))
            if node.target is torch.ops.aten.mT.default:
                return (*axes[:-2], axes[-1], axes[-2])
        known = role in _BY_PLACE or isinstance(module, _KEEPERS) or node.target in _KEEPING
        known = known or is_probability(self._network, node)
        return self._kept(read, shape, known)

    def _kept(self, read: list[fx.Node], shape: tuple[int, ...], known: bool) -> Axes | None:
        """The axes of an operator whose result looks like what it reads. known: whether none are exchanged, whatever
        their sizes."""
        if len(read) > 1 and not known:
            return None
        before = nodes.shape(read[0])
        is_map = len(before) == 4 and self._axes.get(read[0]) == of_map(before)
        if known or is_map or len(set(shape[1:])) == len(shape[1:]):
            for each in read:
                if each in self._axes and nodes.shape(each) == shape:
                    return self._axes[each]
        return of_map(shape) if is_map and len(shape) == 4 and before[:2] == shape[:2] else None

    def _joined(self, node: fx.Node) -> Axes | None:
        operands: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
        axis = int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0))  # type: ignore[arg-type]
        parts = []
        for each in operands:
            axes = self._axes.get(each)
            if axes is None and not self._is_constant(each):
                return None
            parts.append((axes, nodes.shape(each)))
        return concatenated(parts, axis % len(nodes.shape(node)))

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether it is the network's own tensor, once for each image, rounded or not."""
        if isinstance(nodes.module_of(self._network, node), ActivationQuantizer):
            node = nodes.operand(node)
        return nodes.is_own(node) or nodes.role(self._network, node) == "constant"


def as_map(x: Tensor, kind: str, front: int, height: int, width: int) -> Tensor:
    """A map in channels-last form, or the tokens that stand for positions, as (B, C, H, W); nothing is copied."""
    if kind == "last":
        return x.permute(0, 3, 1, 2)
    positions = x.narrow(1, front, height * width)
    return positions.mT.reshape(len(x), -1, height, width)


def with_maps(network: fx.GraphModule, names: list[str]) -> fx.GraphModule:
    """`nodes.with_taps`, with every tap as a map (B, C, H, W); a node that is one is given as it is."""
    layouts = Layouts(network)
    found = {node.name: layouts.of(node) for node in network.graph.nodes if node.name in set(names)}
    tapped = nodes.with_taps(network, names)
    output = next(node for node in tapped.graph.nodes if node.op == "output")
    ((returned, taps),) = output.args
    with tapped.graph.inserting_before(output):
        maps = [_mapped(tapped.graph, tap, found[name]) for tap, name in zip(taps, names, strict=True)]
    output.args = ((returned, maps),)
    tapped.recompile()
    return tapped


def _mapped(graph: fx.Graph, tap: fx.Node, layout: Layout | None) -> fx.Node:
    if layout is None or layout.kind == "map":
        return tap
    return graph.call_function(as_map, (tap, layout.kind, layout.front, *layout.size))
