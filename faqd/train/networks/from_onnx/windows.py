"""Nodes that slide a window over a map, and their padding: explicit, whatever the file lets the runtime work out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import nn

from faqd.train.networks.from_onnx.builder import Node, Ref, Rule

_MAX = {3: nn.MaxPool1d, 4: nn.MaxPool2d}
_AVERAGE: dict[int, Any] = {3: nn.AvgPool1d, 4: nn.AvgPool2d}
_GLOBAL_AVERAGE = {3: nn.AdaptiveAvgPool1d, 4: nn.AdaptiveAvgPool2d}
_GLOBAL_MAX = {3: nn.AdaptiveMaxPool1d, 4: nn.AdaptiveMaxPool2d}


class Window:
    """Kernel, strides, dilations, and the padding before and behind each axis."""

    def __init__(self, node: Node, kernel: Sequence[int]) -> None:
        self.kernel, rank = tuple(kernel), len(kernel)
        self.strides = tuple(node.setting("strides", default=[1] * rank))
        self.dilations = tuple(node.setting("dilations", default=[1] * rank))
        pads = node.setting("pads", default=[0] * 2 * rank)
        auto = node.setting("auto_pad", default="NOTSET")
        if auto.startswith("SAME"):
            total = [
                max(0, (math.ceil(size / step) - 1) * step + (width - 1) * dilation + 1 - size)
                for size, step, width, dilation in zip(
                    node.ref().shape[2:], self.strides, self.kernel, self.dilations, strict=True
                )
            ]
            small = [each // 2 for each in total]
            large = [each - half for each, half in zip(total, small, strict=True)]
            pads = [*large, *small] if auto == "SAME_LOWER" else [*small, *large]
        self.before, self.behind = tuple(pads[:rank]), tuple(pads[rank:])

    @property
    def is_even(self) -> bool:
        return self.before == self.behind and min(self.before, default=0) >= 0


def padded(node: Node, x: Ref, window: Window, value: float) -> Ref:
    """With the padding of a window that is not the same on both sides."""
    widths = [w for sides in reversed(list(zip(window.before, window.behind, strict=True))) for w in sides]
    result: Ref = node.function(F.pad, x, tuple(widths), beside="pad", mode="constant", value=value)
    return result


def _max_pool(node: Node) -> Any:
    if len([name for name in node.proto.output if name]) > 1:
        raise node.refusal("also returns where its maxima are, which is not read")
    window, x = Window(node, node.setting("kernel_shape")), node.ref()
    padding: Any = 0
    half = all(2 * pad <= width for pad, width in zip(window.before, window.kernel, strict=True))
    if window.is_even and half:
        padding = window.before
    else:  # torch pads both sides alike, and half a window at most
        x = padded(node, x, window, -math.inf)
    kind = node.of_axes(_MAX)
    ceil = bool(node.setting("ceil_mode", default=0))
    return node.module(kind(window.kernel, window.strides, padding, window.dilations, ceil_mode=ceil), x)


def _average_pool(node: Node) -> Any:
    window, x = Window(node, node.setting("kernel_shape")), node.ref()
    counts = bool(node.setting("count_include_pad", default=0))
    if any(dilation != 1 for dilation in window.dilations):
        raise node.refusal("is an average with dilation, which torch has no layer for")
    if not window.is_even and not counts:
        raise node.refusal("leaves a padding that differs between two sides out of its average; pad before it")
    padding = window.before if window.is_even else (0,) * len(window.kernel)
    x = x if window.is_even else padded(node, x, window, 0.0)
    ceil = bool(node.setting("ceil_mode", default=0))
    return node.module(node.of_axes(_AVERAGE)(window.kernel, window.strides, padding, ceil, counts), x)


def _global(kinds: dict[int, Any]) -> Rule:
    return lambda node: node.module(node.of_axes(kinds)(1), node.ref())


def _pad(node: Node) -> Any:
    x, mode = node.ref(), node.setting("mode", default="constant")
    pads = node.setting("pads" if "pads" in node.attributes else "paddings", 1)
    rank = len(x.shape)
    axes = node.setting("axes", 3) or list(range(rank))
    both = {axis % rank: (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    widths = [width for axis in reversed(range(rank)) for width in both.get(axis, (0, 0))]
    while widths and widths[-2:] == [0, 0]:
        del widths[-2:]
    if not widths:
        return x
    if mode == "constant":
        value = node.setting("value", 2, 0.0)
        value = value[0] if isinstance(value, list) else value
        return node.function(F.pad, x, tuple(widths), mode="constant", value=float(value))
    widths += [0] * (2 * (rank - 2) - len(widths))
    name = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}.get(mode)
    if name is None or len(widths) > 2 * (rank - 2):
        raise node.refusal(f"pads with mode {mode} along {len(widths) // 2} axes, which torch does not")
    return node.function(F.pad, x, tuple(widths), mode=name)


RULES: dict[str, Rule] = {
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global(_GLOBAL_AVERAGE),
    "GlobalMaxPool": _global(_GLOBAL_MAX),
    "Pad": _pad,
}
