"""Convolution and linear layers, and products of two activations: integer sums where both sides are codes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from faqd.deploy.reference.values import Attributes, Operator, Value
from faqd.reference import Array, Grid, convolve, convolve_transposed, layer_sum, real, transposed


def _conv(operands: list[Value], attributes: Attributes) -> Value:
    x, weight, bias = [*operands, None][:3]
    spatial = real(x).ndim - 2
    geometry = (
        attributes.get("strides", [1] * spatial),
        attributes.get("pads", [0] * 2 * spatial),
        attributes.get("dilations", [1] * spatial),
        attributes.get("group", 1),
    )
    return _weighted(lambda a, b: convolve(a, b, *geometry), x, weight, bias, 1)


def _conv_transpose(operands: list[Value], attributes: Attributes) -> Value:
    x, weight, bias = [*operands, None][:3]
    if "output_shape" in attributes:
        raise ValueError("known only without output_shape")
    spatial = real(x).ndim - 2
    groups = attributes.get("group", 1)
    geometry = (
        attributes.get("strides", [1] * spatial),
        attributes.get("pads", [0] * 2 * spatial),
        attributes.get("dilations", [1] * spatial),
        groups,
        attributes.get("output_padding", [0] * spatial),
    )
    return _weighted(lambda a, b: convolve_transposed(a, b, *geometry), x, weight, bias, 1, weight_axis=1)


def _gemm(operands: list[Value], attributes: Attributes) -> Value:
    x, weight, bias = [*operands, None][:3]
    if attributes.get("transA", 0) or attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
        raise ValueError("known only with transA = 0 and alpha = beta = 1")
    if bias is not None and real(bias).ndim == 2 and real(bias).shape[0] != 1:
        raise ValueError("known only with one bias for each column")
    if not attributes.get("transB", 0):
        weight = transposed(weight, None)
    return _weighted(lambda a, b: a @ b.T, x, weight, bias, 1)


def _weighted(
    product: Callable[[Array, Array], Array],
    x: Value,
    weight: Value,
    bias: Value,
    channel_axis: int,
    weight_axis: int = 0,
) -> Array:
    """Integer sums where input and weight are codes and each output channel has one scale; else sums of floats.

    weight_axis: where the weight has its output channels; with the second axis, groups cannot have scales per channel.
    """
    if isinstance(x, Grid) and isinstance(weight, Grid) and x.scale.ndim == 0:
        per_channel = weight.scale.ndim == 0 or weight.scale.size == weight.scale.shape[weight_axis]
        if per_channel:
            sums = product(x.codes, weight.codes)
            channels = sums.shape[channel_axis]
            real_bias = np.broadcast_to(0.0 if bias is None else real(bias).reshape(-1), channels)
            return layer_sum(sums, x.scale, weight.scale.reshape(-1), real_bias, channel_axis)
    sums = product(real(x), real(weight))
    real_bias = np.broadcast_to(0.0 if bias is None else real(bias).reshape(-1), sums.shape[channel_axis])
    return layer_sum(sums, np.ones(()), np.ones(()), real_bias, channel_axis)


def product_of_codes(left: Value, right: Value) -> Array | None:
    """Of two matrices of codes, each with one scale: integer sums times both. None for any other product."""
    if not isinstance(left, Grid) or not isinstance(right, Grid) or left.scale.ndim or right.scale.ndim:
        return None
    sums: Array = left.codes.astype(np.float64) @ right.codes.astype(np.float64)
    return sums * (left.scale * right.scale)


OPERATORS: dict[str, Operator] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "ConvTranspose": _conv_transpose,
}
