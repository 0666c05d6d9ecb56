"""Rounding to a grid, which a trained quantizer becomes.

In an ONNX file:
tensorrt:     x -> Clip(low * scale, high * scale) or Relu -> QuantizeLinear int8, zero point 0 -> DequantizeLinear
onnxruntime:  x -> QuantizeLinear uint8 -> Clip(low, high) on the codes where narrower -> channels of zero points in an
              image (Pad, or Unsqueeze, Pad, Reshape) -> DequantizeLinear
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from faqd.quant import Quant
from faqd.quantize.operators.emit import Emission, Value
from faqd.quantize.operators.filling import UNFILLED
from faqd.quantize.operators.row import ExactForm
from faqd.saturation import zero_point

Flavour = Literal["tensorrt", "onnxruntime", "float"]


class Requantize(nn.Module):
    """Quantize and dequantize: clip(round_half_even(x / scale), low, high) * scale. scale: float32 scalar.

    rectifies: whether negative values come in, to become zero. saturates: False where all that comes in is on the grid.
    filling: zeros among the channels of the codes. offset: what was taken off the codes that were trained.
    """

    scale: Tensor

    def __init__(self, scale: Tensor, quant: Quant, rectifies: bool, saturates: bool = True, offset: int = 0) -> None:
        super().__init__()
        self.offset = offset
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


def _emit(emission: Emission) -> Value:
    return _emit_unsigned(emission) if emission.flavour == "onnxruntime" else _emit_signed(emission)


def _emit_signed(emission: Emission) -> Value:
    rounding, quant, x = emission.module, emission.module.quant, emission.x
    scale = rounding.scale.float()
    # Codes saturate at -128 and 127 by themselves; whatever is narrower needs its limits stated.
    if rounding.saturates and (quant.high < 127 or (quant.signed and quant.low > -128)):
        limits = (emission.number("bottom", scale * quant.low), emission.number("top", scale * quant.high))
        x = emission.op("Clip", x, *limits)
    elif rounding.rectifies:
        x = emission.op("Relu", x)
    grid = (emission.number("scale", scale), emission.number("zero_point", torch.zeros((), dtype=torch.int8)))
    return emission.op("DequantizeLinear", emission.op("QuantizeLinear", x, *grid), *grid)


def _emit_unsigned(emission: Emission) -> Value:
    rounding, quant = emission.module, emission.module.quant
    zero = zero_point(quant)

    def code(name: str, value: int) -> Value:
        return emission.number(name, torch.tensor(value + zero, dtype=torch.uint8))

    grid = (emission.number("scale", rounding.scale), code("zero_point", 0))
    codes = emission.op("QuantizeLinear", emission.x, *grid)
    if rounding.saturates and (quant.low + zero > 0 or quant.high + zero < 255):
        codes = emission.op("Clip", codes, code("bottom", quant.low), code("top", quant.high))
    if rounding.filling != UNFILLED:
        codes = _filled(emission, codes, grid[1])
    return emission.op("DequantizeLinear", codes, *grid)


def _filled(emission: Emission, codes: Value, zero: Value) -> Value:
    """Behind each channel stands one of zeros where they are padded on an axis of their own."""
    filling = emission.module.filling
    ends = [filling.at_end, 1] if filling.behind_each else [filling.at_end]
    pads = emission.number("pads", [0] * len(ends) + ends)
    axes = emission.number("axes", [1, 2][: len(ends)])
    if not filling.behind_each:
        return emission.op("Pad", codes, pads, zero, axes)
    codes = emission.op("Unsqueeze", codes, emission.number("apart", [2]))
    sizes = emission.number("sizes", [0, *emission.after[1:]])
    return emission.op("Reshape", emission.op("Pad", codes, pads, zero, axes), sizes)


EXACT_FORMS = (ExactForm(Requantize, _emit),)
