"""Nodes with weights: torch's own layers, whose parameters stand at the name of the node."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from faqd.train.networks.from_onnx.builder import Node, Ref, Rule
from faqd.train.networks.from_onnx.windows import Window, padded

_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d}
_TRANSPOSED = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d}
_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
_INSTANCE_NORMS = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d}


def _parameter(value: NDArray[Any]) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.array(value, np.float32)))


def _weight(node: Node, index: int = 1) -> NDArray[Any]:
    value = node.constant(index)
    if value is None:
        raise node.refusal(f"has no input {index}")
    return value


def _convolution(node: Node) -> Any:
    weight, kind = _weight(node), node.of_axes(_CONVOLUTIONS)
    added, bias = _bias(node, len(weight), (len(weight), *[1] * (weight.ndim - 2)))
    window = Window(node, weight.shape[2:])
    x = node.ref() if window.is_even else padded(node, node.ref(), window, 0.0)
    groups = int(node.setting("group", default=1))

    def make() -> nn.Module:
        layer: nn.Module = kind(
            *(weight.shape[1] * groups, weight.shape[0], weight.shape[2:]),
            stride=window.strides,
            padding=window.before if window.is_even else 0,
            dilation=window.dilations,
            groups=groups,
            bias=bias is not None,
        )
        return _with(layer, weight=weight, bias=bias)

    return node.shared(make, x, bias=added)


def _bias(node: Node, channels: int, shape: tuple[int, ...]) -> tuple[str, NDArray[Any] | None]:
    """A layer's own, or what is added behind it, with its name there."""
    bias = node.constant(2)
    if bias is None and (found := node.builder.bias_behind(node.proto.output[0], channels, shape)) is not None:
        return found
    return "", bias


def _transposed(node: Node) -> Any:
    """What is cut off less at the end than at the beginning is output padding of torch's; what more, a slice."""
    weight, kind = _weight(node), node.of_axes(_TRANSPOSED)
    groups, rank = int(node.setting("group", default=1)), weight.ndim - 2
    channels = weight.shape[1] * groups
    added, bias = _bias(node, channels, (channels, *[1] * rank))
    strides, dilations = (tuple(node.setting(name, default=[1] * rank)) for name in ("strides", "dilations"))
    before, behind, more = _cut(node, weight.shape[2:], strides, dilations)
    extra = [first - last + each for first, last, each in zip(before, behind, more, strict=True)]
    padding = [max(0, each) for each in extra]
    if min(before) < 0 or any(p >= max(s, d) for p, s, d in zip(padding, strides, dilations, strict=True)):
        raise node.refusal("has padding that torch has no layer for")

    def make() -> nn.Module:
        layer: nn.Module = kind(
            *(weight.shape[0], channels, weight.shape[2:]),
            stride=strides,
            padding=tuple(before),
            output_padding=tuple(padding),
            dilation=dilations,
            groups=groups,
            bias=bias is not None,
        )
        return _with(layer, weight=weight, bias=bias)

    made = node.shared(make, node.ref(), bias=added)
    if min(extra) >= 0:
        return made
    ends = tuple(slice(None, min(0, each) or None) for each in extra)
    return node.function(_cropped, made, ends, beside="crop")


def _cropped(x: Tensor, ends: tuple[slice, ...]) -> Tensor:
    return x[(slice(None),) * 2 + ends]


def _cut(
    node: Node, kernel: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]
) -> tuple[list[int], list[int], list[int]]:
    """What is cut off at the beginning and at the end of each axis, and added at the end."""
    rank = len(kernel)
    more = node.setting("output_padding", default=[0] * rank)
    pads, auto = node.setting("pads", default=[0] * 2 * rank), node.setting("auto_pad", default="NOTSET")
    wanted, before = node.setting("output_shape"), node.ref().shape[2:]
    if wanted is None and auto.startswith("SAME"):
        wanted = [size * step for size, step in zip(before, strides, strict=True)]
    if wanted is None:
        return pads[:rank], pads[rank:], more
    axes = zip(before, strides, dilations, kernel, more, wanted[-rank:], strict=True)
    cut = [(size - 1) * step + d * (k - 1) + 1 + add - asked for size, step, d, k, add, asked in axes]
    small = [each // 2 for each in cut]
    large = [each - half for each, half in zip(cut, small, strict=True)]
    return (small, large, more) if auto == "SAME_UPPER" else (large, small, more)


def _linear(node: Node, weight: NDArray[Any], bias: NDArray[Any] | None, added: str = "") -> Any:
    """weight: (outputs, inputs)"""

    def make() -> nn.Module:
        return _with(nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None), weight=weight, bias=bias)

    return node.shared(make, node.ref(), bias=added)


def _gemm(node: Node) -> Any:
    alpha, beta = (float(node.setting(name, default=1.0)) for name in ("alpha", "beta"))
    first, second, third = node.at(0), node.at(1), node.at(2)
    if isinstance(second, Ref) or isinstance(third, Ref) or node.setting("transA") or not isinstance(first, Ref):
        raise node.refusal("is a product of two computed matrices; write it as MatMul")
    weight = _weight(node) if node.setting("transB") else _weight(node).T
    if third is not None and third.size not in (1, len(weight)):
        raise node.refusal(f"adds {list(third.shape)}; taken is one number for each of its {len(weight)} outputs")
    bias = None if third is None else np.broadcast_to(np.reshape(third, -1) * beta, weight.shape[:1])
    return _linear(node, weight * alpha, bias)


def _matmul(node: Node) -> Any:
    weight = node.at(1)
    if isinstance(weight, Ref) or weight is None or weight.ndim != 2:
        return node.function(torch.matmul, *node.inputs)
    rank = len(node.ref().shape)
    added, bias = _bias(node, weight.shape[1], (*[1] * (rank - 2), weight.shape[1]))
    return _linear(node, weight.T, bias, added)


def _batch_norm(node: Node) -> Any:
    if node.setting("training_mode"):
        raise node.refusal("is one in training mode; export the network for inference")
    names = ("weight", "bias", "running_mean", "running_var")
    values = {name: _weight(node, index) for index, name in enumerate(names, 1)}
    kind, eps = node.of_axes(_NORMS), float(node.setting("epsilon", default=1e-5))
    return node.shared(lambda: _with(kind(len(values["weight"]), eps), **values), node.ref())


def _layer_norm(node: Node) -> Any:
    weight, bias = _weight(node), node.constant(2)
    axis, rank = int(node.setting("axis", default=-1)), len(node.ref().shape)
    shape = node.ref().shape[axis % rank :]
    eps = float(node.setting("epsilon", default=1e-5))
    full = np.broadcast_to(weight, shape)
    layer = nn.LayerNorm(shape, eps, bias=bias is not None)
    return node.module(
        _with(layer, weight=full, bias=None if bias is None else np.broadcast_to(bias, shape)), node.ref()
    )


def _instance_norm(node: Node) -> Any:
    weight, kind = _weight(node), node.of_axes(_INSTANCE_NORMS)
    eps = float(node.setting("epsilon", default=1e-5))
    return node.module(_with(kind(len(weight), eps, affine=True), weight=weight, bias=_weight(node, 2)), node.ref())


def _group_norm(node: Node) -> Any:
    weight, groups = _weight(node), int(node.setting("num_groups"))
    channels = node.ref().shape[1]
    if len(weight) != channels:  # of opset 18, where each group has one
        raise node.refusal("has a weight for each group and none for each channel; export with opset 21")
    eps = float(node.setting("epsilon", default=1e-5))
    return node.module(_with(nn.GroupNorm(groups, channels, eps), weight=weight, bias=_weight(node, 2)), node.ref())


def _prelu(node: Node) -> Any:
    slope = _weight(node)
    channels = node.ref().shape[1]
    if slope.size not in (1, channels) or (slope.size > 1 and slope.shape[0] != channels):
        raise node.refusal(f"has slopes of shape {list(slope.shape)}; taken is one, or one for each channel")
    return node.shared(lambda: _with(nn.PReLU(slope.size), weight=slope.reshape(-1)), node.ref())


def _with(layer: nn.Module, **values: NDArray[Any] | None) -> nn.Module:
    for name, value in values.items():
        if value is not None and isinstance(getattr(layer, name), nn.Parameter):
            setattr(layer, name, _parameter(value))
        elif value is not None:
            setattr(layer, name, torch.from_numpy(np.array(value, np.float32)))
    return layer.eval()


RULES: dict[str, Rule] = {
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "PRelu": _prelu,
}
