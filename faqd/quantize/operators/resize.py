"""Resizing: pixels repeated, or a weighted average of up to four."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faqd.quantize.operators.emit import Emission, Value
from faqd.quantize.operators.row import Call, ExactForm, Operator, Rule
from faqd.quantize.operators.separable import resized
from faqd.quantize.operators.treatment import AVERAGED, PASSED_ON, Treatment


class Nearest(nn.Module):
    """Pixels repeated a whole number of times. before, size: spatial sizes of input and result."""

    def __init__(self, before: tuple[int, ...], size: tuple[int, ...]) -> None:
        super().__init__()
        self.before, self.size = before, size

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, self.size, mode="nearest")


class Bilinear(nn.Module):
    """Bilinear interpolation, a weighted average of up to four pixels. before, size: (H, W) of input and result."""

    def __init__(self, before: tuple[int, ...], size: tuple[int, ...], align_corners: bool) -> None:
        super().__init__()
        self.before, self.size, self.align_corners = before, size, align_corners

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, self.size, mode="bilinear", align_corners=self.align_corners)


def lines(inputs: int, outputs: int, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Linear interpolation along one axis: for each output the two input pixels (int64) and the second one's weight.

    weight: float64. The position of output i is (i + 1/2) * inputs / outputs - 1/2, or i * (inputs - 1) /
    (outputs - 1) with aligned corners, at least 0.
    """
    index = torch.arange(outputs, dtype=torch.float64)
    if align_corners:
        position = index * (inputs - 1) / max(1, outputs - 1)
    else:
        position = ((index + 0.5) * inputs / outputs - 0.5).clamp_min(0)
    low = position.floor().clamp_max(inputs - 1)
    return low.long(), (low + 1).clamp_max(inputs - 1).long(), position - low


class Interpolate(nn.Module):
    """Bilinear interpolation of codes: along rows, then along columns, then the input's scale."""

    scale: Tensor

    def __init__(self, bilinear: Bilinear, scale: Tensor) -> None:
        super().__init__()
        self.before, self.size, self.align_corners = bilinear.before, bilinear.size, bilinear.align_corners
        self.register_buffer("scale", scale.detach().float().reshape(()))

    def forward(self, x: Tensor) -> Tensor:
        values = (x / self.scale.double()).round_()
        for axis, size in zip((2, 3), self.size, strict=True):
            low, high, weight = lines(values.shape[axis], size, self.align_corners)
            weight = weight.reshape(-1, *[1] * (3 - axis))
            first, second = values.index_select(axis, low), values.index_select(axis, high)
            values = first * (1 - weight) + second * weight
        return values * self.scale.double()


def _resize(mode: str) -> Rule:
    """A resize whose ratio is that of the sizes: with any other, torch takes the pixels by a number no file has."""

    def rule(call: Call) -> nn.Module | None:
        before, size = tuple(call.before[2:]), tuple(call.after[2:])
        factors = call["scale_factors"] if call.get("scale_factors") is not None else [None] * len(size)
        if any(f is not None and b * f != a for b, f, a in zip(before, factors, size, strict=True)):
            return resized(call)
        if mode == "nearest":
            return resized(call) if any(a % b for b, a in zip(before, size, strict=True)) else Nearest(before, size)
        return Bilinear(before, size, bool(call["align_corners"]))

    return rule


def _emit_nearest(emission: Emission) -> Value:
    rule = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return _emit(emission, "nearest", rule)


def _emit_linear(emission: Emission) -> Value:
    corners = "align_corners" if emission.module.align_corners else "half_pixel"
    return _emit(emission, "linear", {"coordinate_transformation_mode": corners})


def _emit(emission: Emission, mode: str, rule: dict[str, str]) -> Value:
    """By its ratios, or by its sizes where float32 cannot hold the ratios."""
    resize = emission.module
    ratios = torch.tensor(resize.size, dtype=torch.float64) / torch.tensor(resize.before)
    if (ratios.float().double() == ratios).all():
        scales = emission.number("scales", torch.cat([torch.ones(2), ratios.float()]))
        return emission.op("Resize", emission.x, None, scales, mode=mode, **rule)
    axes = list(range(2, 2 + len(resize.size)))
    sizes = emission.number("sizes", torch.tensor(resize.size))
    return emission.op("Resize", emission.x, None, None, sizes, axes=axes, mode=mode, **rule)


OPERATORS = (
    Operator(
        "reshape",
        (Nearest,),
        # Of a whole factor, both kinds of nearest pixel are one.
        {
            **dict.fromkeys(("upsample_nearest1d", "upsample_nearest2d"), _resize("nearest")),
            **dict.fromkeys(("_upsample_nearest_exact1d", "_upsample_nearest_exact2d"), _resize("nearest")),
        },
        emit=_emit_nearest,
        stands_for="nearest resizing by whole factors",
        treatment=Treatment(
            PASSED_ON, "on INT8: the rounding is repeated behind it", "on integers, quantized again unchanged"
        ),
    ),
    Operator(
        "average",
        (Bilinear,),
        {"upsample_bilinear2d": _resize("bilinear")},
        on_codes=Interpolate,
        emit=_emit_linear,
        stands_for="bilinear resizing",
        treatment=AVERAGED,
    ),
)
EXACT_FORMS = (ExactForm(Interpolate, _emit_linear),)
