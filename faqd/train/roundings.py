"""Roundings that backends want beside those that were trained: of what training left float, and of codes once more."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from faqd.quant import SIGNED_8
from faqd.train import graph
from faqd.train.deployed import IntegerLayer, Requantize
from faqd.train.elementwise import Nearest
from faqd.train.layers import weight_quantizer
from faqd.train.prepare import origin
from faqd.train.quantizers import ActivationQuantizer


def quantize_outputs(network: fx.GraphModule, scales: dict[str, float]) -> None:
    """Round every layer's output that training left float. scales: by the layer's place."""
    for node in float_outputs(network):
        name = str(node.target)
        if name not in scales:
            raise ValueError(f"{name}: no output scale for the onnxruntime flavour")
        quantizer = ActivationQuantizer(SIGNED_8, rectifies=False)
        quantizer.scale.data.fill_(scales[name])
        _insert_after(network, graph.after_norm(network, node), f"{name}_out", quantizer)


def flatten_behind_rounding(network: fx.GraphModule) -> None:
    """Let averages of all pixels that drop their axes, as `x.mean((2, 3))`, keep them, and flatten behind the rounding.

    onnxruntime computes an average in integers only where its rounding follows at once.
    """
    for node in list(network.graph.nodes):
        if graph.role(network, node) != "average" or not _drops_all_pixels(node) or len(node.users) != 1:
            continue
        (rounding,) = node.users
        if not isinstance(graph.module_of(network, rounding), ActivationQuantizer):
            continue
        axes = tuple(range(2, len(graph.shape(graph.operand(node)))))
        node.args, node.kwargs = (graph.operand(node),), {"dim": axes, "keepdim": True}
        with network.graph.inserting_after(rounding):
            flat = network.graph.call_function(torch.flatten, (rounding, 1))
        flat.meta = dict(rounding.meta)
        kept_shape = (*graph.shape(node), *[1] * len(axes))
        for kept in (node, rounding):
            kept.meta["tensor_meta"] = kept.meta["tensor_meta"]._replace(shape=kept_shape)
        graph.read_instead(rounding, flat)


def _drops_all_pixels(node: fx.Node) -> bool:
    """Whether an average is a mean over all axes behind the channels, with nothing else asked of it."""
    given: dict[str, Any] = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | node.kwargs
    before = graph.shape(graph.operand(node))
    if node.op == "call_module" or set(given) - {"input", "dim", "keepdim"} or graph.shape(node) != before[:2]:
        return False
    dims = given.get("dim") or ()
    return {d % len(before) for d in ((dims,) if isinstance(dims, int) else dims)} == set(range(2, len(before)))


class Again(ActivationQuantizer):
    """Rounds codes again with their own scale, which changes nothing."""


def requantize_behind_moves(network: fx.GraphModule, for_onnxruntime: bool) -> None:
    """Repeat the rounding behind operators that only move values, once for all that read them.

    onnxruntime computes an operator in integers only with roundings right before and right behind it. TensorRT looks
    through these operators but for resizing: there a layer would fall to float in silence.
    """
    places = graph.places(network)
    for node in list(network.graph.nodes):
        if graph.role(network, node) not in graph.MOVES:
            continue
        if for_onnxruntime:
            wanted = any(_computes_on_codes(network, reader) for reader in node.users)
        else:
            wanted = _is_resized(network, node) and any(_is_layer(network, reader) for reader in node.users)
        found = origin(network, node)
        if wanted and found is not None:
            again = Again(found.quant, rectifies=False)
            again.scale = found.scale
            _insert_after(network, node, f"{places[node]}_quant", again)


def _is_layer(network: fx.GraphModule, node: fx.Node) -> bool:
    layer = graph.module_of(network, node)
    return layer is not None and weight_quantizer(layer) is not None


def _computes_on_codes(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether onnxruntime has `node` for integers."""
    return _is_layer(network, node) or graph.role(network, node) in ("average", "add", "multiply")


def _is_resized(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether pixels are repeated on the way from the rounding to `node`."""
    while graph.role(network, node) in graph.MOVES:
        if isinstance(graph.module_of(network, node), Nearest):
            return True
        if graph.role(network, node) == "concat":
            return any(_is_resized(network, operand) for operand in graph.tensor_inputs(node))
        node = graph.operand(node)
    return False


def _insert_after(network: fx.GraphModule, node: fx.Node, path: str, module: nn.Module) -> None:
    network.add_submodule(path, module)
    with network.graph.inserting_after(node):
        graph.read_instead(node, network.graph.call_module(path, (node,)))


def float_outputs(network: fx.GraphModule) -> list[fx.Node]:
    """Layers (with their batch norm folded) whose output reaches another operator unrounded."""
    found = []
    for node in network.graph.nodes:
        layer = graph.module_of(network, node)
        if layer is None or not (isinstance(layer, IntegerLayer) or weight_quantizer(layer)):
            continue
        readers = graph.after_norm(network, node).users
        rounded = all(isinstance(graph.module_of(network, r), (ActivationQuantizer, Requantize)) for r in readers)
        if not rounded and not all(reader.op == "output" for reader in readers):
            found.append(node)
    return found
