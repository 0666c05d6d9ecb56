"""Convolution and linear layers: what they are captured from, and what they are on codes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from faqd.quantize.operators.filling import UNFILLED
from faqd.quantize.operators.row import Call, Operator, Rule, parameter, sizes
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


def _grouped(layer: Any, node: fx.Node) -> str | None:
    if layer.groups > 1:
        return "a transposed convolution with groups cannot be quantized yet; --exclude keeps it float."
    return None


OPERATORS = (
    Operator("compute", (nn.Conv1d,), {"conv1d": _convolution(nn.Conv1d, F.conv1d)}),
    Operator("compute", (nn.Conv2d,), {"conv2d": _convolution(nn.Conv2d, F.conv2d)}),
    Operator(
        "compute",
        (nn.ConvTranspose1d,),
        {"conv_transpose1d": _convolution(nn.ConvTranspose1d, F.conv_transpose1d)},
        problem=_grouped,
    ),
    Operator(
        "compute",
        (nn.ConvTranspose2d,),
        {"conv_transpose2d": _convolution(nn.ConvTranspose2d, F.conv_transpose2d)},
        problem=_grouped,
    ),
    Operator("compute", (nn.Linear,), {"linear": _linear, "matmul": _product, "mm": _product, "addmm": _affine}),
)
