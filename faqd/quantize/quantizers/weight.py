"""Weights by least squares, with a gradient.

W stays float; forward and backward use scale * codes(W), and the gradient with respect to that product goes to W
unchanged (the straight-through rule of arXiv 2302.10899). The scale is recomputed from W.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from faqd.quant import Quant

SCAN = torch.logspace(math.log10(0.25), math.log10(1.2), 15)
"""Starting points of the least-squares scan, as multiples of 2 max|w| / (2^bits - 1); 1 is added to them."""
SCAN_PASSES = 4
EXACT_SIZE = 2**20
"""Weights times codes up to which the global optimum is searched: about a tenth of a second on a CPU."""


def project(weight: Tensor, quant: Quant, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Least-squares codes and scale: minimise ||weight - scale * codes||^2 per slice of quant.axis.

    weight: float, output channels first. Returns codes (weight's shape, integer-valued, weight's dtype) and
    scale (output channels, or 1 where quant.axis is None), positive.
    Binary and ternary codes are global optima every time. Wider grids alternate assignment and scale once from `start`;
    without one they are the global optimum of a small tensor, and the best of several starting points for a large one.
    """
    rows = weight.detach().flatten(1) if quant.axis is not None else weight.detach().reshape(1, -1)
    if not quant.holds_zero:
        codes, scale = _binary(rows)
    elif start is not None and quant.high > 1:
        codes, scale = _alternate(rows, start.to(rows.dtype), quant.high)
    elif quant.high == 1 or rows.numel() * quant.high <= EXACT_SIZE:
        codes, scale = _exact(rows, quant.high)
    else:
        codes, scale = _scan(rows, quant.high)
    return codes.reshape(weight.shape), _ordinary_where_zero(scale)


def _binary(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Signs, zero counted as positive; a row of zeros gets zero codes, for it has no scale to shrink."""
    scale = rows.abs().mean(1)
    signs = torch.where(rows < 0, -1.0, 1.0).to(rows.dtype)
    return signs * (scale > 0)[:, None], scale


def _exact(rows: Tensor, high: int) -> tuple[Tensor, Tensor]:
    """The global optimum, for one sort.

    While the scale falls, |w| passes from code k - 1 to k at |w| / (k - 1/2), which adds |w| to <w, q> and 2k - 1 to
    <q, q>. The error at the best scale is |w|^2 - <w, q>^2 / <q, q>: prefix sums give it for every assignment there is.
    """
    magnitudes = rows.abs()
    codes = torch.arange(1, high + 1, device=rows.device)
    order = (magnitudes[:, :, None] / (codes - 0.5)).flatten(1).argsort(1, descending=True)
    product = magnitudes.gather(1, order // high).double().cumsum(1)
    square = (2 * codes - 1)[order % high].cumsum(1)
    best = (product.square() / square).argmax(1, keepdim=True)
    return _alternate(rows, (product / square).gather(1, best).squeeze(1).to(rows.dtype), high)


def _alternate(rows: Tensor, scale: Tensor, high: int) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(rows)
    return codes, _reassign(rows, rows.abs().amax(1), scale, high, codes, torch.empty_like(rows))


def _reassign(rows: Tensor, largest: Tensor, scale: Tensor, high: int, codes: Tensor, spare: Tensor) -> Tensor:
    """Writes the codes of `scale` into `codes`, and gives the scale that fits these best. spare: of the shape of rows;
    memory that is there already, since new memory takes longer than the arithmetic."""
    # A start so coarse that every code would be zero could never be left again.
    scale = torch.where(2 * largest <= scale, largest / (high + 0.5), scale)
    torch.div(rows, scale.clamp_min(torch.finfo(rows.dtype).tiny)[:, None], out=codes).round_().clamp_(-high, high)
    norm = torch.square(codes, out=spare).sum(1)
    fitted = torch.mul(rows, codes, out=spare).sum(1) / norm.clamp_min(1)
    return torch.where(norm > 0, fitted, scale)


def _scan(rows: Tensor, high: int) -> tuple[Tensor, Tensor]:
    largest = rows.abs().amax(1)
    usual = largest / (high + 0.5)
    best_error = torch.full_like(usual, math.inf)
    codes, scale = torch.zeros_like(rows), usual
    trial, spare = torch.empty_like(rows), torch.empty_like(rows)
    for factor in [1.0, *SCAN.tolist()]:
        trial_scale = usual * factor
        for _ in range(SCAN_PASSES):
            trial_scale = _reassign(rows, largest, trial_scale, high, trial, spare)
        error = torch.mul(trial_scale[:, None], trial, out=spare).sub_(rows).square_().sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        torch.where(better[:, None], trial, codes, out=codes)
        scale = torch.where(better, trial_scale, scale)
    return codes, scale


def _ordinary_where_zero(scale: Tensor) -> Tensor:
    """A slice of zeros takes the layer's median scale: any positive one is exact, a tiny one overflows int32 biases."""
    positive = scale > 0
    # Without a look at the values, for which the host would have to wait; no positive one leaves NaN.
    ordinary = torch.where(positive, scale, torch.nan).nanmedian().nan_to_num(1.0)
    return torch.where(positive, scale, ordinary)


def within_pairs(
    weight: Tensor, codes: Tensor, scale: Tensor, quant: Quant, limit: int, at_end: int = 0
) -> tuple[Tensor, Tensor]:
    """Coarser codes where two neighbours of one sign add up to more than `limit` (faqd.saturation), with the scale that
    fits them best; others as they came.

    weight, codes: output channels first. at_end: zeros behind the input channels, which count as neighbours. The scale
    grows until the largest pair of weights takes limit - 1 codes: rounding adds at most one half to each of the two.
    """
    rows = weight.detach().flatten(1)
    coarse = largest_pairs(weight.detach(), at_end) / (limit - 1)
    beyond = largest_pairs(codes, at_end) > limit
    if quant.axis is None:  # one scale for all channels
        rows, coarse, beyond = rows.reshape(1, -1), coarse.amax(0, keepdim=True), beyond.any(0, keepdim=True)
    coarser = (rows / coarse.clamp_min(torch.finfo(rows.dtype).tiny)[:, None]).round().clamp(-quant.high, quant.high)
    fitted = (rows * coarser).sum(1) / coarser.square().sum(1).clamp_min(1)
    kept = codes.reshape(rows.shape)
    return torch.where(beyond[:, None], coarser, kept).reshape(weight.shape), torch.where(beyond, fitted, scale)


def largest_pairs(weight: Tensor, at_end: int = 0) -> Tensor:
    """As faqd.saturation.largest_pairs, of weights (O, C, kernel...) with zeros behind the input channels."""
    rows = nn.functional.pad(weight.movedim(1, -1), (0, at_end)).flatten(1)
    pairs = nn.functional.pad(rows, (0, rows.shape[1] % 2)).unflatten(1, (-1, 2))
    return torch.maximum(pairs.clamp_min(0).sum(2).amax(1), -pairs.clamp_max(0).sum(2).amin(1))


class WeightQuantizer(nn.Module):
    """A torch parametrization of `weight`: float weights in, scale * codes out, gradient passed straight through.

    `scale` is the warm start of the next projection and part of the checkpoint, so that the codes seen in training,
    in evaluation and in the exported file come from one and the same call. `enabled` is False only while ranges are
    collected. pair_limit, zeros_at_end: see `within_pairs`; a limit of None where any pair may be.
    """

    scale: Tensor

    def __init__(self, quant: Quant, weight: Tensor) -> None:
        super().__init__()
        self.quant = quant
        self.pair_limit: int | None = None
        self.zeros_at_end = 0
        self.enabled = True
        self.register_buffer("scale", project(weight, quant)[1])

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The codes of `weight` and their scale, as every forward pass computes them."""
        codes, scale = project(weight, self.quant, self.scale)
        if self.pair_limit is None:
            return codes, scale
        return within_pairs(weight, codes, scale, self.quant, self.pair_limit, self.zeros_at_end)

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return weight
        codes, scale = self.codes(weight)
        if self.training:
            self.scale.copy_(scale)
        product: Tensor = _Straight.apply(weight, codes * scale.reshape(-1, *[1] * (weight.dim() - 1)))
        return product


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, quantized: Tensor) -> Tensor:
        return quantized

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
