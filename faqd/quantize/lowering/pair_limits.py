"""Which layers have to keep neighbouring weight codes small, so that onnxruntime's file means the same on every CPU."""

from __future__ import annotations

from typing import Any

from torch import fx

from faqd import saturation
from faqd.quant import Quant
from faqd.quantize import nodes
from faqd.quantize.operators.layer import CONVOLUTIONS, TRANSPOSED

LARGEST_INT8 = 127


def pair_limit(network: fx.GraphModule, node: fx.Node, read: Quant) -> int | None:
    """What two neighbouring codes of one sign may add up to in a layer that reads this grid.

    None where any may: the grid is narrow enough, the layer computes floats, or its kernels have one channel each,
    whose products are added alone.
    """
    layer: Any = nodes.module_of(network, node)
    if isinstance(layer, TRANSPOSED):
        return None
    if isinstance(layer, CONVOLUTIONS):
        rounded = any(reader.op != "output" for reader in nodes.after_norm(network, node).users)
        if not rounded or layer.groups == layer.in_channels == layer.out_channels:
            return None
    limit = saturation.pair_limit(read.high + saturation.zero_point(read))
    return limit if limit < 2 * LARGEST_INT8 else None
