"""How much of a student's work runs on integers: the share of its multiply-accumulates."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from faqd.quant import FLOAT_BITS
from faqd.quantize import nodes
from faqd.quantize.attention import product_on_codes
from faqd.quantize.operators.layer import TRANSPOSED
from faqd.quantize.quantizers.layers import latent_weight, weight_quantizer
from faqd.quantize.student import Student, input_quantizer

_aten = torch.ops.aten
_PRODUCTS = (_aten.matmul.default, _aten.bmm.default)
_LAYERS = (F.linear, F.conv1d, F.conv2d, F.conv_transpose1d, F.conv_transpose2d)


def int8_share(student: Student) -> float:
    """Of 1, by multiply-accumulates of layers and of products of activations: those whose layer reads codes and has
    weights of them, and products of codes. What a runtime does beside that, `runs_int8` in the manifest says."""
    integers, total = _on_integers_and_in_all(student)
    return sum(integers.values()) / total if total else 0.0


def int8_shares(student: Student) -> dict[str, float]:
    """By the place of a layer or product that runs on integers, how much of that share is its own."""
    integers, total = _on_integers_and_in_all(student)
    return {place: count / total for place, count in integers.items() if count}


def _on_integers_and_in_all(student: Student) -> tuple[dict[str, int], int]:
    """The multiply-accumulates of all that runs on integers, by place, and those of the whole network."""
    network = student.network
    counts = {node: _products(network, node) for node in network.graph.nodes}
    integers = {place: counts[node] for node, place in nodes.places(network).items() if _on_integers(network, node)}
    return integers, sum(counts.values())


def _on_integers(network: fx.GraphModule, node: fx.Node) -> bool:
    if product_on_codes(network, node) is not None:
        return True
    layer = nodes.module_of(network, node)
    if nodes.role(network, node) != "compute" or layer is None or weight_quantizer(layer) is None:
        return False
    return input_quantizer(network, node) is not None


def _products(network: fx.GraphModule, node: fx.Node) -> int:
    """Multiply-accumulates of one call, for the images that shapes were propagated with."""
    if not node.op.startswith("call") or not nodes.is_tensor(node) or nodes.is_own(node):
        return 0
    results = math.prod(nodes.shape(node))
    layer: Any = nodes.module_of(network, node)
    if nodes.role(network, node) == "compute" and layer is not None:
        weight = latent_weight(layer)
        if isinstance(layer, TRANSPOSED):
            return math.prod(nodes.shape(nodes.operand(node))) * math.prod(weight.shape[1:])
        return results * math.prod(weight.shape[1:])
    shapes = [nodes.shape(read) for read in nodes.tensor_inputs(node)]
    if node.target in _PRODUCTS:
        return results * shapes[0][-1]
    if node.target in _LAYERS:
        return results * math.prod(shapes[1][1:])
    if node.target is _aten.scaled_dot_product_attention.default:
        queries, keys = shapes[:2]
        return math.prod(queries) * keys[-2] + results * keys[-2]
    return 0


def floats_of(student: Student) -> dict[str, Any]:
    """What a manifest and `inspect` say of it: `islands`, each with the operators in it by place and the user's line,
    and `int8_share`; nothing of a student whose activations are float, as it was asked for."""
    if student.config.activations == FLOAT_BITS:
        return {}
    islands = [{"operators": island.operators, "line": island.line} for island in student.islands]
    return {"islands": islands, "int8_share": round(int8_share(student), 4)}
