"""The kernels that add pairs of products in int16 (faqd.saturation), emulated: to tell their doing from an error."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from faqd.deploy.onnx_model.graph import Graph, attributes_of
from faqd.deploy.onnx_model.integer_sums import integer_sums
from faqd.deploy.reference.evaluator import Evaluator, stored
from faqd.deploy.reference.values import Value
from faqd.reference import Array, Grid, layer_sum, real, windowed
from faqd.saturation import HIGHEST, LOWEST, in_kernel_order, neighbours

MOST_PRODUCTS = 2**29
"""That are emulated for one layer, a few seconds: as many probes as that allows."""


def emulated(model: onnx.ModelProto, feeds: dict[str, NDArray[Any]], output: str) -> NDArray[Any] | None:
    """What `output` of one layer's model (a Segment) is where products are added in pairs, for the first probes of
    `feeds`, as many as can be had in seconds; None where no sum of the layer can saturate."""
    endangered = {found.node.name for found in integer_sums(model) if found.saturates}
    nodes = [node for node in model.graph.node if node.name in endangered]
    if not nodes or not all(node.op_type in ("Conv", "Gemm") for node in nodes):
        return None
    kernel = _PairKernel(model, endangered)
    count = min(len(values) for values in feeds.values())
    first = kernel.run({name: values[:1] for name, values in feeds.items()})
    products = sum(real(first[node.output[0]]).size * _items(real(first[node.input[1]])) for node in nodes)
    few = max(1, min(count, MOST_PRODUCTS // max(1, products)))
    return stored(kernel.run({name: values[:few] for name, values in feeds.items()})[output])


def _items(weight: Array) -> int:
    """Weights for each number of the output."""
    return int(np.prod(weight.shape[1:]))


class _PairKernel(Evaluator):
    """Runs a model as the reference does, but for the sums of the layers `names`."""

    def __init__(self, model: onnx.ModelProto, names: set[str]) -> None:
        super().__init__(model)
        self._names = names
        self._lookup = Graph(model)

    def results(self, node: onnx.NodeProto, operands: list[Value]) -> tuple[Value, ...]:
        if node.name not in self._names:
            return super().results(node, operands)
        x, weight, bias = [*operands, None][:3]
        assert isinstance(x, Grid) and isinstance(weight, Grid)
        read = self._lookup.maker(node.input[0])
        assert read is not None
        zero = self._lookup.constant(read.input[2])
        assert zero is not None
        attributes = attributes_of(node)
        codes, offset = x.codes + float(zero.item()), float(zero.item())
        sums = (
            _gemm(codes, weight.codes, attributes)
            if node.op_type == "Gemm"
            else _conv(codes, offset, weight.codes, attributes)
        )
        channels = sums.shape[1]
        # The zero point's share is exact: it is taken off with sums of weights, which are stored.
        rows = weight.codes if node.op_type == "Conv" or attributes.get("transB", 0) else weight.codes.T
        sums = sums - offset * rows.reshape(channels, -1).sum(1).reshape(-1, *[1] * (sums.ndim - 2))
        real_bias = np.broadcast_to(0.0 if bias is None else real(bias).reshape(-1), channels)
        return (layer_sum(sums, x.scale, weight.scale.reshape(-1), real_bias, 1),)


def _gemm(codes: Array, weight: Array, attributes: dict[str, Any]) -> Array:
    return _paired(codes, weight if attributes.get("transB", 0) else weight.T)


def _conv(codes: Array, offset: float, weight: Array, attributes: dict[str, Any]) -> Array:
    """Padding has the code of zero."""
    spatial = codes.ndim - 2
    pads, groups = attributes.get("pads", [0] * 2 * spatial), attributes.get("group", 1)
    margins = [(0, 0), (0, 0), *zip(pads[:spatial], pads[spatial:], strict=True)]
    padded = np.pad(codes, margins, constant_values=offset)
    strides, dilations = (attributes.get(name, [1] * spatial) for name in ("strides", "dilations"))
    windows = windowed(padded, weight.shape[2:], strides, dilations)
    sums = []
    for part, kernel in zip(np.split(windows, groups, 1), np.split(weight, groups, 0), strict=True):
        pixels = np.moveaxis(part, 1, -1)  # N, H, W, K, K, C: channels innermost
        rows = pixels.reshape(-1, int(np.prod(pixels.shape[spatial + 1 :])))
        found = _paired(rows, in_kernel_order(kernel)).reshape(*pixels.shape[: spatial + 1], len(kernel))
        sums.append(np.moveaxis(found, -1, 1))
    return np.concatenate(sums, 1)


def _paired(rows_NK: Array, weight_OK: Array) -> Array:
    """(N, O): sums of products, each two neighbours added and limited first."""
    rows, weights = neighbours(rows_NK.astype(np.int32)), neighbours(weight_OK.astype(np.int32))
    total = np.zeros((len(rows), len(weights)), np.int32)
    for pair in range(rows.shape[1]):
        total += np.clip(rows[:, pair] @ weights[:, pair].T, LOWEST, HIGHEST)
    return total.astype(np.float64)
