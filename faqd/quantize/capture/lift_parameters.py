"""Operators that read a parameter or a buffer of the user's module: as the layer or the numbers that they are.

F.conv2d(x, self.weight) becomes a convolution, self.scale * x and (x - self.mean) / self.std become Scaled. What is
made of such tensors and of sizes alone, as self.scale.view(1, -1, 1, 1) or a grid of coordinates, is one more, made
once, here, not for every image. Where it is expanded to the batch and joined to a map, it is a Constant.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from faqd.quantize import nodes
from faqd.quantize.operators.arithmetic import Scaled
from faqd.quantize.operators.layer import layer_with
from faqd.quantize.operators.norm import fixed_norm, norm_with
from faqd.quantize.operators.shape import Constant


def with_own_tensors(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that `node` is (shapes propagated), which then reads one tensor alone; None where it is none."""
    layer = layer_of(traced, node, len(nodes.shape(node)))
    if layer is not None:
        node.args, node.kwargs = (nodes.operand(node),), {}
        return layer
    make = _SUMS.get(node.target)
    if make is None or len(node.args) != 2 or node.kwargs or node.op == "call_module":
        return None
    held: list[tuple[Any, Tensor]] = [
        (argument, own) for argument in node.args if (own := _own(traced, _unexpanded(argument))) is not None
    ]
    if len(held) != 1:
        return None
    ((place, own),) = held
    x = next((argument for argument in node.all_input_nodes if argument is not place), None)
    if x is None:
        return None
    own = own if place.op == "get_attr" else _of_one_image(own, node)
    if nodes.shape(node) != nodes.shape(x) or not _spares_the_batch(own, x):
        return None
    scaled = make(own, node.args[0] is place)
    if scaled is not None:
        node.args = (x,)
    return scaled


def _spares_the_batch(own: Tensor, x: fx.Node) -> bool:
    dimensions = len(nodes.shape(x))
    return own.dim() < dimensions or (own.dim() == dimensions and own.shape[0] == 1)


def _unexpanded(argument: Any) -> Any:
    """What is expanded to the size of an operator's other side, which the operator does by itself."""
    expands = isinstance(argument, fx.Node) and argument.target in (Tensor.expand, Tensor.expand_as)
    return argument.args[0] if expands else argument


def _own(traced: fx.GraphModule, node: Any, *, learned: bool = False) -> Tensor | None:
    """The tensor that `node` is, where it depends on the network's own tensors and on sizes alone; None for others.

    A parameter is trained as long as its values are moved. What is computed from one keeps the teacher's values: as a
    factor of a norm it stands still, and if `learned`, as the weights of a layer, it is a parameter of the student's.
    """
    value = _value(traced, node, learned) if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _value(traced: fx.GraphModule, node: fx.Node, learned: bool) -> Any:
    if node.op == "get_attr":
        return nodes.held_tensor(traced, node)
    if not nodes.is_own(node) or nodes.is_fixed(node) or not node.op.startswith("call"):
        return None
    read = {each: _value(traced, each, learned) for each in node.all_input_nodes if not nodes.is_fixed(each)}
    moves = nodes.role(traced, node) == "reshape" or node.target in (Tensor.expand, Tensor.repeat)
    trained = any(isinstance(value, nn.Parameter) for value in read.values()) and (moves or learned)
    if any(value is None for value in read.values()) or _is_random(node.target):
        return None
    function: Any = nodes.module_of(traced, node) or node.target
    if isinstance(function, nn.Module) and function.state_dict():
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: read.get(each, nodes.fixed(each)))
    with torch.no_grad():
        value = function(*args, **kwargs)
    return nn.Parameter(value) if trained and isinstance(value, Tensor) and value.is_floating_point() else value


def _is_random(target: Any) -> bool:
    return isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def _of_one_image(own: Tensor, node: fx.Node) -> Tensor:
    """`own` without what was expanded to the batch of `node`, a batch of equal images."""
    shape = nodes.shape(node)
    expanded = own.dim() == len(shape) and own.shape[0] == shape[0] and torch.equal(own, own[:1].expand_as(own))
    return _like(own, own[:1]) if expanded else own


def join_constants(traced: fx.GraphModule, node: fx.Node, place: str) -> None:
    """Let a concatenation read the network's own tensors as Constants, as many as it reads images of the others."""
    if nodes.role(traced, node) != "concat":
        return
    own = {each: value for each in nodes.tensor_inputs(node) if (value := _own(traced, each)) is not None}
    images = next((each for each in nodes.tensor_inputs(node) if each not in own), None)
    for each, value in own.items() if images is not None else ():
        path = nodes.unused(f"{place}_constant", {name for name, _ in traced.named_modules()})
        traced.add_submodule(path, Constant(_of_one_image(value, node)))
        with traced.graph.inserting_before(node):
            constant = traced.graph.call_module(path, (images,))
        constant.meta, constant.stack_trace = {"tensor_meta": each.meta["tensor_meta"]}, node.stack_trace
        node.replace_input_with(each, constant)


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
    operator.add: _sum,
    operator.sub: _difference,
    operator.mul: _product,
    operator.truediv: _quotient,
}


# Layers -----------------------------------------------------------------------------------------------------------

_KINDS: dict[Any, Any] = {
    F.linear: nn.Linear,
    F.conv1d: nn.Conv1d,
    F.conv2d: nn.Conv2d,
    F.conv_transpose1d: nn.ConvTranspose1d,
    F.conv_transpose2d: nn.ConvTranspose2d,
}
_NORM = torch.ops.aten.batch_norm.default
_TENSORS = ("weight", "bias", "running_mean", "running_var")


def layer_of(traced: fx.GraphModule, node: fx.Node, dimensions: int) -> nn.Module | None:
    """The layer or the batch norm that a function with tensors of the network's own is; None where it is none.

    dimensions: of its result.
    """
    if node.target not in _KINDS and node.target is not _NORM:
        return None
    arguments: Any = node.args
    x, *tensors = arguments[:5] if node.target is _NORM else arguments
    given = {name: tensor for name, tensor in zip(_TENSORS, tensors, strict=False) if tensor is not None}
    own = {name: _own(traced, tensor, learned=name in ("weight", "bias")) for name, tensor in given.items()}
    found = {name: tensor for name, tensor in own.items() if tensor is not None}
    if not isinstance(x, fx.Node) or not own or len(found) < len(own):
        return None
    if node.target is not _NORM:
        return layer_with(_KINDS[node.target], found["weight"], found.get("bias"), dict(node.kwargs))
    training, momentum, eps = arguments[5:8]
    statistics = "running_mean" in found and "running_var" in found and not training
    return norm_with(found, dimensions, eps, momentum) if statistics else None


# Batch norm written out -------------------------------------------------------------------------------------------


def norm_of_constants(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The batch norm that sums and products with numbers and buffers make behind a layer, as frozen ones are written,
    with a parameter as factor and one as offset behind them: `node` is the last of them, and then reads the layer. None
    for any others."""
    if any(isinstance(nodes.module_of(traced, reader), Scaled) for reader in node.users):
        return None
    chain, made = [], node
    while isinstance(scaled := nodes.module_of(traced, made), Scaled):
        if made is not node and len(made.users) > 1:
            return None
        chain.append(scaled)
        made = nodes.operand(made)
    beta = gamma = None
    if chain and _is_learned(chain[0].offset, chain[0].factor, 1.0):
        beta = torch.as_tensor(chain.pop(0).offset)
    if chain and _is_learned(chain[0].factor, chain[0].offset, 0.0):
        gamma = torch.as_tensor(chain.pop(0).factor)
    if not chain or any(True for scaled in chain for _ in scaled.parameters()):
        return None
    factor, offset = torch.ones(()), torch.zeros(())
    for scaled in chain:
        factor, offset = factor * scaled.factor, offset + factor * scaled.offset
    if nodes.role(traced, made) != "compute" or len(made.users) > 1:
        return None
    whole = torch.broadcast_tensors(factor, offset)[0]
    if not all(_is_per_channel(value, node) for value in (whole, beta, gamma) if value is not None):
        return None
    if (gamma is not None or beta is not None) and not bool((factor > 0).all()):
        return None
    node.args = (made,)
    kind = fixed_norm(len(nodes.shape(node)))
    factor, offset = (value.expand_as(whole).reshape(-1) for value in (factor, offset))
    return kind(factor, offset, gamma, beta)


def _is_learned(value: Any, other: Any, neutral: float) -> bool:
    return isinstance(value, nn.Parameter) and not isinstance(other, Tensor) and other == neutral


def _is_per_channel(value: Any, node: fx.Node) -> bool:
    """Whether a tensor has one number for each channel of `node`, and meets it so."""
    channels, dimensions = nodes.shape(node)[1], len(nodes.shape(node))
    shape = (channels, *[1] * (dimensions - 2))
    return value.dim() > 0 and tuple(value.shape[-len(shape) :]) == shape and value.numel() == channels
