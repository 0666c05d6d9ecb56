"""Attention on codes: queries and keys, probabilities and values are rounded, and both products are of integers."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from faqd.quantize import nodes
from faqd.quantize.operators.arithmetic import Scaled
from faqd.quantize.operators.attention import ATTENTION, PRODUCTS, IntegerProduct
from faqd.quantize.quantizers.activation import ActivationQuantizer


def integer_products(traced: fx.GraphModule, excluded: set[fx.Node]) -> set[fx.Node]:
    """The products of two activations (shapes propagated) that are not excluded."""
    return {node for node in traced.graph.nodes if node.target in PRODUCTS and node not in excluded and _of_two(node)}


def _of_two(product: fx.Node) -> bool:
    read = nodes.tensor_inputs(product)
    return len(product.args) == len(read) == 2 and not any(map(nodes.is_own, read))


def spell_out(traced: fx.GraphModule) -> None:
    """Each F.scaled_dot_product_attention (shapes propagated) as its two products and the softmax between them."""
    for node in list(traced.graph.nodes):
        if node.target is ATTENTION:
            _spell_out(traced, node)
    traced.recompile()


def _spell_out(traced: fx.GraphModule, node: fx.Node) -> None:
    """softmax(q k^T scale + mask) v; not where heads share keys, or where the mask is one of truth values."""
    target: Any = node.target
    usual = {argument.name: argument.default_value for argument in target._schema.arguments}
    given = usual | dict(zip(usual, node.args, strict=False)) | node.kwargs
    query, key, mask = given["query"], given["key"], given["attn_mask"]
    if given["enable_gqa"] or (mask is not None and not mask.meta["tensor_meta"].dtype.is_floating_point):
        return
    scale = 1 / math.sqrt(nodes.shape(query)[-1]) if given["scale"] is None else float(given["scale"])
    graph, place, rank = traced.graph, nodes.places(traced)[node], len(nodes.shape(key))

    def call(target: Any, word: str, *args: Any, op: str = "call_function") -> fx.Node:
        new = graph.create_node(op, target, args, name=f"{node.name}_{word}")
        new.stack_trace, new.meta["nn_module_stack"] = node.stack_trace, node.meta.get("nn_module_stack")
        return new

    with graph.inserting_before(node):
        keys = call(torch.permute, "keys", key, (*range(rank - 2), rank - 1, rank - 2))
        scores = call(PRODUCTS[0], "scores", query, keys)
        path = nodes.unused(f"{place}_scale", {name for name, _ in traced.named_modules()})
        traced.add_submodule(path, Scaled(scale, _causal(traced, query, key) if given["is_causal"] else 0.0))
        scores = call(path, "scaled", scores, op="call_module")
        if mask is not None:
            scores = call(operator.add, "masked", scores, mask)
        probabilities = call(torch.ops.aten.softmax.int, "softmax", scores, -1)
    node.target, node.args, node.kwargs = PRODUCTS[0], (probabilities, given["value"]), {}


def _causal(traced: fx.GraphModule, query: fx.Node, key: fx.Node) -> Tensor:
    """What is added to the scores, so that no query sees a later key."""
    device = next((own.device for own in traced.parameters()), None)
    return torch.full((nodes.shape(query)[-2], nodes.shape(key)[-2]), -torch.inf, device=device).triu(1)


def product_on_codes(network: fx.GraphModule, node: fx.Node) -> IntegerProduct | None:
    """What a product is in a converted network whose operands are both rounded; None for any other node."""
    if node.target not in PRODUCTS or len(node.all_input_nodes) != 2:
        return None
    left, right = (nodes.module_of(network, read) for read in node.all_input_nodes)
    if not isinstance(left, ActivationQuantizer) or not isinstance(right, ActivationQuantizer):
        return None
    return IntegerProduct(left.scale, right.scale)
