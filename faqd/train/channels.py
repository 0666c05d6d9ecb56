"""Channels of zeros among those of an image, for onnxruntime's convolutions: one at the end, or one behind each.

A fourth channel, because its fast kernels read fours. One behind each where two neighbouring products could saturate on
some CPU (faqd.saturation): a product with zero is added to each instead, and the student stays what it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from faqd import saturation
from faqd.train import graph
from faqd.train.deployed import Filling, IntegerLayer, Requantize
from faqd.train.layers import latent_weight, weight_quantizer
from faqd.train.quantizers import ActivationQuantizer

TOGETHER = 4
"""Input channels that a dot-product instruction takes at once. Other counts go the slower way of im2col and a matrix
product."""
LEAST_OUTPUTS, OUTPUTS_TOGETHER = 16, 8
"""Which counts of output channels have such a kernel: multiples of 8 from 16."""
FEW_PRODUCTS = 0.02
"""Share of a network's products up to which those of the layers that read the image may be doubled."""


@dataclass(frozen=True)
class ImageLayers:
    """The layers that read the image, where channels of zeros can be put among its own.

    at_end: how many follow the others because that is faster. doubled: whether one more may stand behind each.
    """

    nodes: frozenset[fx.Node] = frozenset()
    at_end: int = 0
    doubled: bool = False

    def at_end_for(self, node: fx.Node) -> int:
        """Of any layer of the network."""
        return self.at_end if node in self.nodes else 0


def image_layers(network: fx.GraphModule) -> ImageLayers:
    """Those of a prepared network: none, unless convolutions of all channels at once are all that reads the image, and
    read it rounded."""
    nodes = frozenset(_readers_of_the_image(network))
    layers: list[Any] = [graph.module_of(network, node) for node in nodes]
    if not layers or not all(_convolves_all(layer) for layer in layers):
        return ImageLayers()
    faster = layers[0].in_channels % TOGETHER == TOGETHER - 1 and all(_has_a_kernel(layer) for layer in layers)
    products = {node: _products(network, node) for node in network.graph.nodes}
    of_the_image = sum(products[node] for node in nodes)
    return ImageLayers(nodes, int(faster), of_the_image <= FEW_PRODUCTS * sum(products.values()))


def _readers_of_the_image(network: fx.GraphModule) -> Iterator[fx.Node]:
    image = next(node for node in network.graph.nodes if node.op == "placeholder")
    if len(image.users) == 1:
        (rounding,) = image.users
        if isinstance(graph.module_of(network, rounding), ActivationQuantizer):
            yield from rounding.users


def _convolves_all(layer: Any) -> bool:
    return isinstance(layer, graph.CONVOLUTIONS) and weight_quantizer(layer) is not None and layer.groups == 1


def _has_a_kernel(layer: Any) -> bool:
    outputs: int = layer.out_channels
    return outputs >= LEAST_OUTPUTS and outputs % OUTPUTS_TOGETHER == 0


def _products(network: fx.GraphModule, node: fx.Node) -> int:
    """How many numbers a layer multiplies for the example image."""
    if graph.role(network, node) != "compute":
        return 0
    layer: Any = graph.module_of(network, node)
    if isinstance(layer, graph.TRANSPOSED):
        places = graph.shape(graph.operand(node))[2:]
    else:
        places = graph.shape(node)[2:] if isinstance(layer, graph.CONVOLUTIONS) else graph.shape(node)[1:-1]
    return int(latent_weight(layer).numel() * math.prod(places))


def fill_up_channels(network: fx.GraphModule, found: ImageLayers) -> None:
    """Put zeros among the channels of the image, in the lowered network, where `found` allows it.

    The codes are filled up, not the image: a quarter of the bytes to copy.
    """
    layers = [layer for node in found.nodes if isinstance(layer := graph.module_of(network, node), IntegerLayer)]
    if not layers or len(layers) < len(found.nodes):
        return
    (rounding_node,) = {graph.operand(node) for node in found.nodes}
    rounding = graph.module_of(network, rounding_node)
    assert isinstance(rounding, Requantize)
    _fill([rounding, *layers], Filling(found.at_end))
    limit = saturation.pair_limit(rounding.quant.high + saturation.zero_point(rounding.quant))
    if any(layer.largest_pair() > limit for layer in layers):
        _fill([rounding, *layers], Filling(layers[0].codes.shape[1] % 2, behind_each=True))


def _fill(modules: list[Requantize | IntegerLayer], filling: Filling) -> None:
    for module in modules:
        module.filling = filling
