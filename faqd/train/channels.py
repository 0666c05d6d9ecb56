"""A fourth channel of zeros beside the three of an image: onnxruntime's fast integer convolutions read fours."""

from __future__ import annotations

from torch import fx

from faqd.train import graph
from faqd.train.deployed import IntegerLayer, Requantize, SpareChannels

TOGETHER = 4
"""Input channels that a dot-product instruction takes at once. Other counts go the slower way of im2col and a matrix
product."""
LEAST_OUTPUTS, OUTPUTS_TOGETHER = 16, 8
"""Which counts of output channels have such a kernel: multiples of 8 from 16."""


def fill_up_channels(network: fx.GraphModule) -> None:
    """Let the convolutions that read the rounded network input read a multiple of four channels, if one is missing.

    The input is filled up in float, before its rounding: behind it a backend would see no code.
    """
    for node in list(network.graph.nodes):
        if node.op != "placeholder" or len(node.users) != 1 or graph.shape(node)[1] % TOGETHER != TOGETHER - 1:
            continue
        (rounding,) = node.users
        modules = [graph.module_of(network, reader) for reader in rounding.users]
        layers = [module for module in modules if isinstance(module, IntegerLayer) and _has_a_kernel(module)]
        if isinstance(graph.module_of(network, rounding), Requantize) and len(layers) == len(modules):
            for layer in layers:
                layer.spare_inputs = 1
            path = f"{node.target}_filled"
            network.add_submodule(path, SpareChannels(1))
            with network.graph.inserting_after(node):
                graph.read_instead(node, network.graph.call_module(path, (node,)))


def _has_a_kernel(layer: IntegerLayer) -> bool:
    outputs = layer.codes.shape[0]
    fits = outputs >= LEAST_OUTPUTS and outputs % OUTPUTS_TOGETHER == 0
    return fits and layer.operator == "Conv" and layer.geometry["groups"] == 1
