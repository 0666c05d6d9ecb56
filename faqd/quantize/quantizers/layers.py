"""Quantized weights of a layer, whatever axis its output channels are on: everything here is output channels first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from faqd.quant import Quant
from faqd.quantize.operators.layer import TRANSPOSED
from faqd.quantize.quantizers.weight import WeightQuantizer


class _InputFirst(nn.Module):
    """The parametrization of a transposed convolution, whose weight (inputs, outputs, K, K) has inputs first."""

    def __init__(self, quantizer: WeightQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, weight: Tensor) -> Tensor:
        quantized: Tensor = self.quantizer(weight.transpose(0, 1).contiguous())
        return quantized.transpose(0, 1)


def quantize_weight(layer: nn.Module, quant: Quant) -> None:
    """Put a quantizer on the weight of `layer`; a layer that is used twice keeps its first."""
    if weight_quantizer(layer) is not None:
        return
    quantizer = WeightQuantizer(quant, output_first(layer, layer.get_parameter("weight").detach()))
    parametrization = _InputFirst(quantizer) if isinstance(layer, TRANSPOSED) else quantizer
    parametrize.register_parametrization(layer, "weight", parametrization)


def weight_quantizer(layer: nn.Module) -> WeightQuantizer | None:
    """The quantizer of the layer's weight; None where it is float, whatever else computes it."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    first: Any = layer.parametrizations.weight[0]  # type: ignore[union-attr,index]
    found = first.quantizer if isinstance(first, _InputFirst) else first
    return found if isinstance(found, WeightQuantizer) else None


def latent_weight(layer: Any) -> Tensor:
    """The float weight as it is stored, without gradient."""
    quantized = weight_quantizer(layer) is not None
    stored: Tensor = layer.parametrizations.weight.original if quantized else layer.weight
    return stored.detach()


def weight_codes(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The codes of a quantized layer, output channels first, and their scale."""
    quantizer = weight_quantizer(layer)
    assert quantizer is not None
    with torch.no_grad():
        return quantizer.codes(output_first(layer, latent_weight(layer)))


def output_first(layer: nn.Module, weight: Tensor) -> Tensor:
    """The weight of a transposed convolution, inputs first in each group, with outputs first; and back again."""
    if not isinstance(layer, TRANSPOSED):
        return weight
    groups = weight.reshape(layer.groups, -1, *weight.shape[1:])
    return groups.transpose(1, 2).reshape(-1, groups.shape[1], *weight.shape[2:])


def output_channels(layer: Any) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def operator_name(layer: nn.Module) -> str:
    """The name of the layer's class, such as Conv2d."""
    return type(layer).__name__.removeprefix("Parametrized")
