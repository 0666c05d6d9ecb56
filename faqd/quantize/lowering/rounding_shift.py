"""Rounding up, deployed: the shift in front of a rounding to nearest, carried by the bias of the layer before it."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from faqd.quantize import nodes
from faqd.quantize.operators.norm import ChannelAffine
from faqd.quantize.quantizers.activation import ActivationQuantizer

_PLAIN_SUMS = (operator.add,)


def place_shifts(network: fx.GraphModule) -> dict[fx.Node, Tensor]:
    """The layers and batch norms of a prepared network whose output is to be moved, and by how much (float64 scalar).

    On a residual it is the branch: the shortcut has other readers. Where no output may be moved, because something
    else reads it, an addition of its own is put in front of the rounding.
    """
    shifts: dict[fx.Node, Tensor] = {}
    for node in list(network.graph.nodes):
        module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, ActivationQuantizer) or not module.shift:
            continue
        amount = module.scale.detach().double() * module.shift
        source = nodes.operand(node)
        carrier = _carrier(network, source)
        if carrier is None:
            path = f"{node.target}_shift"
            network.add_submodule(path, ChannelAffine(torch.ones(()), amount))
            with network.graph.inserting_before(node):
                node.replace_input_with(source, network.graph.call_module(path, (source,)))
        else:
            shifts[carrier] = amount
    return shifts


def _carrier(network: fx.GraphModule, source: fx.Node) -> fx.Node | None:
    if source.op == "placeholder" or len(source.users) > 1:
        return None
    if nodes.role(network, source) in ("compute", "norm"):
        return source
    if source.target in _PLAIN_SUMS and len(source.args) == 2 and not source.kwargs:
        operands = nodes.tensor_inputs(source)
        found = (n for n in operands if len(n.users) == 1 and nodes.role(network, n) in ("compute", "norm"))
        return next(found, None) if len(operands) == 2 else None
    return None
