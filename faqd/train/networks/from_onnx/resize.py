"""Resize: which pixels torch's interpolation takes, held against those that the file asks for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray

from faqd.train.networks.from_onnx.builder import Node, Rule

_LINEAR = {3: "linear", 4: "bilinear"}


def _resize(node: Node) -> Any:
    x, rank = node.ref(), len(node.ref().shape)
    sizes, scales = _asked(node, rank)
    if sizes[:2] != list(x.shape[:2]) or rank not in _LINEAR:
        raise node.refusal("resizes another axis than height and width")
    before, size = x.shape[2:], tuple(sizes[2:])
    if size == before:
        return x
    default = "asymmetric" if node.proto.op_type == "Upsample" or node.opset < 11 else "half_pixel"
    mode = node.setting("mode", default="nearest")
    corners = node.setting("coordinate_transformation_mode", default=default)
    if node.setting("antialias") or node.setting("exclude_outside"):
        raise node.refusal("resizes with antialias or without what is outside, which is not read")
    if mode == "nearest":
        rounding = node.setting("nearest_mode", default="floor" if default == "asymmetric" else "round_prefer_floor")
        return node.function(F.interpolate, x, size, mode=_nearest(node, before, size, scales, corners, rounding))
    mode = {"linear": _LINEAR[rank], "cubic": "bicubic"}.get(mode, mode)
    alike = corners in ("half_pixel", "pytorch_half_pixel") and (corners == "half_pixel" or min(size) > 1)
    exact = all(math.isclose(b * s, a, rel_tol=1e-6) for b, s, a in zip(before, scales, size, strict=True))
    if not (corners == "align_corners" or (alike and exact)):
        raise node.refusal(f"interpolates with {corners}, which torch does not; export it with half_pixel")
    return node.function(F.interpolate, x, size, mode=mode, align_corners=corners == "align_corners")


def _asked(node: Node, rank: int) -> tuple[list[int], list[float]]:
    """The sizes with BATCH images, and the scales of height and width."""
    before = list(node.ref().shape)
    index = 1 if node.proto.op_type == "Upsample" or node.opset < 11 else 2
    scales = node.setting("scales", index)
    sizes = node.constant(3)
    axes = [axis % rank for axis in node.setting("axes", default=list(range(rank)))]
    if scales:
        full = [1.0] * rank
        for axis, scale in zip(axes, scales, strict=True):
            full[axis] = float(scale)
        return [math.floor(size * scale) for size, scale in zip(before, full, strict=True)], full[2:]
    if sizes is None or node.setting("keep_aspect_ratio_policy", default="stretch") != "stretch":
        raise node.refusal("says neither scales nor sizes that are read")
    asked = list(before)
    for axis, size in zip(axes, sizes.tolist(), strict=True):
        asked[axis] = before[axis] if axis == 0 else int(size)  # the images, of which a file may say its own number
    return asked, [a / b for a, b in zip(asked[2:], before[2:], strict=True)]


def _nearest(
    node: Node, before: tuple[int, ...], size: tuple[int, ...], scales: list[float], corners: str, rounding: str
) -> str:
    """torch's mode that takes the same pixels along every axis."""
    modes = {"nearest": _floor, "nearest-exact": _middle}
    for mode, places in modes.items():
        if all(
            np.array_equal(places(b, a), _places(b, a, scale, corners, rounding))
            for b, a, scale in zip(before, size, scales, strict=True)
        ):
            return mode
    raise node.refusal(f"takes nearest pixels by {corners} and {rounding}, from {before} to {size}: torch takes others")


def _floor(before: int, after: int) -> NDArray[np.int64]:
    return np.arange(after) * before // after


def _middle(before: int, after: int) -> NDArray[np.int64]:
    return np.clip(np.floor((np.arange(after) + 0.5) * before / after).astype(np.int64), 0, before - 1)


def _places(before: int, after: int, scale: float, corners: str, rounding: str) -> NDArray[np.int64]:
    """The pixels that ONNX takes."""
    index = np.arange(after, dtype=np.float64)
    at = {
        "asymmetric": index / scale,
        "align_corners": index * (before - 1) / max(1, after - 1),
        "half_pixel": (index + 0.5) / scale - 0.5,
        "pytorch_half_pixel": (index + 0.5) / scale - 0.5 if after > 1 else index * 0,
        "half_pixel_symmetric": (index + 0.5) / scale - 0.5 + (before / 2) * (1 - after / (scale * before)),
    }.get(corners)
    roundings: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
        "floor": np.floor,
        "ceil": np.ceil,
        "round_prefer_floor": lambda at: np.ceil(at - 0.5),
        "round_prefer_ceil": lambda at: np.floor(at + 0.5),
    }
    if at is None or rounding not in roundings:
        return np.full(after, -1, np.int64)
    taken = roundings[rounding](np.round(at, 9)).astype(np.int64)
    return np.clip(taken, 0, before - 1)


RULES: dict[str, Rule] = {"Resize": _resize, "Upsample": _resize}
