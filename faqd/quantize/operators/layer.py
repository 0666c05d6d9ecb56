"""Convolution and linear layers: what they are captured from, and what they are on codes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from faqd.quantize.operators.emit import Emission, Value
from faqd.quantize.operators.filling import UNFILLED
from faqd.quantize.operators.row import Call, ExactForm, Operator, Rule, parameter, sizes
from faqd.quantize.operators.treatment import SUMS, Treatment
from faqd.saturation import in_kernel_order, largest_pairs

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
COMPUTE = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)

EXACT_FLOAT32 = 2**24
"""Sums of integers below this are exact in float32, whatever their order."""


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
        if isinstance(layer, TRANSPOSED):
            self.operator = "ConvTranspose"
        self.geometry = _geometry(layer)
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


def _convolution(kind: Any, function: Any) -> Rule:
    def rule(call: Call) -> Any:
        names = ("stride", "padding", "output_padding", "groups", "dilation")
        geometry = {name: given for name in names if (given := call.get(name)) is not None}
        geometry = {name: tuple(given) if isinstance(given, list) else given for name, given in geometry.items()}
        weight, bias = call.tensor(call["weight"]), call.tensor(call["bias"])
        if weight is None or (bias is None and call["bias"] is not None):
            return call.function(function, call.x, call["weight"], call["bias"], **geometry)
        return call.layer(layer_with(kind, weight, bias, geometry), _tensors(call))

    return rule


def _linear(call: Call) -> Any:
    weight, bias = call.tensor(call["weight"]), call.tensor(call["bias"])
    if weight is None or (bias is None and call["bias"] is not None) or weight.dim() != 2:
        return call.function(F.linear, call.x, call["weight"], call["bias"])
    return call.layer(layer_with(nn.Linear, weight, bias, {}), _tensors(call))


def _product(call: Call) -> Any:
    """x @ weight: a linear layer, whose weight torch keeps the other way round."""
    x, weight = call.x, call.get("other") if call.get("other") is not None else call["mat2"]
    if not call.is_own(weight) or call.is_own(x) or len(sizes(weight)) != 2:
        return None
    return call.function(F.linear, x, call.function(torch.permute, weight, (1, 0), word="t"), None)


def _affine(call: Call) -> Any:
    """bias + x @ weight"""
    bias, x, weight = call["self"], call["mat1"], call["mat2"]
    plain = call.get("beta") == 1 and call.get("alpha") == 1 and len(sizes(bias)) == 1
    if not plain or not call.is_own(weight) or not call.is_own(bias) or call.is_own(x):
        return None
    return call.function(F.linear, x, call.function(torch.permute, weight, (1, 0), word="t"), bias)


def _tensors(call: Call) -> list[fx.Node]:
    return [call[name] for name in ("weight", "bias") if call[name] is not None]


def layer_with(kind: Any, weight: Tensor, bias: Tensor | None, geometry: dict[str, Any]) -> nn.Module:
    """The layer of a kind around its tensors. geometry: of a convolution, as torch.nn calls it."""
    rows, columns, *kernel = weight.shape
    groups = geometry.get("groups", 1)
    inputs, outputs = (rows, columns * groups) if kind in TRANSPOSED else (columns * groups, rows)
    sizes = (inputs, outputs) if kind is nn.Linear else (inputs, outputs, tuple(kernel))
    layer = kind(*sizes, bias=bias is not None, device="meta", **geometry)
    layer.weight = parameter(weight)
    if bias is not None:
        layer.bias = parameter(bias)
    return layer.eval()  # type: ignore[no-any-return]


def _emit_float(emission: Emission) -> Value:
    layer = emission.module
    weight = emission.number("weight", layer.weight)
    if layer.bias is None:
        bias = None
    elif emission.flavour == "onnxruntime":
        bias = _bias_in_two(emission, layer.bias)
    else:
        bias = emission.number("bias", layer.bias)
    return _emit_layer(emission, layer, weight, bias)


def _bias_in_two(emission: Emission, bias: Tensor) -> Value:
    """The bias of a layer that stays float in the onnxruntime flavour, as an int32 mantissa and a power of two.

    That is the same bias to the last bit, for none is smaller than 2^-100 (`fold_batch_norm`). With a float one, an
    optimizer of onnxruntime (WeightBiasQuantization) turns the weights of a layer that reads codes into int8; it passes
    over a bias that is no plain tensor.
    """
    exponent = bias.detach().double().frexp().exponent.clamp_min(-100) - _MANTISSA_BITS
    mantissa = bias.detach().double().ldexp(-exponent).round().to(torch.int32)
    unit = torch.ones_like(bias, dtype=torch.float64).ldexp(exponent)
    numbers = {"mantissa": mantissa, "unit": unit, "zero_point": torch.zeros_like(mantissa)}
    return emission.op("DequantizeLinear", *(emission.number(*each) for each in numbers.items()), axis=0)


_MANTISSA_BITS = 24


def _emit_integers(emission: Emission) -> Value:
    layer = emission.module
    codes, axis = layer.stored_codes, 0
    if layer.operator == "ConvTranspose":  # whose weight has its outputs on the second axis
        codes, axis = codes.transpose(0, 1).contiguous(), 1
    zeros = torch.zeros_like(layer.weight_scale, dtype=torch.int8)
    weight = {"codes": codes, "weight_scale": layer.weight_scale, "weight_zero_point": zeros}
    real_weight = emission.op("DequantizeLinear", *(emission.number(*each) for each in weight.items()), axis=axis)
    if layer.bias_codes is None:
        return _emit_layer(emission, layer, real_weight, emission.number("bias", layer.bias))
    zeros = torch.zeros_like(layer.bias_codes)
    bias = {"bias": layer.bias_codes, "bias_scale": layer.bias_scale, "bias_zero_point": zeros}
    real_bias = emission.op("DequantizeLinear", *(emission.number(*each) for each in bias.items()), axis=0)
    return _emit_layer(emission, layer, real_weight, real_bias)


def _emit_layer(emission: Emission, layer: Any, weight: Value, bias: Value | None) -> Value:
    """layer: a layer of torch's, or an IntegerLayer, which has the geometry of one."""
    given = layer.geometry if isinstance(layer, IntegerLayer) else _geometry(layer)
    operands = (emission.x, weight) if bias is None else (emission.x, weight, bias)
    if not given:
        return emission.op("Gemm", *operands, transB=1)
    kernel = list((layer.codes if isinstance(layer, IntegerLayer) else layer.weight).shape[2:])
    geometry = {
        "kernel_shape": kernel,
        "strides": list(given["stride"]),
        "pads": _pads(given, kernel),
        "dilations": list(given["dilation"]),
        "group": given["groups"],
    }
    if "output_padding" not in given:
        return emission.op("Conv", *operands, **geometry)
    return emission.op("ConvTranspose", *operands, **geometry, output_padding=list(given["output_padding"]))


def _geometry(layer: Any) -> dict[str, Any]:
    """stride, padding and so on of a convolution; nothing of a linear layer."""
    if isinstance(layer, nn.Linear):
        return {}
    names = ["stride", "padding", "dilation", "groups", *(["output_padding"] * isinstance(layer, TRANSPOSED))]
    return {name: getattr(layer, name) for name in names}


def _pads(geometry: dict[str, Any], kernel: list[int]) -> list[int]:
    """At the beginning of each axis, then at the end of each."""
    if geometry["padding"] == "valid":
        return [0, 0] * len(kernel)
    if geometry["padding"] == "same":
        both = [step * (size - 1) for step, size in zip(geometry["dilation"], kernel, strict=True)]
        return [total // 2 for total in both] + [total - total // 2 for total in both]
    return [*geometry["padding"], *geometry["padding"]]


def _grouped(layer: Any, node: fx.Node) -> str | None:
    if layer.groups > 1:
        return "a transposed convolution with groups cannot be quantized yet; --exclude keeps it float."
    return None


_WORDS = (
    "Conv1d and Conv2d, `F.conv1d` and `F.conv2d`: strided, dilated, grouped, depthwise, any padding but a circular one"
)
_TRANSPOSED_WORDS = (
    "ConvTranspose1d and 2d, also as functions, told their `output_size` or not; with groups a float island"
)
_INTEGERS = Treatment(SUMS, "INT8", "integer where its result is rounded at once or behind moves and sums, else float")
_FLOATS = Treatment(f"{SUMS}, on the second axis", "float", "float")

OPERATORS = (
    Operator(
        "compute",
        (nn.Conv1d,),
        {"conv1d": _convolution(nn.Conv1d, F.conv1d)},
        emit=_emit_float,
        stands_for=_WORDS,
        treatment=_INTEGERS,
    ),
    Operator(
        "compute",
        (nn.Conv2d,),
        {"conv2d": _convolution(nn.Conv2d, F.conv2d)},
        emit=_emit_float,
        stands_for=_WORDS,
        treatment=_INTEGERS,
    ),
    Operator(
        "compute",
        (nn.ConvTranspose1d,),
        {"conv_transpose1d": _convolution(nn.ConvTranspose1d, F.conv_transpose1d)},
        problem=_grouped,
        emit=_emit_float,
        stands_for=_TRANSPOSED_WORDS,
        treatment=_FLOATS,
    ),
    Operator(
        "compute",
        (nn.ConvTranspose2d,),
        {"conv_transpose2d": _convolution(nn.ConvTranspose2d, F.conv_transpose2d)},
        problem=_grouped,
        emit=_emit_float,
        stands_for=_TRANSPOSED_WORDS,
        treatment=_FLOATS,
    ),
    Operator(
        "compute",
        (nn.Linear,),
        {"linear": _linear, "matmul": _product, "mm": _product, "addmm": _affine},
        emit=_emit_float,
        stands_for="Linear and `F.linear`, on vectors or on the last axis of a map; `x @ weight`, `torch.addmm`",
        treatment=Treatment(SUMS, "INT8", "integer"),
    ),
)
EXACT_FORMS = (ExactForm(IntegerLayer, _emit_integers),)
