"""What a student is quantized to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from faqd.errors import UserError
from faqd.quant import FLOAT_BITS, Rounding, Target, check_bits
from faqd.quantize.quantizers.activation import ScaleGradient

Attention = Literal["float", "int8"]


@dataclass(frozen=True)
class QuantConfig:
    """What a student is quantized to. activations: 1-8, or 32 for float. per_channel: weight scales.

    weights: 1-8, or 32 where the activations are float as well: a student without any quantizer.
    rounding: of what is behind a ReLU. scale_gradient: by which those scales learn; a lowered file shows none of it.
    exclude: regular expressions; a layer or operator stays float where one fits its path. strict: whether what
    has no integer form is refused, instead of staying float by itself. asymmetric: whether activations of 8 bits have
    all 256 quantized values, which begin where theirs do, instead of 0..127 or as many above zero as below. attention:
    what the products of two activations are computed of, in attention queries and keys, probabilities and values.
    """

    weights: int = 8
    activations: int = 8
    target: Target = "tensorrt"
    per_channel: bool = True
    rounding: Rounding = "nearest"
    scale_gradient: ScaleGradient = "lsq"
    exclude: tuple[str, ...] = ()
    strict: bool = False
    asymmetric: bool = False
    attention: Attention = "float"

    def __post_init__(self) -> None:
        if self.weights == FLOAT_BITS and self.activations != FLOAT_BITS:
            raise UserError("--weight-bits 32: choose 1 to 8; float weights go with --act-bits 32 only.")
        if self.weights != FLOAT_BITS:
            check_bits("--weight-bits", self.weights, 8)
        if self.activations != FLOAT_BITS:
            check_bits("--act-bits", self.activations, 8)

    @property
    def label(self) -> str:
        return f"{self.weights}/{self.activations}"
