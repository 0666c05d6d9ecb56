"""Roundings that backends want beside those that were trained: of what training left float, and of codes once more."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx, nn

from faqd.quant import SIGNED_8
from faqd.quantize import nodes
from faqd.quantize.operators.arithmetic import SUBTRACT
from faqd.quantize.operators.layer import CONVOLUTIONS, IntegerLayer
from faqd.quantize.operators.requantize import Requantize
from faqd.quantize.operators.resize import Nearest
from faqd.quantize.quantizers.activation import ActivationQuantizer
from faqd.quantize.quantizers.layers import weight_quantizer
from faqd.quantize.student import origin


def round_before_moves(network: fx.GraphModule) -> None:
    """Round a layer's output in front of the operators that move its values, where training did so behind them.

    Rounding is monotone and acts on each value alone, so that the codes are the same; onnxruntime computes a layer in
    integers only where its rounding follows at once.
    """
    for node in unrounded_layers(network):
        behind = _roundings_behind(network, nodes.after_norm(network, node))
        first = behind[0] if behind else None
        if first is None or any(_grid(found) != _grid(first) for found in behind):
            continue
        early = ActivationQuantizer(first.quant, first.rectifies)
        early.scale = first.scale
        _insert_after(network, nodes.after_norm(network, node), f"{node.target}_out", early)
    for node in network.graph.nodes:
        found = nodes.module_of(network, node)
        if isinstance(found, ActivationQuantizer) and _rounded_before(network, node, found):
            again = Again(found.quant, rectifies=False)
            again.scale = found.scale
            network.set_submodule(str(node.target), again)


def _rounded_before(network: fx.GraphModule, node: fx.Node, rounding: ActivationQuantizer) -> bool:
    """Whether all that `rounding`, called by `node`, reads are codes of its own grid, moved since."""
    read = nodes.operand(node)
    made = [nodes.module_of(network, source) for source in _sources(network, read)]
    return nodes.role(network, read) in nodes.MOVES and all(
        isinstance(module, ActivationQuantizer) and _grid(module) == _grid(rounding) for module in made
    )


def _roundings_behind(network: fx.GraphModule, node: fx.Node) -> list[ActivationQuantizer]:
    """What rounds the values of `node`, all of them in the end; empty where something else reads them as well."""
    found = []
    for reader in node.users:
        module = nodes.module_of(network, reader)
        if isinstance(module, ActivationQuantizer):
            found.append(module)
        elif nodes.role(network, reader) in nodes.MOVES and (behind := _roundings_behind(network, reader)):
            found += behind
        else:
            return []
    return found


def _grid(rounding: ActivationQuantizer) -> Any:
    return id(rounding.scale), rounding.quant, rounding.rectifies


def quantize_sums(network: fx.GraphModule, scales: dict[str, float]) -> None:
    """Round the outputs of `summed_layers`. scales: by the layer's place."""
    for node in summed_layers(network):
        name = str(node.target)
        if name not in scales:
            raise ValueError(f"{name}: no output scale for the onnxruntime flavour")
        quantizer = ActivationQuantizer(SIGNED_8, rectifies=False)
        quantizer.scale.data.fill_(scales[name])
        _insert_after(network, nodes.after_norm(network, node), f"{name}_out", quantizer)


def flatten_behind_rounding(network: fx.GraphModule) -> None:
    """Let averages of all pixels that drop their axes, as `x.mean((2, 3))`, keep them, and flatten behind the rounding.

    onnxruntime computes an average in integers only where its rounding follows at once.
    """
    for node in list(network.graph.nodes):
        if nodes.role(network, node) != "average" or not _drops_all_pixels(node) or len(node.users) != 1:
            continue
        (rounding,) = node.users
        if not isinstance(nodes.module_of(network, rounding), ActivationQuantizer):
            continue
        axes = tuple(range(2, len(nodes.shape(nodes.operand(node)))))
        node.args = (nodes.operand(node), axes, True)
        with network.graph.inserting_after(rounding):
            flat = network.graph.call_function(torch.flatten, (rounding, 1))
        flat.meta = dict(rounding.meta)
        kept_shape = (*nodes.shape(node), *[1] * len(axes))
        for kept in (node, rounding):
            kept.meta["tensor_meta"] = kept.meta["tensor_meta"]._replace(shape=kept_shape)
        nodes.read_instead(rounding, flat)


def _drops_all_pixels(node: fx.Node) -> bool:
    """Whether an average is a mean over all axes behind the channels, of which nothing is left."""
    before = nodes.shape(nodes.operand(node))
    if node.target is not torch.mean or nodes.shape(node) != before[:2]:
        return False
    given: Any = node.args
    return sorted(given[1]) == list(range(2, len(before)))


class Again(ActivationQuantizer):
    """Rounds codes again with their own scale, which changes nothing."""


def requantize_behind_moves(network: fx.GraphModule, for_onnxruntime: bool) -> None:
    """Repeat the rounding behind operators that only move values, once for all that read them.

    onnxruntime computes an operator in integers only with roundings right before and right behind it. TensorRT looks
    through these operators but for resizing: there a layer would fall to float in silence.
    """
    places = nodes.places(network)
    for node in list(network.graph.nodes):
        if nodes.role(network, node) not in nodes.MOVES:
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
    layer = nodes.module_of(network, node)
    return layer is not None and weight_quantizer(layer) is not None


def _computes_on_codes(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether onnxruntime has `node` for integers."""
    return _is_layer(network, node) or nodes.role(network, node) in ("average", "add", "multiply")


def _is_resized(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether pixels are repeated on the way from the rounding to `node`."""
    while nodes.role(network, node) in nodes.MOVES:
        if isinstance(nodes.module_of(network, node), Nearest):
            return True
        if nodes.role(network, node) == "concat":
            return any(_is_resized(network, operand) for operand in nodes.tensor_inputs(node))
        node = nodes.operand(node)
    return False


def _insert_after(network: fx.GraphModule, node: fx.Node, path: str, module: nn.Module) -> None:
    network.add_submodule(path, module)
    with network.graph.inserting_after(node):
        nodes.read_instead(node, network.graph.call_module(path, (node,)))


def unrounded_layers(network: fx.GraphModule) -> list[fx.Node]:
    """Convolutions of integers (with their batch norm) whose output reaches another operator unrounded.

    Linear layers are not among them: onnxruntime gives their integer sums as floats. Nor are transposed convolutions,
    which it computes in floats anyway.
    """
    found = []
    for node in network.graph.nodes:
        layer = nodes.module_of(network, node)
        integer = isinstance(layer, IntegerLayer) and layer.operator == "Conv"
        if not integer and not (isinstance(layer, CONVOLUTIONS) and weight_quantizer(layer)):
            continue
        readers = nodes.after_norm(network, node).users
        rounded = all(_rounds(network, reader) for reader in readers)
        if not rounded and not all(reader.op == "output" for reader in readers):
            found.append(node)
    return found


def summed_layers(network: fx.GraphModule) -> list[fx.Node]:
    """Those of `unrounded_layers` whose output is added to codes, or to one another's, and the sum rounded: onnxruntime
    adds codes in integers, which the blocks of residual networks live on."""
    found = unrounded_layers(network)
    while True:
        kept = _added_to_codes(network, found)
        # Where one layer that is added stays float, the sum does, and the others need no rounding for it.
        if len(kept) == len(found):
            return kept
        found = kept


def _added_to_codes(network: fx.GraphModule, layers: list[fx.Node]) -> list[fx.Node]:
    """Those of `layers`, all of them rounded, whose outputs nothing reads but roundings and sums of codes."""
    ends = {nodes.after_norm(network, node) for node in layers}

    def adds_codes(node: fx.Node) -> bool:
        return (
            nodes.role(network, node) == "add"
            and node.target not in SUBTRACT
            and all(_rounds(network, reader) for reader in node.users)
            and all(operand in ends or _holds_codes(network, operand) for operand in nodes.values_of(network, node))
        )

    def is_added(node: fx.Node) -> bool:
        readers = nodes.after_norm(network, node).users
        return all(_rounds(network, reader) or adds_codes(reader) for reader in readers)

    return [node for node in layers if is_added(node)]


def reach_that_matters(network: fx.GraphModule, node: fx.Node) -> float:
    """The magnitude from which on a summed layer's output changes no code, in a deployed network; infinity if none.

    Where it is added to codes that start at 0 and the sum is rectified, what exceeds the grid of the sum saturates it,
    and what is below minus the largest other operand is rectified.
    """
    return max((_reach_in_sum(network, node, reader) for reader in node.users), default=math.inf)


def _reach_in_sum(network: fx.GraphModule, node: fx.Node, added: fx.Node) -> float:
    others = [each for each in nodes.tensor_inputs(added) if each is not node]
    if nodes.role(network, added) != "add" or len(others) != 1:
        return math.inf
    behind = [nodes.module_of(network, reader) for reader in added.users]
    beside = [nodes.module_of(network, source) for source in _sources(network, others[0])]
    grids = [module for module in (*behind, *beside) if isinstance(module, Requantize) and module.quant.low >= 0]
    if len(grids) < len(behind) + len(beside):
        return math.inf
    return max(float(module.scale) * module.quant.high for module in grids)


def _rounds(network: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(nodes.module_of(network, node), (ActivationQuantizer, Requantize))


def _holds_codes(network: fx.GraphModule, node: fx.Node) -> bool:
    return all(_rounds(network, source) for source in _sources(network, node))


def _sources(network: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """What made the values of `node`, behind operators that only move or join them."""
    if nodes.role(network, node) not in nodes.MOVES:
        return [node]
    return [source for read in nodes.values_of(network, node) for source in _sources(network, read)]
