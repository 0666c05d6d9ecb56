"""What makes the channels of a tensor: weight and bias of a layer or a norm, by which they can be multiplied."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from faqd.quantize import nodes
from faqd.quantize.channel_readers import axis_behind
from faqd.quantize.operators.arithmetic import Scaled
from faqd.quantize.operators.layer import TRANSPOSED
from faqd.quantize.operators.norm import NORM

Own = tuple[Tensor, Callable[[Tensor], Tensor]]
"""A tensor of the network's own, and the form in which t (channels) meets it."""


def producer_of(network: fx.GraphModule, node: fx.Node, axis: int, keep: Collection[str]) -> list[Own] | None:
    """Multiplied by t > 0, these multiply the channels on `axis` of a tensor by t, and nothing else in the network.

    None where there is no such thing, or where a node of `keep` would be multiplied with it. Shapes propagated.
    """
    found: list[Own] = []
    source = node
    while source.name not in keep and (source is node or len(source.users) == 1):
        module: Any = nodes.module_of(network, source)
        if (own := _own_of(network, source, axis)) is not None:
            return found + own
        if isinstance(module, Scaled) and _is(module.factor, 1.0) and (offset := _meets(module.offset, source, axis)):
            found.append(offset)
        elif not (nodes.role(network, source) == "rectify" or isinstance(module, nn.LeakyReLU | nn.PReLU)):
            before = _axis_before(network, source, axis)
            if before is None:
                return None
            axis = before
        source = nodes.operand(source)
    return None


def _axis_before(network: fx.GraphModule, node: fx.Node, axis: int) -> int | None:
    """Where the channels on `axis` stood in the tensor that a node moves; None for what does more."""
    rank = len(nodes.shape(nodes.operand(node))) if node.all_input_nodes else 0
    return next((before for before in range(rank) if axis_behind(network, node, before) == axis), None)


def _own_of(network: fx.GraphModule, node: fx.Node, axis: int) -> list[Own] | None:
    """Weight and bias of a layer or a norm; None for any other node, and without a weight for each channel."""
    module: Any = nodes.module_of(network, node)
    last = len(nodes.shape(node)) - 1
    if isinstance(module, TRANSPOSED):
        return _with_bias((module.weight, _by_group(module)), module.bias)
    if module is not None and nodes.role(network, node) == "compute":
        return _with_bias((module.weight, _first_of(module.weight.dim())), module.bias)
    if isinstance(module, Scaled):
        factor, offset = _meets(module.factor, node, axis), _meets(module.offset, node, axis)
        if factor is None or (offset is None and not _is(module.offset, 0.0)):
            return None
        return [factor] if offset is None else [factor, offset]
    weight, bias = _of_norm(network, node)
    channels = 1 if isinstance(module, (*NORM, nn.GroupNorm)) or node.target is _GROUP_NORM else last
    if weight is None or weight.dim() != 1 or axis != channels:
        return None
    return _with_bias((weight, _first_of(1)), bias)


def _of_norm(network: fx.GraphModule, node: fx.Node) -> tuple[Tensor | None, Tensor | None]:
    module: Any = nodes.module_of(network, node)
    if isinstance(module, (*NORM, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)):
        return module.weight, getattr(module, "bias", None)
    if node.target not in _NORM_FUNCTIONS:
        return None, None
    target: Any = node.target
    given = dict(zip((argument.name for argument in target._schema.arguments), node.args, strict=False)) | node.kwargs
    held = [given.get(name) for name in ("weight", "bias")]
    weight, bias = (
        nodes.held_tensor(network, read) if isinstance(read, fx.Node) and read.op == "get_attr" else None
        for read in held
    )
    return (None, None) if held[1] is not None and bias is None else (weight, bias)


_GROUP_NORM = torch.ops.aten.group_norm.default
_NORM_FUNCTIONS = (torch.ops.aten.layer_norm.default, torch.ops.aten.rms_norm.default, _GROUP_NORM)


def _with_bias(weight: Own, bias: Tensor | None) -> list[Own]:
    return [weight] if bias is None else [weight, (bias, _first_of(1))]


def _first_of(rank: int) -> Callable[[Tensor], Tensor]:
    """t on the first of so many axes."""
    return lambda t: t.reshape(-1, *[1] * (rank - 1))


def _by_group(layer: Any) -> Callable[[Tensor], Tensor]:
    """t on the second axis of a transposed convolution's weight, where each group has output channels of its own."""
    inputs, groups, rank = layer.in_channels, layer.groups, layer.weight.dim()
    return lambda t: (
        t.reshape(groups, 1, -1).expand(groups, inputs // groups, -1).reshape(inputs, -1, *[1] * (rank - 2))
    )


def _is(number: float | Tensor, neutral: float) -> bool:
    return isinstance(number, float) and number == neutral


def _meets(number: Any, node: fx.Node, axis: int) -> Own | None:
    """A parameter that has a number for each channel on `axis` of the tensor that it meets."""
    behind = len(nodes.shape(node)) - 1 - axis
    if not isinstance(number, nn.Parameter) or number.dim() <= behind:
        return None
    return (number, _first_of(behind + 1)) if number.shape[-1 - behind] == nodes.shape(node)[axis] else None
