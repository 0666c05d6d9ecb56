"""Activation scales from what the float network shows on unlabelled images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from faqd.calib.asymmetric import asymmetric_range
from faqd.calib.ranges import Method, scale_from
from faqd.errors import UserError
from faqd.quantize import nodes
from faqd.quantize.operators.arithmetic import Scaled
from faqd.quantize.operators.norm import NORM
from faqd.quantize.quantizers.activation import ActivationQuantizer
from faqd.quantize.quantizers.layers import weight_quantizer
from faqd.quantize.student import SUFFIX, Student, origin

BATCH = 128
OBSERVED_VALUES = 65536
"""Values kept per tensor and batch for choosing its scale: an even sample."""

ASIDE = 127 / 126.618
"""How far the scale of a concatenation is moved off what fits its values best. Those are codes already, and averages of
codes; the best scale is often that of the codes, at which many averages lie between two. That of an average, a sum or
a multiple of codes is moved where it is a simple multiple of theirs, as where a ReLU6 reached its limit in all."""

SIMPLE = 16
"""Largest denominator of a simple multiple."""


@torch.no_grad()
def calibrate(
    student: Student, images: Tensor | Iterable[Tensor], method: Method = "mse", *, batch_statistics: bool = False
) -> None:
    """Set every activation scale from what the float network shows on unlabelled images, network input (N, C, H, W) or
    batches of it.

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
                if batch_statistics and isinstance(module, NORM):
                    module.train()
            for batch in images.split(BATCH) if isinstance(images, Tensor) else images:
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
        if module.asymmetric:
            scale, lowest = asymmetric_range(values, chosen)
            for name in names:
                quantizers[name].begin_at(lowest)
        else:
            scale = scale_from(values, module.quant, chosen, module.shift)
        module.scale.fill_(scale * ASIDE if names[0] in joined else scale)
    moved = set()
    for module, ratios in _roundings_of_codes(student.network):
        simple = any(_is_simple(abs(float(scale) * factor / float(module.scale))) for scale, factor in ratios)
        if simple and id(module.scale) not in moved:
            moved.add(id(module.scale))
            module.scale.mul_(ASIDE)
    for module in quantizers.values():
        module.forget()


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
    return {str(reader.target).removesuffix(SUFFIX) for reader in readers}


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
