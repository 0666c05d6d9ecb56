"""Channels of zeros among those of an image, for onnxruntime's convolutions: one at the end, or one behind each.

A fourth channel, because its fast kernels read fours. One behind each where two neighbouring products could saturate on
some CPU (faqd.saturation): a product with zero is added to each instead, and the student stays what it was.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from faqd import saturation
from faqd.quantize import nodes
from faqd.quantize.operators.filling import Filling
from faqd.quantize.operators.layer import CONVOLUTIONS, IntegerLayer
from faqd.quantize.operators.requantize import Requantize
from faqd.quantize.quantizers.activation import ActivationQuantizer
from faqd.quantize.quantizers.layers import weight_quantizer

TOGETHER = 4
"""Input channels that a dot-product instruction takes at once. Other counts go the slower way of im2col and a matrix
product."""
LEAST_OUTPUTS, OUTPUTS_TOGETHER = 16, 8
"""Which counts of output channels have such a kernel: multiples of 8 from 16."""
FEW_PIXELS = 9
"""Of a kernel, up to which zeros pay. In a larger one the matrix product is as fast with three channels as that kernel
with four on a CPU with VNNI, and faster on one without; with eight it is slower on either."""


@dataclass(frozen=True)
class ImageLayers:
    """The layers that read the image, where channels of zeros can be put among its own. at_end: how many follow the
    others because that is faster."""

    nodes: frozenset[fx.Node] = frozenset()
    at_end: int = 0

    def at_end_for(self, node: fx.Node) -> int:
        """Of any layer of the network."""
        return self.at_end if node in self.nodes else 0


def image_layers(network: fx.GraphModule, floats: Collection[fx.Node] = ()) -> ImageLayers:
    """Those of a prepared network: none, unless small convolutions of all channels at once are all that reads the
    image, and read it rounded. floats: layers that will multiply floats."""
    readers = frozenset(_readers_of_the_image(network))
    layers: list[Any] = [nodes.module_of(network, node) for node in readers]
    if not layers or not all(_convolves_all(layer) for layer in layers) or not readers.isdisjoint(floats):
        return ImageLayers()
    faster = layers[0].in_channels % TOGETHER == TOGETHER - 1 and all(_has_a_kernel(layer) for layer in layers)
    return ImageLayers(readers, int(faster))


def _readers_of_the_image(network: fx.GraphModule) -> Iterator[fx.Node]:
    image = next(node for node in network.graph.nodes if node.op == "placeholder")
    if len(image.users) == 1:
        (rounding,) = image.users
        if isinstance(nodes.module_of(network, rounding), ActivationQuantizer):
            yield from rounding.users


def _convolves_all(layer: Any) -> bool:
    rounded = isinstance(layer, CONVOLUTIONS) and weight_quantizer(layer) is not None
    return rounded and layer.groups == 1 and math.prod(layer.kernel_size) <= FEW_PIXELS


def _has_a_kernel(layer: Any) -> bool:
    outputs: int = layer.out_channels
    return outputs >= LEAST_OUTPUTS and outputs % OUTPUTS_TOGETHER == 0


def fill_up_channels(network: fx.GraphModule, found: ImageLayers) -> None:
    """Put zeros among the channels of the image, in the lowered network, where `found` allows it.

    The codes are filled up, not the image: a quarter of the bytes to copy.
    """
    layers = [layer for node in found.nodes if isinstance(layer := nodes.module_of(network, node), IntegerLayer)]
    if not layers or len(layers) < len(found.nodes):
        return
    (rounding_node,) = {nodes.operand(node) for node in found.nodes}
    rounding = nodes.module_of(network, rounding_node)
    assert isinstance(rounding, Requantize)
    _fill([rounding, *layers], Filling(found.at_end))
    limit = saturation.pair_limit(rounding.quant.high + saturation.zero_point(rounding.quant))
    if any(layer.largest_pair() > limit for layer in layers):
        _fill([rounding, *layers], Filling(layers[0].codes.shape[1] % 2, behind_each=True))


def _fill(modules: list[Requantize | IntegerLayer], filling: Filling) -> None:
    for module in modules:
        module.filling = filling
