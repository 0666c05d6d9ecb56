"""A fourth channel of zeros beside the three of an image: onnxruntime's fast integer convolutions read fours."""

from __future__ import annotations

from torch import fx

from faqd.train import graph
from faqd.train.deployed import IntegerLayer, Requantize

TOGETHER = 4
"""Input channels that a dot-product instruction takes at once. Other counts go the slower way of im2col and a matrix
product."""
LEAST_OUTPUTS, OUTPUTS_TOGETHER = 16, 8
"""Which counts of output channels have such a kernel: multiples of 8 from 16."""


def fill_up_channels(network: fx.GraphModule) -> None:
    """Let the convolutions that read the rounded network input read a multiple of four channels, if one is missing.

    The codes are filled up, not the image: a quarter of the bytes to copy.
    """
    for node in network.graph.nodes:
        if node.op != "placeholder" or len(node.users) != 1 or graph.shape(node)[1] % TOGETHER != TOGETHER - 1:
            continue
        (reader,) = node.users
        rounding = graph.module_of(network, reader)
        modules = [graph.module_of(network, other) for other in reader.users]
        layers = [module for module in modules if isinstance(module, IntegerLayer) and _has_a_kernel(module)]
        if isinstance(rounding, Requantize) and len(layers) == len(modules):
            rounding.spare_channels = 1
            for layer in layers:
                layer.spare_inputs = 1


def _has_a_kernel(layer: IntegerLayer) -> bool:
    outputs = layer.codes.shape[0]
    fits = outputs >= LEAST_OUTPUTS and outputs % OUTPUTS_TOGETHER == 0
    return fits and layer.operator == "Conv" and layer.geometry["groups"] == 1
