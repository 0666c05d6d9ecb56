"""The modules of a deployed student: integer codes and one well-defined arithmetic, in float64.

Tensors between them hold real values that lie on a grid, code * scale; each module recovers the codes by a
division, which is exact. Integer sums are exact; then one multiplication, one addition, one rounding, in the order
that faqd/deploy/reference/evaluator.py states for the exported file. Float32 numbers of the file (scales, biases) are
widened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faqd.quant import Quant
from faqd.quantize.nodes import TRANSPOSED
from faqd.saturation import in_kernel_order, largest_pairs

Flavour = Literal["tensorrt", "onnxruntime", "float"]

EXACT_FLOAT32 = 2**24
"""Sums of integers below this are exact in float32, whatever their order."""


@dataclass(frozen=True)
class Filling:
    """Channels of zeros among those that a network was trained with.

    at_end: how many follow the others. behind_each: whether one more stands behind each of them all.
    """

    at_end: int = 0
    behind_each: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """x: channels on the second axis."""
        if self.at_end:
            x = F.pad(x, [0, 0] * (x.dim() - 2) + [0, self.at_end])
        return torch.stack([x, torch.zeros_like(x)], 2).flatten(1, 2) if self.behind_each else x

    def channels(self, trained: int) -> int:
        """How many there are with the zeros."""
        return (trained + self.at_end) * (2 if self.behind_each else 1)

    def without(self, x: Any) -> Any:
        """The channels that were trained, of a filled tensor or array."""
        trained = x[:, ::2] if self.behind_each else x
        return trained[:, : trained.shape[1] - self.at_end]


UNFILLED = Filling()


class IntegerLayer(nn.Module):
    """A layer with folded batch norm: real = sum(codes * input codes) * scales + bias.

    layer: a convolution, transposed convolution or linear layer. codes: int8, output channels first. weight_scale:
    float32 (channels,). input_scale: float32 scalar. bias: float32 (channels,); or where `bias_codes` int32 (channels,)
    are given, those times input_scale * weight_scale rounded to float32: how the onnxruntime flavour stores it.
    """

    codes: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    bias: Tensor
    bias_codes: Tensor | None

    def __init__(
        self,
        layer: nn.Module,
        codes: Tensor,
        weight_scale: Tensor,
        input_scale: Tensor,
        input_high: int,
        bias: Tensor,
        bias_codes: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.operator = "Linear" if isinstance(layer, nn.Linear) else "Conv"
        names = ["stride", "padding", "dilation", "groups"]
        if isinstance(layer, TRANSPOSED):
            self.operator = "ConvTranspose"
            names.append("output_padding")
        self.geometry: dict[str, Any] = {}
        if not isinstance(layer, nn.Linear):
            self.geometry = {name: getattr(layer, name) for name in names}
        self.register_buffer("codes", codes.to(torch.int8))
        self.register_buffer("weight_scale", weight_scale.float())
        self.register_buffer("input_scale", input_scale.float())
        self.register_buffer("bias", bias.float())
        self.register_buffer("bias_codes", bias_codes)
        self.filling = UNFILLED
        largest = float(self.codes.double().abs().flatten(1).sum(1).max()) * input_high
        self._sum_type = torch.float32 if largest < EXACT_FLOAT32 else torch.float64

    @property
    def stored_codes(self) -> Tensor:
        """The codes, with zeros for the input channels that were filled in."""
        return self.filling(self.codes)

    def largest_pair(self) -> int:
        """What two neighbouring codes of one sign add up to at most, where onnxruntime adds their products first."""
        return int(largest_pairs(in_kernel_order(self.stored_codes.cpu().numpy())).max(initial=0))

    @property
    def bias_scale(self) -> Tensor:
        """float32 (channels,)"""
        return (self.input_scale.double() * self.weight_scale.double()).float()

    def forward(self, x: Tensor) -> Tensor:
        q = (x / self.input_scale.double()).round_().to(self._sum_type)
        codes = self.stored_codes.to(self._sum_type)
        sums = self.apply_weights(q, codes.transpose(0, 1) if self.operator == "ConvTranspose" else codes).double()
        per_channel = (-1,) if self.operator == "Linear" else (-1, *[1] * (sums.dim() - 2))
        scale = self.input_scale.double() * self.weight_scale.double()
        real_bias = self.bias.double()
        if self.bias_codes is not None:
            real_bias = self.bias_codes.double() * self.bias_scale.double()
        return sums * scale.reshape(per_channel) + real_bias.reshape(per_channel)

    def apply_weights(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The plain operator, with this layer's stride, padding, dilation and groups; `weight` as torch stores it."""
        if self.operator == "Linear":
            return F.linear(x, weight, bias)
        if self.operator == "ConvTranspose":
            transposed = F.conv_transpose1d if weight.dim() == 3 else F.conv_transpose2d
            return transposed(x, weight, bias, **self.geometry)
        convolve = F.conv1d if weight.dim() == 3 else F.conv2d
        return convolve(x, weight, bias, **self.geometry)


class Requantize(nn.Module):
    """Quantize and dequantize: clip(round_half_even(x / scale), low, high) * scale. scale: float32 scalar.

    rectifies: whether negative values come in, to become zero. saturates: False where all that comes in is on the grid.
    filling: zeros among the channels of the codes.
    """

    scale: Tensor

    def __init__(self, scale: Tensor, quant: Quant, rectifies: bool, saturates: bool = True) -> None:
        super().__init__()
        self.quant = quant
        self.rectifies = rectifies
        self.saturates = saturates
        self.filling = UNFILLED
        self.register_buffer("scale", scale.detach().float().reshape(()))

    def codes(self, x: Tensor) -> Tensor:
        codes = (x / self.scale.double()).round_().clamp_(self.quant.low, self.quant.high)
        return self.filling(codes)

    def forward(self, x: Tensor) -> Tensor:
        return self.codes(x).mul_(self.scale.double())


class IntegerAverage(nn.Module):
    """An average over pixels of codes: exact integer sums, one division, then the input's scale."""

    scale: Tensor

    def __init__(self, average: Any, scale: Tensor) -> None:
        super().__init__()
        self.average = average
        self.register_buffer("scale", scale.detach().float().reshape(()))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        codes = (x / self.scale.double()).round_()
        return self.average(codes, *args, **kwargs) * self.scale.double()  # type: ignore[no-any-return]


class ChannelAffine(nn.Module):
    """A batch norm that no layer can take in: x * factor + offset, float32 numbers in a shape that meets channels."""

    factor: Tensor
    offset: Tensor

    def __init__(self, factor: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor.float())
        self.register_buffer("offset", offset.float())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.offset
