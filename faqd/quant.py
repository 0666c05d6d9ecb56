"""The quantization scheme: which integer codes a tensor may take, and how that is written for people.

Words: a *scale* is the real size of one code; a *code* is the integer. Whatever is deployed rounds half to
even and then saturates: code = clip(round_half_even(x / scale), low, high). Training that rounds up deploys as the same
rounding of x + scale * SHIFTS["ceil"], a shift that the bias in front carries.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from faqd.errors import UserError

Target = Literal["tensorrt", "onnxruntime"]
TARGETS: tuple[Target, ...] = ("tensorrt", "onnxruntime")
Rounding = Literal["nearest", "ceil"]
SHIFTS: dict[Rounding, float] = {"nearest": 0.0, "ceil": 0.5 - 2.0**-12}
"""What is added to x / scale before it is rounded half to even. ceil(u) is the rounding of u + 1/2 but where u is an
integer, and sums of codes are: a little less than 1/2 leaves those where they are, and moves one value in 4096."""
FLOAT_BITS = 32
"""The bit count that stands for "not quantized", as in the papers' 4W32A."""


@dataclass(frozen=True)
class Quant:
    """The codes low..high of one tensor, with one scale (axis None) or one per slice of `axis`.

    holds_zero is False only for binary weights, whose codes are -1 and +1.
    """

    low: int
    high: int
    axis: int | None = None
    holds_zero: bool = True

    def __post_init__(self) -> None:
        if not self.low <= 0 < self.high:
            raise ValueError(f"Quant({self.low}, {self.high}): need low <= 0 < high")

    @property
    def signed(self) -> bool:
        return self.low < 0

    @property
    def bits(self) -> int:
        """The bits one code needs when packed (a ternary code needs two)."""
        return 1 if not self.holds_zero else (self.high - self.low).bit_length()

    @property
    def label(self) -> str:
        """Short name for tables: the bits, and the range where the bits alone would mislead."""
        if not self.holds_zero:
            return "1"
        if (self.low, self.high) == (-1, 1):
            return "2 (ternary)"
        if self.low == 0 and self.high == 127:
            return "8 (0..127)"
        if not self.signed:
            return f"{self.bits}"
        return f"{self.bits} (±{self.high})" if self.low == -self.high else f"{self.bits} ({self.low}..{self.high})"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def weight_quant(bits: int, axis: int | None) -> Quant:
    """The weight grid of `bits` (1..8): binary, ternary, then symmetric -Q..Q with Q = 2^(bits-1) - 1."""
    check_bits("--weight-bits", bits, 8)
    if bits == 1:
        return Quant(-1, 1, axis, holds_zero=False)
    high = 1 if bits == 2 else 2 ** (bits - 1) - 1
    return Quant(-high, high, axis)


def activation_quant(bits: int, target: Target, *, asymmetric: bool = False) -> Quant:
    """The grid of `bits` (1..8) for activations that are never negative.

    Eight bits are 0..127 unless the student is for onnxruntime alone, or asymmetric: TensorRT has no unsigned 8-bit
    activations, and holds 0..255 only moved (`int8_offset`).
    """
    check_bits("--act-bits", bits, 8)
    return Quant(0, 127 if bits == 8 and target == "tensorrt" and not asymmetric else 2**bits - 1)


CODES_8 = 256
"""Of eight bits."""


def asymmetric_quant(low: int) -> Quant:
    """All 256 codes, from `low` (-254..0, even) on."""
    return Quant(low, low + CODES_8 - 1)


def int8_offset(quant: Quant) -> int:
    """What is taken off the codes where int8 with a zero point of 0 has to hold them, as TensorRT wants: 0 where it
    does as they are. Even, so that a tie between two codes is one between the same two."""
    return 0 if fits_int8(quant) else (quant.low + 128) // 2 * 2


def fits_int8(quant: Quant) -> bool:
    return quant.low >= -128 and quant.high <= 127


SIGNED_8 = Quant(-128, 127)
"""The grid of everything that can be negative: the network input, shortcuts, and whatever is not behind a ReLU."""

POOLED_8 = Quant(0, 127)
"""The grid of averages of non-negative values, the classifier's input among them."""


def check_bits(option: str, bits: int, most: int) -> None:
    if not 1 <= bits <= most:
        raise UserError(f"{option} {bits}: choose 1 to {most}.")
