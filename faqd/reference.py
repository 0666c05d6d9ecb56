"""Quantized arithmetic in numpy: slow, small, and what every other implementation here is held against.

Integers are held in float64 arrays, where sums of products are exact below 2^53 and matrix products fast; real
values are float64, so that the only rounding that matters is the one to codes. Layout suffixes: N batch, C channels,
H W pixels, O output channels, K kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
COLUMNS = 2**22
"""How many values `convolve` writes out at a time, 32 MiB: windows take a kernel's size more than their input."""


@dataclass(frozen=True)
class Grid:
    """A tensor on a grid: real value = codes * scale. codes: integers, zero point removed. scale: broadcastable."""

    codes: Array
    scale: Array

    @property
    def real(self) -> Array:
        return self.codes * self.scale


def real(value: Any) -> Array:
    """The real values of a tensor, a Grid or an array."""
    found: Array = value.real if isinstance(value, Grid) else value
    return found


def moved(value: Any, move: Callable[[Any], Any]) -> Any:
    """Apply an operator that only moves values: to codes where they have one scale, else to real values."""
    if isinstance(value, Grid) and value.scale.ndim == 0:
        return Grid(move(value.codes), value.scale)
    return move(real(value))


def transposed(value: Any, axes: Sequence[int] | None) -> Any:
    """Codes stay codes, whatever scales they have along an axis."""
    if isinstance(value, Grid):
        return Grid(value.codes.transpose(axes), value.scale.transpose(axes) if value.scale.ndim else value.scale)
    return value.transpose(axes)


def quantize(x: NDArray[Any], scale: float, low: int, high: int, shift: float = 0.0) -> NDArray[Any]:
    """clip(round_half_even(x / scale + shift), low, high); shift: see faqd.quant.SHIFTS."""
    return np.clip(np.rint(x / scale + shift), low, high)


def convolve(
    x_NCHW: Array, w_OCKK: Array, strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int], groups: int
) -> Array:
    """A convolution over any number of spatial axes, zero padded. pads: all begins, then all ends, as in ONNX."""
    spatial = x_NCHW.ndim - 2
    x = np.pad(x_NCHW, [(0, 0), (0, 0), *zip(pads[:spatial], pads[spatial:], strict=True)])
    windows = windowed(x, w_OCKK.shape[2:], strides, dilations)
    pixels = windows.shape[2 : 2 + spatial]
    weights = w_OCKK.reshape(groups, len(w_OCKK) // groups, -1)
    sums = np.empty((len(x), len(w_OCKK), *pixels))
    images = max(1, COLUMNS * len(x) // max(1, windows.size))
    for start in range(0, len(x), images):
        part = windows[start : start + images]
        # One column per output pixel. Channels first, so that rows of an image are copied whole.
        columns = np.moveaxis(part, [0, *range(2, 2 + spatial)], range(-1 - spatial, 0))  # C, K, K, N, H, W
        found = weights @ columns.reshape(groups, weights.shape[2], -1)
        sums[start : start + images] = np.moveaxis(found.reshape(len(w_OCKK), -1, *pixels), 1, 0)
    return sums


def convolve_transposed(
    x_NCHW: Array,
    w_COKK: Array,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    groups: int,
    output_padding: Sequence[int],
) -> Array:
    """A transposed convolution: the input spread out by its strides, convolved with the kernel turned around."""
    spatial = x_NCHW.ndim - 2
    spread = np.zeros((*x_NCHW.shape[:2], *((n - 1) * s + 1 for n, s in zip(x_NCHW.shape[2:], strides, strict=True))))
    spread[tuple(slice(None, None, s) for s in (1, 1, *strides))] = x_NCHW
    reach = [(k - 1) * d for k, d in zip(w_COKK.shape[2:], dilations, strict=True)]
    begins = [r - p for r, p in zip(reach, pads[:spatial], strict=True)]
    ends = [r - p + o for r, p, o in zip(reach, pads[spatial:], output_padding, strict=True)]
    # Padding beyond the kernel's reach cuts the input instead.
    kept = [slice(max(0, -b), n - max(0, -e)) for b, e, n in zip(begins, ends, spread.shape[2:], strict=True)]
    spread = spread[tuple([slice(None)] * 2 + kept)]
    turned = np.flip(w_COKK, tuple(range(2, w_COKK.ndim)))
    w_OCKK = np.concatenate([np.swapaxes(part, 0, 1) for part in np.split(turned, groups, 0)], 0)
    padding = [*(max(0, b) for b in begins), *(max(0, e) for e in ends)]
    return convolve(spread, w_OCKK, [1] * spatial, padding, dilations, groups)


def windowed(x: Array, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Array:
    """(N, C, out..., kernel...): every window of a padded tensor (N, C, spatial...), as a view."""
    axes = tuple(range(2, x.ndim))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(x, reach, axes)
    every = slice(None)
    index = (every, every, *(slice(None, None, step) for step in [*strides, *dilations]))
    return view[index]


def layer_sum(sums: Array, input_scale: Array, weight_scale: Array, bias: Array, channel_axis: int) -> Array:
    """Integer sums to real values: sums * (input_scale * weight_scale) + bias, per output channel."""
    shape = [1] * sums.ndim
    shape[channel_axis] = -1
    scale = np.broadcast_to(input_scale * weight_scale, bias.shape)
    return sums * scale.reshape(shape) + bias.reshape(shape)
