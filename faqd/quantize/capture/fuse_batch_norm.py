"""Batch norm of a float network folded into the layer before it: the same outputs from fewer operators."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from faqd.quantize import nodes
from faqd.quantize.operators.layer import TRANSPOSED


def fused(traced: fx.GraphModule) -> fx.GraphModule:
    """A copy of `traced` in evaluation mode, without the batch norms that alone read a convolution or linear layer."""
    network = copy.deepcopy(traced).eval()
    calls = Counter(node.target for node in network.graph.nodes)
    for node in list(network.graph.nodes):
        layer: Any = node.args[0] if nodes.role(network, node) == "norm" else None
        if not isinstance(layer, fx.Node) or nodes.role(network, layer) != "compute" or len(layer.users) > 1:
            continue
        # A module that is called at two places has two batch norms, or none at one of them.
        if calls[layer.target] > 1:
            continue
        float_layer: Any = network.get_submodule(str(layer.target))
        if isinstance(float_layer, TRANSPOSED) and float_layer.groups > 1:
            continue  # torch takes its second weight axis for all output channels, and it is those of one group
        merged = _merged(float_layer, network.get_submodule(str(node.target)))
        network.set_submodule(str(layer.target), merged)
        node.replace_all_uses_with(layer)
        network.graph.erase_node(node)
    network.delete_all_unused_submodules()
    network.recompile()
    return network


def _merged(layer: Any, norm: Any) -> nn.Module:
    if not norm.affine:  # torch's function for linear layers cannot do without the factors
        norm.weight, norm.bias = nn.Parameter(torch.ones_like(norm.running_var)), nn.Parameter(0 * norm.running_mean)
    if isinstance(layer, nn.Linear):
        return fuse_linear_bn_eval(layer, norm)
    merged: nn.Module = fuse_conv_bn_eval(layer, norm, isinstance(layer, TRANSPOSED))
    return merged


def in_place(network: fx.GraphModule) -> fx.GraphModule:
    """`network` with rectifiers and sums written over an input that nothing else reads, where that is its own memory.

    For inference with the shapes that are in the meta data. On a CPU fresh memory costs more than the arithmetic.
    """
    for node in list(network.graph.nodes):
        kind = nodes.role(network, node)
        if kind == "rectify" and _may_be_written(network, nodes.operand(node)):
            with network.graph.inserting_before(node):
                new = network.graph.call_function(torch.relu_, (nodes.operand(node),))
        elif kind == "add" and not node.kwargs and (over := _summand(network, node)):
            other = next(operand for operand in node.all_input_nodes if operand is not over)
            with network.graph.inserting_before(node):
                new = network.graph.call_function(Tensor.add_, (over, other))
        else:
            continue
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        network.graph.erase_node(node)
    network.delete_all_unused_submodules()
    network.recompile()
    return network


def _summand(network: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The operand of an addition that the sum may be written over: its shape and type are those of the sum."""
    if len(node.all_input_nodes) != 2 or not all(map(nodes.is_tensor, node.all_input_nodes)):
        return None
    for operand in node.all_input_nodes:
        like = operand.meta["tensor_meta"], node.meta["tensor_meta"]
        if _may_be_written(network, operand) and like[0].shape == like[1].shape and like[0].dtype == like[1].dtype:
            return operand
    return None


def _may_be_written(network: fx.GraphModule, node: fx.Node) -> bool:
    return len(node.users) == 1 and nodes.role(network, node) in ("compute", "norm", "add")
