"""Batch norm folded into the layer in front of it, exactly: codes keep their size, scales and biases take it in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from faqd.quantize import nodes
from faqd.quantize.lowering.offsets import Offsets
from faqd.quantize.lowering.pad_channels import ImageLayers
from faqd.quantize.lowering.pair_limits import LARGEST_INT8, pair_limit
from faqd.quantize.operators.layer import COMPUTE, TRANSPOSED, IntegerLayer
from faqd.quantize.operators.norm import affine
from faqd.quantize.operators.requantize import Flavour
from faqd.quantize.quantizers.activation import ActivationQuantizer
from faqd.quantize.quantizers.layers import latent_weight, output_channels, output_first, weight_codes, weight_quantizer
from faqd.quantize.quantizers.weight import largest_pairs, within_pairs
from faqd.quantize.student import input_quantizer

LARGEST_INT32 = 2**31 - 1
SMALLEST_BIAS = 2.0**-100
"""A float bias below is nothing: it is left of a dead channel, and float32 has no power of two for its last bits."""
ROOM = 2**30
"""What sums may come to, so that int32 holds a bias of that size beside them."""


@dataclass(frozen=True)
class Changes:
    """What a flavour cannot hold as it was trained, by layer.

    coarser: channels whose weights have a larger scale now, so that no sum of their products saturates on any CPU, or
    beside their bias. zeroed: those of the latter whose weights are nothing beside it. floats: layers that multiply
    floats, and the number of their inputs, whose products int32 could not add up. unrounded: layers that multiply
    floats because what reads their output was trained on sums that nothing rounded.
    """

    coarser: dict[str, int] = field(default_factory=dict)
    zeroed: dict[str, int] = field(default_factory=dict)
    floats: dict[str, int] = field(default_factory=dict)
    unrounded: list[str] = field(default_factory=list)

    def sentences(self) -> Iterator[str]:
        """What to say of it to whoever exports."""
        if self.coarser:
            yield (
                f"{sum(self.coarser.values())} channels of {len(self.coarser)} layers have coarser weights than those "
                "that were trained, so that sums saturate on no CPU"
            )
        for layer, count in self.zeroed.items():
            yield f"{layer}: {count} channels are their bias alone, beside which their weights are nothing"
        for layer, inputs in self.floats.items():
            yield f"{layer}: stays float, for products of {inputs:,} inputs could pass int32"
        if self.unrounded:
            yield (
                f"{len(self.unrounded)} layers multiply floats, for their sums go on unrounded, as into a SiLU: the "
                "file computes what was trained, and is no faster there than the float network"
            )


@dataclass(frozen=True)
class Pairs:
    """What neighbouring codes of a layer are held to, for onnxruntime.

    limit: of the sum of two of one sign; None where any may be. zeros_at_end: channels that follow those of the layer's
    input. apart: whether zeros will come between all of them where a pair is beyond the limit.
    """

    limit: int | None
    zeros_at_end: int
    apart: bool


def fold_layer(
    network: fx.GraphModule,
    node: fx.Node,
    flavour: Flavour,
    changes: Changes,
    offsets: Offsets,
    of_the_image: ImageLayers,
    *,
    stays_float: bool,
) -> None:
    """Replace a layer and its batch norm: sign into the codes, magnitude into the scale, the rest into the bias.

    stays_float: whether it multiplies what its codes stand for, as floats.
    """
    layer: Any = network.get_submodule(str(node.target))
    end = nodes.after_norm(network, node)
    factor, offset = _layer_affine(layer, nodes.module_of(network, end) if end is not node else None)
    offset = offset + offsets.added.get(end, 0.0)
    if flavour == "float" or weight_quantizer(layer) is None:
        weight = output_first(layer, latent_weight(layer)).double()
        network.set_submodule(str(node.target), _float_layer(layer, weight * _per_channel(factor, weight), offset))
    else:
        read = quantizer_of(network, node)
        if stays_float:
            changes.unrounded.append(str(node.target))
            new: nn.Module = _float_layer(layer, *_real(_tensorrt_layer(layer, factor, offset, read)))
        elif flavour == "onnxruntime":
            limit, apart = pair_limit(network, node, read.quant), node in of_the_image.nodes
            pairs = Pairs(limit, of_the_image.at_end_for(node), apart)
            new = _onnxruntime_layer(layer, factor, offset, read, pairs, changes, str(node.target))
        else:
            new = _tensorrt_layer(layer, factor, offset, read, offsets.missing.get(node))
        network.set_submodule(str(node.target), new)
    if end is not node:
        end.replace_all_uses_with(node)
        network.graph.erase_node(end)


def _layer_affine(layer: Any, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """float64 (channels,) each: bias and batch norm of a layer's sums, as sum * factor + offset."""
    ones = torch.ones(output_channels(layer), dtype=torch.float64)
    bias = ones * layer.bias.detach() if layer.bias is not None else 0 * ones
    if norm is None:
        return ones, bias
    factor, offset = affine(norm)
    return factor, factor * bias + offset


def _real(layer: IntegerLayer) -> tuple[Tensor, Tensor]:
    """Weights, output channels first, and biases that the codes of a layer stand for."""
    return layer.codes.double() * _per_channel(layer.weight_scale.double(), layer.codes), layer.bias


def _float_layer(layer: Any, weight: Tensor, bias: Tensor) -> nn.Module:
    """weight: output channels first."""
    # Built anew: taking the parametrization off a copy would take it off the class that the student's layer shares.
    folded: Any
    if isinstance(layer, nn.Linear):
        folded = nn.Linear(layer.in_features, layer.out_features)
    else:
        kind = next(kind for kind in COMPUTE if isinstance(layer, kind))
        names = ["stride", "padding", "dilation", "groups"] + ["output_padding"] * isinstance(layer, TRANSPOSED)
        geometry = {name: getattr(layer, name) for name in (*names, "padding_mode")}
        folded = kind(layer.in_channels, layer.out_channels, layer.kernel_size, **geometry)
    folded.weight = nn.Parameter(output_first(layer, weight).float())
    folded.bias = nn.Parameter(torch.where(bias.abs() < SMALLEST_BIAS, 0.0, bias).float())
    return folded  # type: ignore[no-any-return]


def _tensorrt_layer(
    layer: Any, factor: Tensor, offset: Tensor, read: ActivationQuantizer, missing: Tensor | None = None
) -> IntegerLayer:
    """missing: what all that the layer reads is too small by."""
    codes, unfolded = weight_codes(layer)
    codes = codes.double() * _per_channel(factor.sign(), codes)
    scale = _float32(unfolded.double() * factor.abs())
    input_scale = read.scale.detach().float()
    codes, scale = _without_dead(codes, scale, unfolded.double(), offset / input_scale.double())
    if missing is not None:
        offset = offset + missing * codes.flatten(1).sum(1) * scale
    return IntegerLayer(layer, codes, scale, input_scale, _input_high(read), offset)


def _onnxruntime_layer(
    layer: Any,
    factor: Tensor,
    offset: Tensor,
    read: ActivationQuantizer,
    pairs: Pairs,
    changes: Changes,
    name: str,
) -> nn.Module:
    """The layer with an int32 bias, or the same in floats where int32 cannot hold its sums. What of `name` is not as
    trained goes into `changes`."""
    quantizer = weight_quantizer(layer)
    assert quantizer is not None
    trained, trained_scale = weight_codes(layer)
    codes, unfolded = trained, trained_scale
    largest = int(largest_pairs(trained, pairs.zeros_at_end).max())
    if pairs.limit is not None and largest > pairs.limit and not pairs.apart:
        weight = output_first(layer, latent_weight(layer))
        quant, limit, largest = quantizer.quant, pairs.limit, pairs.limit
        codes, unfolded = within_pairs(weight, trained, trained_scale, quant, limit, pairs.zeros_at_end)
    sign, input_scale = _per_channel(factor.sign(), codes), read.scale.detach().float()
    reach = codes.double().abs().flatten(1).sum(1) * _input_high(read)
    if float(reach.max()) >= ROOM:
        changes.floats[name] = codes[0].numel()
        return _float_layer(layer, *_real(_tensorrt_layer(layer, factor, offset, read)))
    # Finer biases for coarse grids: the product of code and scale stays the same, the int32 bias step shrinks.
    multiple = min(LARGEST_INT8 // quantizer.quant.high, int(ROOM / max(1.0, float(reach.max()))))
    if pairs.limit is not None:
        multiple = min(multiple, pairs.limit // max(1, largest))
    multiple = max(1, multiple)
    codes, scale = codes.double() * sign * multiple, _float32(unfolded.double() * factor.abs() / multiple)
    codes, scale = _with_room(codes, scale, offset / input_scale.double(), reach * multiple)
    dead = scale < torch.finfo(torch.float32).tiny
    alive = ~dead & trained.flatten(1).any(1)
    zeroed = alive & ~codes.flatten(1).any(1)
    coarser = alive & ~zeroed & (codes != trained.double() * sign * multiple).flatten(1).any(1)
    changes.zeroed.update({name: int(zeroed.sum())} if bool(zeroed.any()) else {})
    changes.coarser.update({name: int(coarser.sum())} if bool(coarser.any()) else {})
    codes, scale = _without_dead(codes, scale, unfolded.double(), offset / input_scale.double())
    bias_codes = (offset / _float32(input_scale.double() * _float32(scale))).round().to(torch.int32)
    return IntegerLayer(layer, codes, scale, input_scale, _input_high(read), offset, bias_codes)


def _with_room(codes: Tensor, scale: Tensor, offset: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """A larger scale where int32 cannot hold bias and sums together, so that the bias takes half of it.

    offset: the bias in units of the input's scale. reach: the largest sum. A code is then 2^-30 of the bias for an
    input code of one, so that rounding the codes again, even to zeros, changes nothing that is seen beside it.
    """
    beyond = (scale >= torch.finfo(torch.float32).tiny) & (offset.abs() / scale + reach >= LARGEST_INT32)
    wanted = torch.where(beyond, torch.maximum(_float32(offset.abs() / ROOM), scale), scale)
    rounded = (codes * _per_channel(scale / wanted, codes)).round()
    return torch.where(_per_channel(beyond, codes), rounded, codes), wanted


def _without_dead(codes: Tensor, scale: Tensor, unfolded: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Channels whose batch norm multiplies by nothing as zero codes, with an ordinary scale: a tiny one would overflow
    int32 biases. offset: the bias in units of the input's scale."""
    dead = scale < torch.finfo(torch.float32).tiny
    if not bool(dead.any()):
        return codes, scale
    ordinary = scale[~dead] if not bool(dead.all()) else unfolded
    # Twice what the largest bias needs, so that its int32 code stays in range.
    needed = 2 * float(offset.abs().max()) / LARGEST_INT32
    return codes * _per_channel(~dead, codes), scale.masked_fill(dead, max(float(ordinary.median()), needed))


def _input_high(read: ActivationQuantizer) -> int:
    return max(-read.quant.low, read.quant.high)


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
