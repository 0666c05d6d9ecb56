"""Activations on a grid with a learned scale.

y = scale * clip(round_half_even(x / scale + shift), low, high), where the shift makes rounding up of that to nearest
(faqd.quant.SHIFTS); the scale is learned, by the straight-through derivative of that very function (LSQ, arXiv
1902.08153) or by one of the paper's coarse gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from faqd.quant import SHIFTS, Quant, Rounding, asymmetric_quant

ScaleGradient = Literal["lsq", "mean", "pact", "min"]
COARSE: dict[ScaleGradient, Callable[[int], float]] = {
    "mean": lambda high: (high + 1) / 2,
    "pact": lambda _: 0.0,
    "min": lambda _: 1.0,
}
"""The paper's slope of y over the scale inside the clip, by the highest code; above the clip it is that code."""
COARSE_FACTOR, COARSE_LIMIT = 0.01, 1.0
"""What the released code multiplies the sum of a coarse gradient with, and the magnitude at which it cuts that off."""

SMALLEST_SCALE = 1e-6
"""Activation scales stay above this; TensorRT refuses a zero scale."""


class ActivationQuantizer(nn.Module):
    """Rounds a tensor onto scale * (low..high) and learns the scale.

    rectifies: whether it stands in the place of a ReLU as well. gradient: of the scale; only lsq knows negative codes.
    `enabled` is False only while ranges are collected. step: the share of itself by which a forward pass in training
    lets the scale be changed since the last one; None for any. asymmetric: whether calibration chooses the lowest code
    (`begin_at`), which is then a tensor of the student's, as the scale is.
    """

    lowest: Tensor

    def __init__(
        self,
        quant: Quant,
        rectifies: bool,
        rounding: Rounding = "nearest",
        gradient: ScaleGradient = "lsq",
        *,
        asymmetric: bool = False,
    ) -> None:
        super().__init__()
        assert not quant.signed or (rounding, gradient) == ("nearest", "lsq")
        self.asymmetric = asymmetric
        if asymmetric:
            self.register_buffer("lowest", torch.tensor(quant.low))
        self.quant = quant
        self.rectifies = rectifies
        self.shift = SHIFTS[rounding]
        self.gradient = gradient
        self.scale = nn.Parameter(torch.ones(()))
        self.enabled = True
        self.step: float | None = None
        self._used: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x.relu() if self.rectifies else x
        if self.training:
            self.keep_scale(self.step)
            self._used = self.scale.detach().clone()
        rounded: Tensor = _LearnedStep.apply(x, self.scale, self.quant, self.shift, self.gradient)
        return rounded

    @torch.no_grad()
    def keep_scale(self, step: float | None) -> None:
        """Undo what an optimizer did to the scale beyond `step`, a share of the scale last trained with; None: nothing.

        Early gradients, summed over the elements of a whole map, and momentum can carry a scale to ten times its value
        within an epoch. All that follows is then too coarse for any gradient to bring it back.
        """
        if step is not None and self._used is not None:
            self.scale.copy_(torch.clamp(self.scale, self._used * (1 - step), self._used * (1 + step)))
        self.scale.clamp_min_(SMALLEST_SCALE)

    @property
    def quant(self) -> Quant:
        if self.asymmetric and self._read_from != self._state_of_lowest():
            self.quant = asymmetric_quant(int(self.lowest))
        return self._quant

    @quant.setter
    def quant(self, quant: Quant) -> None:
        self._quant = quant
        self._read_from = self._state_of_lowest() if self.asymmetric else None

    def _state_of_lowest(self) -> tuple[int, int]:
        """Another one whenever the tensor is, whoever wrote it: to look at its value stops a GPU."""
        return id(self.lowest), self.lowest._version

    def begin_at(self, low: int) -> None:
        """Let all 256 codes begin at `low` (-254..0, even), where that is for calibration to choose."""
        self.lowest.fill_(low)

    def forget(self) -> None:
        """The scale was set by somebody else than an optimizer: where it was before binds it no longer."""
        self._used = None

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.forget()

    def extra_repr(self) -> str:
        return self.quant.label


class _LearnedStep(torch.autograd.Function):
    """d y / d x = 1 inside the clip, 0 <= x <= high * scale, and 0 outside; u = x / scale + shift is saved.

    lsq: d y / d scale = round(u) - u inside, low or high outside: the shift in x counts as a constant. The sum is
    divided by sqrt(reach * elements per sample), equation 4 of LSQ, so that one learning rate suits weights and scales;
    reach is the highest code.
    Coarse: COARSE inside, high above, 0 below; the sum as the released code scales and limits it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, quant: Quant, shift: float, gradient: ScaleGradient) -> Tensor:
        # Divided, as QuantizeLinear does: the product with 1 / scale falls on the other side of some ties.
        u = (x if x.dtype == torch.float64 else x.float()) / scale
        u = u.add_(shift) if shift else u
        ctx.save_for_backward(u)
        ctx.quant, ctx.shift, ctx.gradient, ctx.dtype = quant, shift, gradient, x.dtype
        return u.clamp(quant.low, quant.high).round_().mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (u,) = ctx.saved_tensors
        low, high = ctx.quant.low + ctx.shift, ctx.quant.high + ctx.shift
        passed = _where_inside(gradient, u, low, high)
        if ctx.gradient == "lsq":
            slope = u.clamp(ctx.quant.low, ctx.quant.high).round_().sub_(_where_inside(u, u, low, high))
            per_sample = max(1, u.numel() // max(1, u.shape[0]))
            reach = max(ctx.quant.high, -ctx.quant.low - 1)
            total = _dot(gradient, slope) / math.sqrt(reach * per_sample)
        else:
            above = _where_inside(gradient, u, float(np.nextafter(np.float32(high), np.float32(math.inf))), math.inf)
            total = COARSE[ctx.gradient](ctx.quant.high) * passed.sum() + ctx.quant.high * above.sum()
            total = (COARSE_FACTOR * total).clamp(-COARSE_LIMIT, COARSE_LIMIT)
        return passed.to(ctx.dtype), total, None, None, None


def _where_inside(values: Tensor, u: Tensor, low: float, high: float) -> Tensor:
    """`values` where low <= u <= high, else 0, in one pass: masks of booleans cost ten times as much on a CPU."""
    below, above = (
        float(np.nextafter(np.float32(bound), np.float32(way))) for bound, way in ((low, -math.inf), (high, math.inf))
    )
    inside: Tensor = torch.ops.aten.hardtanh_backward(values, u, below, above)  # its own bounds lie outside
    return inside


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products; the order of the elements does not matter, so channels-last tensors are not copied."""
    if a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last):
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.dot(a.reshape(-1), b.reshape(-1))
