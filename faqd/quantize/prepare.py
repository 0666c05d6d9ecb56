"""From a float network to a student in training: quantizers placed, nothing else changed."""

from __future__ import annotations

import copy

from torch import Tensor, fx, nn

from faqd.quantize import nodes
from faqd.quantize.attention import spell_out
from faqd.quantize.capture.capture import capture
from faqd.quantize.capture.program import as_plain_modules, is_exported
from faqd.quantize.config import QuantConfig
from faqd.quantize.islands import islands_of, reads_floats
from faqd.quantize.lowering.pad_channels import image_layers
from faqd.quantize.lowering.pair_limits import pair_limit
from faqd.quantize.placement import place
from faqd.quantize.quantizers.activation import ActivationQuantizer
from faqd.quantize.quantizers.layers import quantize_weight, weight_quantizer
from faqd.quantize.student import SUFFIX, Student, input_quantizer

_DEFAULT = QuantConfig()


def prepare(network: nn.Module, example: Tensor, config: QuantConfig = _DEFAULT) -> Student:
    """The student of a trained float network, in training mode; `calibrate` has to choose its activation scales.

    network: whose weights the student starts from, as copies; it is captured in evaluation mode and left in the mode
    that it was in. example: (N >= 2, C, H, W) float32 on the network's device, of which only shapes matter. UserError
    names the path and the line of what cannot be captured or quantized.

        student = faqd.prepare(net, images[:2], faqd.QuantConfig(weights=4, activations=4))
    """
    mode = network.training
    try:
        plain = as_plain_modules(network) if is_exported(network) else network
        return insert_quantizers(capture(plain, example), config, example)
    finally:
        network.train(mode)


def insert_quantizers(traced: fx.GraphModule, bits: QuantConfig, example: Tensor) -> Student:
    """Copy a captured float network and place its quantizers; activation scales still need `calibrate`.

    example: (N, C, H, W), for shapes.
    """
    network = copy.deepcopy(traced)
    nodes.propagate(network, example)
    if bits.attention == "int8":
        spell_out(network)
        nodes.propagate(network, example)
    placement = place(network, bits)
    islands = islands_of(network, placement.alone)
    for node in placement.floats:
        node.meta[nodes.STAYS_FLOAT] = True
    names = nodes.places(network)
    taps = {node.name: node.name for node in network.graph.nodes}
    first_of = {node: group[0] for group in placement.shared for node in group}
    quantizers: dict[fx.Node, ActivationQuantizer] = {}
    for node, quant in placement.activations.items():
        path = names[node] + SUFFIX
        # A grid that starts at zero takes the place of the rectifier.
        rectifies = not quant.signed and nodes.role(network, node) == "rectify"
        training = (bits.rounding, bits.scale_gradient) if rectifies else ()
        movable = node in placement.asymmetric
        quantizer = quantizers[node] = ActivationQuantizer(quant, rectifies, *training, asymmetric=movable)
        if first_of.get(node, node) is not node:
            quantizer.scale = quantizers[first_of[node]].scale
        network.add_submodule(path, quantizer)
        with network.graph.inserting_after(node):
            rounded = network.graph.call_module(path, (node,))
        floats = [
            reader
            for reader in node.users
            if reader is not rounded and node in placement.floats and reads_floats(network, reader, placement.floats)
        ]
        nodes.read_instead(node, rounded)
        for reader in floats:
            reader.replace_input_with(rounded, node)
        taps[node.name] = rounded.name
        if rectifies:
            rounded.args = (nodes.operand(node),)
            if not node.users:
                network.graph.erase_node(node)
    for node, quant in placement.weights.items():
        quantize_weight(network.get_submodule(str(node.target)), quant)
    if bits.target == "onnxruntime":
        _limit_pairs(network)
    network.delete_all_unused_submodules()
    network.graph.lint()
    network.recompile()
    nodes.propagate(network, example)
    return Student(network.train(), bits, taps, traced, islands)


def _limit_pairs(network: fx.GraphModule) -> None:
    """Weights for which no sum of onnxruntime's kernels saturates, where the student is trained for it alone."""
    of_the_image = image_layers(network)
    for node in network.graph.nodes:
        layer = nodes.module_of(network, node)
        quantizer = weight_quantizer(layer) if nodes.role(network, node) == "compute" and layer is not None else None
        read = input_quantizer(network, node) if quantizer is not None else None
        if quantizer is not None and read is not None:
            limits = (quantizer.pair_limit, pair_limit(network, node, read.quant))
            quantizer.pair_limit = min((limit for limit in limits if limit is not None), default=None)
            quantizer.zeros_at_end = of_the_image.at_end_for(node)
