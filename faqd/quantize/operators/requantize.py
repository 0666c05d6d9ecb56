"""Rounding to a grid, which a trained quantizer becomes."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from faqd.quant import Quant
from faqd.quantize.operators.filling import UNFILLED

Flavour = Literal["tensorrt", "onnxruntime", "float"]


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
