"""Operators that read a parameter or a buffer of the user's module: as the layer or the numbers that they are.

F.conv2d(x, self.weight) becomes a convolution, self.scale * x and (x - self.mean) / self.std become Scaled.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from faqd.train import graph
from faqd.train.elementwise import Scaled


def with_own_tensors(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that `node` is (shapes propagated), which then reads one tensor alone; None where it is none."""
    if node.op == "call_function" and node.target in _LAYERS:
        return _layer(traced, node)
    make = _SUMS.get(node.target if node.op == "call_function" else str(node.target))
    held = [argument for argument in node.all_input_nodes if argument.op == "get_attr"]
    if make is None or len(held) != 1 or len(node.args) != 2 or node.kwargs or node.op == "call_module":
        return None
    (own,) = held
    x = next((argument for argument in node.all_input_nodes if argument is not own), None)
    if x is None or graph.shape(node) != graph.shape(x) or not _spares_the_batch(own, x):
        return None
    scaled = make(graph.held_tensor(traced, own), node.args[0] is own)
    if scaled is not None:
        node.args = (x,)
    return scaled


def _spares_the_batch(own: fx.Node, x: fx.Node) -> bool:
    sizes, dimensions = graph.shape(own), len(graph.shape(x))
    return len(sizes) < dimensions or (len(sizes) == dimensions and sizes[0] == 1)


# Sums and products: (the tensor, whether it stands first) -> module ------------------------------------------------


def _difference(own: Tensor, first: bool) -> Scaled:
    return Scaled(-1.0, own) if first else Scaled(1.0, _like(own, -own))


def _quotient(own: Tensor, first: bool) -> Scaled | None:
    return None if first else Scaled(_like(own, 1 / own), 0.0)


def _like(own: Tensor, value: Tensor) -> Tensor:
    """`value` as what `own` is: a parameter is trained, a buffer is not."""
    return nn.Parameter(value.detach()) if isinstance(own, nn.Parameter) else value


def _sum(own: Tensor, first: bool) -> Scaled:
    return Scaled(1.0, own)


def _product(own: Tensor, first: bool) -> Scaled:
    return Scaled(own, 0.0)


_SUMS: dict[Any, Callable[[Tensor, bool], Scaled | None]] = {
    **dict.fromkeys((operator.add, torch.add, "add"), _sum),
    **dict.fromkeys((operator.sub, torch.sub, "sub"), _difference),
    **dict.fromkeys((operator.mul, torch.mul, "mul"), _product),
    **dict.fromkeys((operator.truediv, torch.div, "div"), _quotient),
}


# Layers -----------------------------------------------------------------------------------------------------------

_LAYERS: dict[Any, tuple[str, ...]] = {
    F.linear: (),
    **dict.fromkeys((F.conv1d, torch.conv1d, F.conv2d, torch.conv2d), ("stride", "padding", "dilation", "groups")),
}
_KINDS: dict[Any, Any] = {F.conv1d: nn.Conv1d, torch.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, torch.conv2d: nn.Conv2d}


def _layer(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    names = ("input", "weight", "bias", *_LAYERS[node.target])
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    x, weight, bias = given.pop("input", None), given.pop("weight", None), given.pop("bias", None)
    held = [own for own in (weight, bias) if own is not None]
    if not isinstance(x, fx.Node) or any(not isinstance(n, fx.Node) or n.op != "get_attr" for n in held):
        return None
    values = graph.held_tensor(traced, weight)
    layer: Any
    if node.target is F.linear:
        layer = nn.Linear(values.shape[1], values.shape[0], bias is not None)
    else:
        inputs, kernel = values.shape[1] * given.get("groups", 1), tuple(values.shape[2:])
        layer = _KINDS[node.target](inputs, values.shape[0], kernel, bias=bias is not None, **given)
    layer.weight = _parameter(values)
    if bias is not None:
        layer.bias = _parameter(graph.held_tensor(traced, bias))
    node.args, node.kwargs = (x,), {}
    return layer  # type: ignore[no-any-return]


def _parameter(own: Tensor) -> nn.Parameter:
    """What the module trains, or a fixed filter, which is not trained."""
    return own if isinstance(own, nn.Parameter) else nn.Parameter(own, requires_grad=False)
