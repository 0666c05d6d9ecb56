"""From a float network to a student in training: quantizers placed, nothing else changed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from faqd.calib.ranges import Method, scale_from
from faqd.errors import UserError
from faqd.quant import FLOAT_BITS
from faqd.quantize import nodes
from faqd.quantize.config import QuantConfig
from faqd.quantize.lowering.pad_channels import image_layers
from faqd.quantize.lowering.pair_limits import pair_limit
from faqd.quantize.operators.elementwise import Scaled
from faqd.quantize.placement import place
from faqd.quantize.quantizers.layers import latent_weight, operator_name, quantize_weight, weight_quantizer
from faqd.quantize.quantizers.quantizers import ActivationQuantizer

OBSERVED_VALUES = 65536
"""Values kept per tensor and batch for choosing its scale: an even sample."""


@dataclass(frozen=True)
class Student:
    """A network in training with its quantizers.

    network: a graph module; state dict keys follow the user's module paths. bits: what it was prepared for.
    taps: float node name -> student node name, for every node of the float graph.
    """

    network: fx.GraphModule
    bits: QuantConfig
    taps: dict[str, str]

    def quantizers(self) -> dict[str, ActivationQuantizer]:
        """Activation quantizers by place, in graph order."""
        modules = dict(self.network.named_modules())
        names = [str(n.target) for n in self.network.graph.nodes if n.op == "call_module"]
        return {
            name.removesuffix(_SUFFIX): module
            for name in names
            if isinstance(module := modules[name], ActivationQuantizer)
        }


_SUFFIX = "_quant"
ASIDE = 127 / 126.618
"""How far the scale of a concatenation is moved off what fits its values best. Those are codes already, and averages of
codes; the best scale is often that of the codes, at which many averages lie between two. That of an average, a sum or
a multiple of codes is moved where it is a simple multiple of theirs, as where a ReLU6 reached its limit in all."""
SIMPLE = 16
"""Largest denominator of a simple multiple."""


def prepare(traced: fx.GraphModule, bits: QuantConfig, example: Tensor) -> Student:
    """Copy a captured float network and place its quantizers; activation scales still need `calibrate`.

    example: (N, C, H, W), for shapes.
    """
    network = copy.deepcopy(traced)
    nodes.propagate(network, example)
    _refuse_hooks(network)
    placement = place(network, bits)
    names = nodes.places(network)
    taps = {node.name: node.name for node in network.graph.nodes}
    first_of = {node: group[0] for group in placement.shared for node in group}
    quantizers: dict[fx.Node, ActivationQuantizer] = {}
    for node, quant in placement.activations.items():
        path = names[node] + _SUFFIX
        # A grid that starts at zero takes the place of the rectifier.
        rectifies = not quant.signed and nodes.role(network, node) == "rectify"
        training = (bits.rounding, bits.scale_gradient) if rectifies else ()
        quantizer = quantizers[node] = ActivationQuantizer(quant, rectifies, *training)
        if first_of.get(node, node) is not node:
            quantizer.scale = quantizers[first_of[node]].scale
        network.add_submodule(path, quantizer)
        with network.graph.inserting_after(node):
            rounded = network.graph.call_module(path, (node,))
        nodes.read_instead(node, rounded)
        taps[node.name] = rounded.name
        if rectifies:
            rounded.args = (nodes.operand(node),)
            network.graph.erase_node(node)
    for node, quant in placement.weights.items():
        quantize_weight(network.get_submodule(str(node.target)), quant)
    if bits.target == "onnxruntime":
        _limit_pairs(network)
    network.delete_all_unused_submodules()
    network.graph.lint()
    network.recompile()
    nodes.propagate(network, example)
    return Student(network.train(), bits, taps)


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


def _refuse_hooks(network: fx.GraphModule) -> None:
    """A deployed module is made from parameters and sizes: what hooks add would be lost without a word."""
    names = nodes.places(network)
    for node in network.graph.nodes:
        module = nodes.module_of(network, node)
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()] if module is not None else []
        if hooks:
            what = getattr(hooks[0], "__name__", type(hooks[0]).__name__)
            raise UserError(
                f"{names[node]}{nodes.line_of_code(node)}: has a forward hook, {what}, which cannot be lowered. Take "
                "it off where the network is built: torch.nn.utils.remove_weight_norm or remove_spectral_norm write "
                "what theirs computes into the weights; anything else belongs into forward."
            )


def student_table(student: Student) -> list[dict[str, Any]]:
    """What every layer has, in graph order: name, operator, weight shape, groups, weight grid and bits, input grid."""
    network = student.network
    names = nodes.places(network)
    rows = []
    for node in network.graph.nodes:
        if nodes.role(network, node) != "compute":
            continue
        layer = network.get_submodule(str(node.target))
        quantizer = weight_quantizer(layer)
        read = input_quantizer(network, node) if quantizer else None
        rows.append(
            {
                "name": names[node],
                "operator": operator_name(layer),
                "weight_shape": list(latent_weight(layer).shape),
                "groups": getattr(layer, "groups", 1),
                "weights": quantizer.quant.label if quantizer else "float",
                "weight_bits": quantizer.quant.bits if quantizer else FLOAT_BITS,
                "inputs": read.quant.label if read else "float",
            }
        )
    return rows


def input_quantizer(network: fx.GraphModule, node: fx.Node) -> ActivationQuantizer | None:
    """The quantizer whose codes `node` reads, behind operators that only move or join values; None where it reads
    float."""
    return origin(network, nodes.operand(node))


def origin(network: fx.GraphModule, node: fx.Node) -> ActivationQuantizer | None:
    """The quantizer that made the values of `node`, behind operators that only move or join them."""
    # What a concatenation joins has one scale.
    while nodes.role(network, node) in nodes.MOVES:
        node = nodes.operand(node)
    module = nodes.module_of(network, node)
    return module if isinstance(module, ActivationQuantizer) else None


def computes_floats(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether --exclude left `node` something to compute whose last bits depend on how it is done."""
    kind, module = nodes.role(network, node), nodes.module_of(network, node)
    if kind == "compute":
        return module is None or weight_quantizer(module) is None
    if kind == "average":
        return input_quantizer(network, node) is None
    unknown = kind == "other" and "tensor_meta" in node.meta and node.op.startswith("call")
    return unknown and not isinstance(module, ActivationQuantizer)


@torch.no_grad()
def calibrate(student: Student, batches: Iterable[Tensor], method: Method, *, batch_statistics: bool = False) -> None:
    """Set every activation scale from what the float network shows on unlabelled `batches` (N, C, H, W).

    The network input is never clipped: its scale is that of the largest magnitude, whatever the method.
    batch_statistics: let batch norm use each batch's own, for a network whose running ones mean nothing yet.
    """
    quantizers = student.quantizers()
    observed: dict[str, list[Any]] = {name: [] for name in quantizers}

    def watch(name: str) -> Any:
        return lambda module, inputs: observed[name].append(sampled(inputs[0]))

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in quantizers.items()]
    try:
        with float_forward(student):
            for module in student.network.modules():
                if batch_statistics and isinstance(module, nodes.NORM):
                    module.train()
            for batch in batches:
                student.network(batch)
    finally:
        for hook in hooks:
            hook.remove()
    inputs = {node.target for node in student.network.graph.nodes if node.op == "placeholder"}
    joined = _concatenations(student.network)
    sharing: dict[int, list[str]] = {}
    for name, module in quantizers.items():
        sharing.setdefault(id(module.scale), []).append(name)
    for names in sharing.values():
        values = np.concatenate([part for name in names for part in observed[name]])
        if not np.isfinite(values).all():
            broken = next(name for name in names if not all(np.isfinite(part).all() for part in observed[name]))
            raise UserError(f"{broken}: the float network gives infinite values or NaN here on the calibration images.")
        chosen: Method = "max" if names[0] in inputs else method
        module = quantizers[names[0]]
        scale = scale_from(values, module.quant, chosen, module.shift)
        module.scale.fill_(scale * ASIDE if names[0] in joined else scale)
    moved = set()
    for module, ratios in _roundings_of_codes(student.network):
        simple = any(_is_simple(abs(float(scale) * factor / float(module.scale))) for scale, factor in ratios)
        if simple and id(module.scale) not in moved:
            moved.add(id(module.scale))
            module.scale.mul_(ASIDE)


def _roundings_of_codes(network: fx.GraphModule) -> Iterator[tuple[ActivationQuantizer, list[tuple[Tensor, float]]]]:
    """The quantizers behind averages, sums and multiples of codes alone, and the scales of those codes with the number
    that multiplies them."""
    for node in network.graph.nodes:
        module = nodes.module_of(network, node)
        if not isinstance(module, ActivationQuantizer):
            continue
        made, factor = nodes.operand(node), 1.0
        while isinstance(scaled := nodes.module_of(network, made), Scaled) and isinstance(scaled.factor, float):
            made, factor = nodes.operand(made), factor * scaled.factor
        if nodes.role(network, made) in ("average", "add") or factor != 1.0:
            known = [made] if nodes.role(network, made) not in ("average", "add") else nodes.tensor_inputs(made)
            read = [origin(network, operand) for operand in known]
            if read and all(quantizer is not None for quantizer in read):
                yield module, [(quantizer.scale.detach(), factor) for quantizer in read if quantizer is not None]


def _is_simple(ratio: float) -> bool:
    """Whether multiples of the ratio are whole and half numbers, but for what float32 makes of them."""
    return abs(Fraction(ratio).limit_denominator(SIMPLE) - Fraction(ratio)) <= Fraction(ratio) / 2**20


def _concatenations(network: fx.GraphModule) -> set[str]:
    """Places of the quantizers behind a concatenation."""
    readers = [r for node in network.graph.nodes if nodes.role(network, node) == "concat" for r in node.users]
    return {str(reader.target).removesuffix(_SUFFIX) for reader in readers}


def sampled(values: Tensor) -> Any:
    """At most OBSERVED_VALUES of the values, drawn evenly, then the least and the largest; a float32 array.

    Drawn and not strided: a stride that shares a factor with the width would see single columns of a map, such as its
    border. The draw is the same for equal sizes.
    """
    flat = values.detach().flatten()
    extremes = torch.stack(flat.aminmax())
    if flat.numel() > OBSERVED_VALUES:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(flat.numel(), (OBSERVED_VALUES,), generator=generator)
        flat = flat[drawn.to(flat.device)]
    return torch.cat([flat, extremes]).float().cpu().numpy()


@contextmanager
def float_forward(student: Student) -> Iterator[None]:
    """Within the block the student computes in float: activations rectified but not rounded, weights latent."""
    network = student.network
    training = network.training
    weights = [found for module in network.modules() if (found := weight_quantizer(module)) is not None]
    network.eval()
    for quantizer in student.quantizers().values():
        quantizer.enabled = False
    for weight in weights:
        weight.enabled = False
    try:
        yield
    finally:
        for quantizer in student.quantizers().values():
            quantizer.enabled = True
        for weight in weights:
            weight.enabled = True
        network.train(training)
