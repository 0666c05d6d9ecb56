"""Twins of the deployed modules: what they look like in an ONNX file of opset 19.

tensorrt:     x -> Clip(low * scale, high * scale) or Relu -> QuantizeLinear int8, zero point 0 -> DequantizeLinear
onnxruntime:  x -> QuantizeLinear uint8 -> Clip(low, high) on the codes where narrower -> channels of zero points in an
              image (Pad, or Unsqueeze, Pad, Reshape) -> DequantizeLinear
Weights are int8 initializers with one scale per output channel; biases are float32, or int32 for onnxruntime.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faqd.deploy.export.plain_twins import emit, plain_twin
from faqd.errors import UserError
from faqd.quantize.operators.filling import UNFILLED
from faqd.quantize.operators.layer import COMPUTE, TRANSPOSED, IntegerLayer
from faqd.quantize.operators.norm import ChannelAffine
from faqd.quantize.operators.pool import IntegerAverage
from faqd.quantize.operators.requantize import Requantize
from faqd.saturation import zero_point


def deployed_twin(module: nn.Module, flavour: str) -> nn.Module | None:
    """What emits the operators of a deployed module; None where torch's exporter does well."""
    if isinstance(module, IntegerLayer):
        return _LayerTwin(module)
    if isinstance(module, Requantize):
        return _OnnxruntimeTwin(module) if flavour == "onnxruntime" else _TensorrtTwin(module)
    if isinstance(module, ChannelAffine):
        return _AffineTwin(module)
    if isinstance(module, IntegerAverage):
        return AverageTwin(module.average)
    if flavour == "onnxruntime" and isinstance(module, COMPUTE):
        return _FloatLayerTwin(module)
    return plain_twin(module)


class _LayerTwin(nn.Module):
    codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias: Tensor
    bias_scale: Tensor
    bias_zero_point: Tensor

    def __init__(self, layer: IntegerLayer) -> None:
        super().__init__()
        self.operator = layer.operator
        self._layer = [layer]  # not a submodule: its float64 buffers stay out of the file
        self.integer_bias = layer.bias_codes is not None
        self.register_buffer("codes", layer.stored_codes)
        self.register_buffer("weight_scale", layer.weight_scale.float())
        self.register_buffer("weight_zero_point", torch.zeros_like(layer.weight_scale, dtype=torch.int8))
        if layer.bias_codes is not None:
            self.register_buffer("bias", layer.bias_codes)
            self.register_buffer("bias_scale", layer.bias_scale.float())
            self.register_buffer("bias_zero_point", torch.zeros_like(layer.bias_codes))
        else:
            self.register_buffer("bias", layer.bias.float())
        self.axis = 0
        if self.operator == "ConvTranspose":  # whose weight has its outputs on the second axis
            self.axis, self.codes = 1, self.codes.transpose(0, 1).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        weight = emit(
            "DequantizeLinear",
            (self.codes, self.weight_scale, self.weight_zero_point),
            self.codes,
            torch.float32,
            axis=self.axis,
        )
        bias = self.bias
        if self.integer_bias:
            inputs = (self.bias, self.bias_scale, self.bias_zero_point)
            bias = emit("DequantizeLinear", inputs, self.bias, torch.float32, axis=0)
        if self.operator == "Linear":
            return emit("Gemm", (x, weight, bias), x.new_empty(x.shape[0], bias.shape[0]), torch.float32, transB=1)
        return self._layer[0].apply_weights(x, weight, bias)


class _FloatLayerTwin(nn.Module):
    """A layer that stays float in the onnxruntime flavour, its bias as an int32 mantissa and a power of two.

    That is the same bias to the last bit. With a float one, an optimizer of onnxruntime (WeightBiasQuantization) turns
    the weights of a layer that reads codes into int8; it passes over a bias that is no plain tensor.
    """

    mantissa: Tensor
    unit: Tensor
    zero_point: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        bias = layer.bias.detach().double()
        exponent = bias.frexp().exponent.clamp_min(-100) - _MANTISSA_BITS
        self.register_buffer("mantissa", bias.ldexp(-exponent).round().to(torch.int32))
        self.register_buffer("unit", torch.ones_like(bias).ldexp(exponent).float())
        self.register_buffer("zero_point", torch.zeros_like(self.mantissa))

    def forward(self, x: Tensor) -> Tensor:
        layer, inputs = self.layer, (self.mantissa, self.unit, self.zero_point)
        bias = emit("DequantizeLinear", inputs, self.mantissa, torch.float32, axis=0)
        if isinstance(layer, nn.Linear):
            return emit("Gemm", (x, layer.weight, bias), x.new_empty(x.shape[0], len(bias)), torch.float32, transB=1)
        if isinstance(layer, TRANSPOSED):
            transposed: Any = F.conv_transpose1d if layer.weight.dim() == 3 else F.conv_transpose2d
            geometry = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
            return transposed(x, layer.weight, bias, *geometry)  # type: ignore[no-any-return]
        result: Tensor = layer._conv_forward(x, layer.weight, bias)
        return result


_MANTISSA_BITS = 24


class _RequantizeTwin(nn.Module):
    """bottom, top: the limits of a Clip, on values or on codes as the flavour has it."""

    scale: Tensor
    zero_point: Tensor
    bottom: Tensor
    top: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, bottom: Tensor, top: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("bottom", bottom)
        self.register_buffer("top", top)


class _TensorrtTwin(_RequantizeTwin):
    def __init__(self, requantize: Requantize) -> None:
        quant = requantize.quant
        if quant.high > 127:
            raise UserError(
                "this student has 8-bit activations 0..255, trained with --target onnxruntime; TensorRT has no such "
                "grid. Train with --target tensorrt for an engine."
            )
        scale = requantize.scale.float()
        super().__init__(scale, torch.zeros((), dtype=torch.int8), scale * quant.low, scale * quant.high)
        # Codes saturate at -128 and 127 by themselves; whatever is narrower needs its limits stated.
        self.clipped = requantize.saturates and (quant.high < 127 or (quant.signed and quant.low > -128))
        self.rectified = requantize.rectifies

    def forward(self, x: Tensor) -> Tensor:
        if self.clipped:
            x = emit("Clip", (x, self.bottom, self.top), x, torch.float32)
        elif self.rectified:
            x = x.relu()
        codes = emit("QuantizeLinear", (x, self.scale, self.zero_point), x, torch.int8)
        return emit("DequantizeLinear", (codes, self.scale, self.zero_point), x, torch.float32)


class _OnnxruntimeTwin(_RequantizeTwin):
    def __init__(self, requantize: Requantize) -> None:
        quant = requantize.quant
        zero = zero_point(quant)
        stored = (torch.tensor(code + zero, dtype=torch.uint8) for code in (0, quant.low, quant.high))
        super().__init__(requantize.scale.float(), *stored)
        self.clipped = requantize.saturates and (quant.low + zero > 0 or quant.high + zero < 255)
        self.filling = requantize.filling
        if self.filling != UNFILLED:
            # Behind each channel stands one of zeros where they are padded on an axis of their own.
            ends = [self.filling.at_end, 1] if self.filling.behind_each else [self.filling.at_end]
            self.register_buffer("pads", torch.tensor([0] * len(ends) + ends))
            self.register_buffer("axes", torch.tensor([1, 2][: len(ends)]))
            self.register_buffer("apart", torch.tensor([2]))

    def forward(self, x: Tensor) -> Tensor:
        codes = emit("QuantizeLinear", (x, self.scale, self.zero_point), x, torch.uint8)
        if self.clipped:
            codes = emit("Clip", (codes, self.bottom, self.top), x, torch.uint8)
        if self.filling != UNFILLED:
            x, codes = self._filled(x, codes)
        return emit("DequantizeLinear", (codes, self.scale, self.zero_point), x, torch.float32)

    def _filled(self, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """x: of the sizes that the codes have."""
        batch, channels, *pixels = x.shape
        filled = x.new_empty(batch, self.filling.channels(channels), *pixels)
        padded = filled
        if self.filling.behind_each:
            codes = emit("Unsqueeze", (codes, self.get_buffer("apart")), x.unsqueeze(2), torch.uint8)
            padded = x.new_empty(batch, channels + self.filling.at_end, 2, *pixels)
        inputs = (codes, self.get_buffer("pads"), self.zero_point, self.get_buffer("axes"))
        codes = emit("Pad", inputs, padded, torch.uint8)
        if self.filling.behind_each:
            sizes = torch.tensor([0, *filled.shape[1:]])
            codes = emit("Reshape", (codes, sizes), filled, torch.uint8)
        return filled, codes


class AverageTwin(nn.Module):
    def __init__(self, average: Any) -> None:
        super().__init__()
        self.average = average

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.average(x, *args, **kwargs)


class _AffineTwin(nn.Module):
    factor: Tensor
    offset: Tensor

    def __init__(self, affine: ChannelAffine) -> None:
        super().__init__()
        self.register_buffer("factor", affine.factor.float())
        self.register_buffer("offset", affine.offset.float())

    def forward(self, x: Tensor) -> Tensor:
        return emit("Add", (emit("Mul", (x, self.factor), x, torch.float32), self.offset), x, torch.float32)
