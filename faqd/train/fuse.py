"""Batch norm of a float network folded into the layer before it: the same outputs from fewer operators."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from faqd.train import graph


def fused(traced: fx.GraphModule) -> fx.GraphModule:
    """A copy of `traced` in evaluation mode, without the batch norms that alone read a convolution or linear layer."""
    network = copy.deepcopy(traced).eval()
    calls = Counter(node.target for node in network.graph.nodes)
    for node in list(network.graph.nodes):
        layer: Any = node.args[0] if graph.role(network, node) == "norm" else None
        if not isinstance(layer, fx.Node) or graph.role(network, layer) != "compute" or len(layer.users) > 1:
            continue
        # A module that is called at two places has two batch norms, or none at one of them.
        if calls[layer.target] > 1:
            continue
        float_layer: Any = network.get_submodule(str(layer.target))
        norm: Any = network.get_submodule(str(node.target))
        fuse: Any = fuse_linear_bn_eval if isinstance(float_layer, nn.Linear) else fuse_conv_bn_eval
        network.set_submodule(str(layer.target), fuse(float_layer, norm))
        node.replace_all_uses_with(layer)
        network.graph.erase_node(node)
    network.delete_all_unused_submodules()
    network.recompile()
    return network
