"""Batch norm folded into the layer in front of it, exactly: codes keep their size, scales and biases take it in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from faqd import saturation
from faqd.train import graph
from faqd.train.channels import readers_of_the_image
from faqd.train.deployed import Flavour, IntegerLayer
from faqd.train.layers import latent_weight, output_channels, output_first, weight_codes, weight_quantizer
from faqd.train.pair_limits import LARGEST_INT8, pair_limit
from faqd.train.prepare import input_quantizer
from faqd.train.quantizers import ActivationQuantizer, within_pairs

LARGEST_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Changes:
    """Channels per layer that a flavour cannot hold as they were trained.

    zeroed: those whose tiny batch-norm factor would overflow an int32 bias, exact zeros now. coarser: those whose
    weights have a larger scale now, so that no sum of their products saturates on any CPU.
    """

    zeroed: dict[str, int] = field(default_factory=dict)
    coarser: dict[str, int] = field(default_factory=dict)

    def sentences(self) -> Iterator[str]:
        """What to say of it to whoever exports."""
        if self.coarser:
            yield (
                f"{sum(self.coarser.values())} channels of {len(self.coarser)} layers have coarser weights than those "
                "that were trained, so that sums saturate on no CPU"
            )
        for layer, count in self.zeroed.items():
            yield f"{layer}: {count} channels are their bias alone, which int32 cannot hold beside their tiny weights"


def fold_layer(
    network: fx.GraphModule,
    node: fx.Node,
    flavour: Flavour,
    changes: Changes,
    shifts: dict[fx.Node, Tensor],
) -> None:
    """Replace a layer and its batch norm: sign into the codes, magnitude into the scale, the rest into the bias."""
    layer: Any = network.get_submodule(str(node.target))
    end = graph.after_norm(network, node)
    factor, offset = _layer_affine(layer, graph.module_of(network, end) if end is not node else None)
    offset = offset + shifts.get(end, 0.0)
    if flavour == "float" or weight_quantizer(layer) is None:
        network.set_submodule(str(node.target), _float_layer(layer, factor, offset))
    else:
        read = quantizer_of(network, node)
        limit = _limit_in(flavour, network, node, read)
        new, overflowing, coarser = _integer_layer(layer, factor, offset, read, flavour, limit)
        network.set_submodule(str(node.target), new)
        changes.zeroed.update({str(node.target): overflowing} if overflowing else {})
        changes.coarser.update({str(node.target): coarser} if coarser else {})
    if end is not node:
        end.replace_all_uses_with(node)
        network.graph.erase_node(end)


def _limit_in(flavour: Flavour, network: fx.GraphModule, node: fx.Node, read: ActivationQuantizer) -> int | None:
    """The pair limit that the layer has to be held to here: none where zeros among the image's channels will do."""
    apart = node in readers_of_the_image(network)
    return pair_limit(network, node, read.quant) if flavour == "onnxruntime" and not apart else None


def _layer_affine(layer: Any, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """float64 (channels,) each: bias and batch norm of a layer's sums, as sum * factor + offset."""
    ones = torch.ones(output_channels(layer), dtype=torch.float64)
    bias = ones * layer.bias.detach() if layer.bias is not None else 0 * ones
    if norm is None:
        return ones, bias
    factor, offset = affine(norm)
    return factor, factor * bias + offset


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """float64 (channels,) each: a batch norm in evaluation as x * factor + offset."""
    deviation = (norm.running_var.double() + norm.eps).sqrt()
    gamma = norm.weight.detach().double() if norm.affine else torch.ones_like(deviation)
    beta = norm.bias.detach().double() if norm.affine else torch.zeros_like(deviation)
    factor = gamma / deviation
    return factor, beta - factor * norm.running_mean.double()


def _float_layer(layer: Any, factor: Tensor, offset: Tensor) -> nn.Module:
    # Built anew: taking the parametrization off a copy would take it off the class that the student's layer shares.
    folded: Any
    if isinstance(layer, nn.Linear):
        folded = nn.Linear(layer.in_features, layer.out_features)
    else:
        kind = next(kind for kind in graph.COMPUTE if isinstance(layer, kind))
        names = ["stride", "padding", "dilation", "groups"] + ["output_padding"] * isinstance(layer, graph.TRANSPOSED)
        geometry = {name: getattr(layer, name) for name in (*names, "padding_mode")}
        folded = kind(layer.in_channels, layer.out_channels, layer.kernel_size, **geometry)
    weight = output_first(layer, latent_weight(layer).double())
    folded.weight = nn.Parameter(output_first(layer, weight * _per_channel(factor, weight)).float())
    folded.bias = nn.Parameter(offset.float())
    return folded  # type: ignore[no-any-return]


def _integer_layer(
    layer: Any, factor: Tensor, offset: Tensor, read: ActivationQuantizer, flavour: Flavour, limit: int | None
) -> tuple[IntegerLayer, int, int]:
    """The deployed layer; how many of its channels became zero because int32 could not hold their bias, and how many
    got coarser weights because of `limit`."""
    quantizer = weight_quantizer(layer)
    assert quantizer is not None
    trained, trained_scale = weight_codes(layer)
    codes, unfolded, coarser = trained, trained_scale, 0
    if limit is not None:
        weight = output_first(layer, latent_weight(layer))
        codes, unfolded = within_pairs(weight, trained, trained_scale, quantizer.quant, limit)
        coarser = int((codes != trained).flatten(1).any(1).sum())
    codes = codes.double() * _per_channel(factor.sign(), codes)
    scale = _float32(unfolded.double() * factor.abs())
    input_scale = read.scale.detach().float()
    input_high = max(-read.quant.low, read.quant.high)
    dead = scale < torch.finfo(torch.float32).tiny
    overflows = torch.zeros_like(dead)
    if flavour == "onnxruntime":
        # Finer biases for coarse grids: the product of code and scale stays the same, the int32 bias step shrinks.
        multiple = LARGEST_INT8 // quantizer.quant.high
        if limit is not None:
            largest = int(saturation.largest_pairs(saturation.in_kernel_order(codes.numpy())).max(initial=0))
            multiple = min(multiple, limit // max(1, largest))
        codes, scale = codes * multiple, _float32(scale / multiple)
        reach = codes.abs().flatten(1).sum(1) * input_high
        overflows = ~dead & (offset.abs() / (input_scale.double() * scale) + reach >= LARGEST_INT32)
    zero = dead | overflows
    if bool(zero.any()):
        codes = codes * _per_channel(~zero, codes)
        ordinary = scale[~zero] if not bool(zero.all()) else unfolded.double()
        # Twice what the largest bias needs, so that its int32 code stays in range.
        needed = 2 * float(offset.abs().max()) / float(input_scale) / LARGEST_INT32
        scale = scale.masked_fill(zero, max(float(ordinary.median()), needed))
    bias_codes = None
    if flavour == "onnxruntime":
        bias_codes = (offset / _float32(input_scale.double() * _float32(scale))).round().to(torch.int32)
    integer = IntegerLayer(layer, codes, scale, input_scale, input_high, offset, bias_codes)
    return integer, int(overflows.sum()), coarser


def _float32(values: Tensor) -> Tensor:
    """The nearest float32 values, which is what the file will hold, widened again."""
    return values.float().double()


def _per_channel(values: Tensor, weight: Tensor) -> Tensor:
    """One value per output channel, in a shape that multiplies `weight`."""
    return values.reshape(-1, *[1] * (weight.dim() - 1))


def quantizer_of(network: fx.GraphModule, node: fx.Node) -> ActivationQuantizer:
    found = input_quantizer(network, node)
    if found is None:
        raise ValueError(f"{node.name} reads a tensor that was not quantized")
    return found
