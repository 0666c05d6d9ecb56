"""Channels of zeros among those of an image, for onnxruntime's convolutions: one at the end, or one behind each.

A fourth channel, because its fast kernels read fours. One behind each where two neighbouring products could saturate on
some CPU (faqd.saturation): a product with zero is added to each instead, and the student stays what it was.
"""

from __future__ import annotations

from torch import fx

from faqd import saturation
from faqd.train import graph
from faqd.train.deployed import Filling, IntegerLayer, Requantize
from faqd.train.layers import weight_quantizer
from faqd.train.quantizers import ActivationQuantizer

TOGETHER = 4
"""Input channels that a dot-product instruction takes at once. Other counts go the slower way of im2col and a matrix
product."""
LEAST_OUTPUTS, OUTPUTS_TOGETHER = 16, 8
"""Which counts of output channels have such a kernel: multiples of 8 from 16."""


def readers_of_the_image(network: fx.GraphModule) -> list[fx.Node]:
    """The layers that read the rounded network input, if channels can be put among its own: where they alone read it,
    all of them convolutions of all channels at once."""
    for node in network.graph.nodes:
        if node.op == "placeholder" and len(node.users) == 1:
            (rounding,) = node.users
            readers = list(rounding.users)
            known = isinstance(graph.module_of(network, rounding), ActivationQuantizer | Requantize)
            return readers if known and all(_convolves_all(network, reader) for reader in readers) else []
    return []


def _convolves_all(network: fx.GraphModule, node: fx.Node) -> bool:
    layer = graph.module_of(network, node)
    if isinstance(layer, IntegerLayer):
        return layer.operator == "Conv" and layer.geometry["groups"] == 1
    return isinstance(layer, graph.CONVOLUTIONS) and weight_quantizer(layer) is not None and layer.groups == 1


def fill_up_channels(network: fx.GraphModule) -> None:
    """Put zeros among the channels of the image where that is faster, or keeps sums from saturating.

    The codes are filled up, not the image: a quarter of the bytes to copy.
    """
    layers = [
        layer for node in readers_of_the_image(network) if isinstance(layer := _module(network, node), IntegerLayer)
    ]
    if not layers:
        return
    (rounding_node,) = {graph.operand(node) for node in readers_of_the_image(network)}
    rounding = _module(network, rounding_node)
    assert isinstance(rounding, Requantize)
    channels = layers[0].codes.shape[1]
    faster = channels % TOGETHER == TOGETHER - 1 and all(map(_has_a_kernel, layers))
    filling = Filling(int(faster))
    for layer in layers:
        layer.filling = filling
    limit = saturation.pair_limit(rounding.quant.high + saturation.zero_point(rounding.quant))
    if any(layer.largest_pair() > limit for layer in layers):
        filling = Filling(channels % 2, behind_each=True)
    rounding.filling = filling
    for layer in layers:
        layer.filling = filling


def _module(network: fx.GraphModule, node: fx.Node) -> object:
    return graph.module_of(network, node)


def _has_a_kernel(layer: IntegerLayer) -> bool:
    outputs = layer.codes.shape[0]
    return outputs >= LEAST_OUTPUTS and outputs % OUTPUTS_TOGETHER == 0
