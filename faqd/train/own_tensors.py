"""Operators that read a parameter or a buffer of the user's module: as the layer or the numbers that they are.

F.conv2d(x, self.weight) becomes a convolution, self.scale * x and (x - self.mean) / self.std become Scaled. A tensor of
the user's that is only moved, such as self.scale.view(1, -1, 1, 1), is one more; moved once, here, not for every image.
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
    layer = layer_of(traced, node, len(graph.shape(node)))
    if layer is not None:
        node.args, node.kwargs = (graph.operand(node),), {}
        return layer
    make = _SUMS.get(node.target if node.op == "call_function" else str(node.target))
    if make is None or len(node.args) != 2 or node.kwargs or node.op == "call_module":
        return None
    held = [(argument, own) for argument in node.args if (own := _own(traced, _unexpanded(argument))) is not None]
    if len(held) != 1:
        return None
    ((place, own),) = held
    x = next((argument for argument in node.all_input_nodes if argument is not place), None)
    if x is None or graph.shape(node) != graph.shape(x) or not _spares_the_batch(own, x):
        return None
    scaled = make(own, node.args[0] is place)
    if scaled is not None:
        node.args = (x,)
    return scaled


def _spares_the_batch(own: Tensor, x: fx.Node) -> bool:
    dimensions = len(graph.shape(x))
    return own.dim() < dimensions or (own.dim() == dimensions and own.shape[0] == 1)


def _unexpanded(argument: Any) -> Any:
    """What is expanded to the size of an operator's other side, which the operator does by itself."""
    expands = isinstance(argument, fx.Node) and argument.target in ("expand", "expand_as")
    return argument.args[0] if expands else argument


def _own(traced: fx.GraphModule, node: Any) -> Tensor | None:
    """The parameter or buffer that `node` is, where operators move its values in their new places; None for a tensor
    that something else makes."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "get_attr":
        return graph.held_tensor(traced, node)
    if graph.role(traced, node) != "reshape" or not graph.is_tensor(node) or not node.args:
        return None
    first, *others = node.args
    own = _own(traced, first)
    if own is None:
        return None
    if len(node.all_input_nodes) > 1:  # a size that was read from another tensor
        return _like(own, own.reshape(graph.shape(node))) if node.target in _BY_SIZES else None
    function: Any = graph.module_of(traced, node) or node.target
    function = getattr(Tensor, function) if isinstance(function, str) else function
    return _like(own, function(own, *others, **node.kwargs))


_BY_SIZES = ("view", "reshape", torch.reshape)


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

_GEOMETRY = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    **dict.fromkeys((F.conv1d, torch.conv1d, F.conv2d, torch.conv2d), _GEOMETRY),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d), _TRANSPOSED),
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: (
        *("input", "weight", "bias", "running_mean", "running_var"),
        *("training", "momentum", "eps", "cudnn_enabled"),
    ),
}
_KINDS: dict[Any, Any] = {
    F.conv1d: nn.Conv1d,
    F.conv2d: nn.Conv2d,
    F.conv_transpose1d: nn.ConvTranspose1d,
    F.conv_transpose2d: nn.ConvTranspose2d,
}


def layer_of(traced: fx.GraphModule, node: fx.Node, dimensions: int) -> nn.Module | None:
    """The layer or the batch norm that a function with tensors of the network's own is; None where it is none.

    dimensions: of its result.
    """
    if node.op != "call_function" or node.target not in _ARGUMENTS:
        return None
    given: dict[str, Any] = dict(zip(_ARGUMENTS[node.target], node.args, strict=False)) | node.kwargs
    x = given.pop("input", None)
    tensors = ("weight", "bias", "running_mean", "running_var")
    own = {name: _own(traced, given[name]) for name in tensors if given.get(name) is not None}
    if not isinstance(x, fx.Node) or not own or None in own.values():
        return None
    others = {name: value for name, value in given.items() if name not in tensors}
    made = _norm(own, others, dimensions) if "training" in _ARGUMENTS[node.target] else _layer(node, own, others)
    for name, value in own.items():
        if made is not None and value is not None and name in ("weight", "bias"):
            setattr(made, name, _parameter(value))
    return made


def _layer(node: fx.Node, own: dict[str, Any], geometry: dict[str, Any]) -> nn.Module:
    rows, columns, *kernel = own["weight"].shape
    if node.target is F.linear:
        return nn.Linear(columns, rows, "bias" in own)
    kind, groups = _KINDS[node.target], geometry.get("groups", 1)
    inputs, outputs = (columns * groups, rows) if kind in (nn.Conv1d, nn.Conv2d) else (rows, columns * groups)
    layer: nn.Module = kind(inputs, outputs, tuple(kernel), bias="bias" in own, **geometry)
    return layer


def _norm(own: dict[str, Any], given: dict[str, Any], dimensions: int) -> nn.Module | None:
    """The batch norm of F.batch_norm with statistics of the network's own, which does not take those of a batch."""
    if given.get("training", False) or "running_mean" not in own or "running_var" not in own:
        return None
    kind = nn.BatchNorm2d if dimensions == 4 else nn.BatchNorm1d
    settings = {name: given[name] for name in ("momentum", "eps") if name in given}
    norm = kind(len(own["running_mean"]), affine="weight" in own or "bias" in own, **settings)
    for name in ("running_mean", "running_var"):
        norm.register_buffer(name, own[name].detach())
    return norm.eval()


def _parameter(own: Tensor) -> nn.Parameter:
    """What the module trains, or a fixed filter, which is not trained."""
    return own if isinstance(own, nn.Parameter) else nn.Parameter(own, requires_grad=False)
