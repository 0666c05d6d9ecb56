"""One layer in a small Q/DQ network, quantized in each of the ways that tools and people write it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.qdq_network import Graph

CHANNELS = 32
LAYER = "block.layer"
"""The node under test; `stem.conv` before it and `head.conv` behind it are well placed."""


class Builder(Graph):
    def quantize(self, x: str, name: str, scale: Any = 0.05, zero: Any = np.int8(0), **attributes: Any) -> str:  # noqa: B008
        parameters = [self.constant(f"{name}.scale", np.asarray(scale, np.float32))]
        if zero is not None:
            parameters.append(self.constant(f"{name}.zero", np.broadcast_to(zero, np.shape(scale)).copy()))
        code = self.add("QuantizeLinear", [x, *parameters], f"{name}.code", **attributes)
        return self.add("DequantizeLinear", [code, *parameters], f"{name}.value", **attributes)

    def weight(
        self, shape: tuple[int, ...], name: str, axis: int | None = 0, dtype: Any = np.int8, zero: int = 0
    ) -> str:
        codes = self.rng.integers(-7, 8, shape) + (zero if dtype == np.uint8 else 0)
        size = () if axis is None else (shape[axis],)
        names = [
            self.constant(f"{name}.codes", codes.astype(dtype)),
            self.constant(f"{name}.weight_scale", np.full(size, 0.01, np.float32)),
            self.constant(f"{name}.weight_zero", np.full(size, zero).astype(dtype)),
        ]
        return self.add("DequantizeLinear", names, f"{name}.weight", **({} if axis is None else {"axis": axis}))

    def conv(self, x: str, name: str, inputs: int = CHANNELS, weight: str | None = None, **attributes: Any) -> str:
        group = attributes.get("group", 1)
        weight = weight or self.weight((CHANNELS, inputs // group, 3, 3), name)
        return self.add("Conv", [x, weight], name, pads=[1] * 4, **attributes)

    def rectified(self, x: str, name: str, **options: Any) -> str:
        return self.quantize(self.add("Relu", [x], f"{name}.relu"), name, **options)


Middle = Callable[[Builder, str], str]
"""From the dequantized output of the stem to the float output of the layer under test."""


def quantized_stem(graph: Builder, images: str) -> str:
    return graph.rectified(graph.conv(graph.quantize(images, "input", 0.02), "stem.conv", inputs=3), "stem.out")


def float_stem(graph: Builder, images: str) -> str:
    return graph.add("Relu", [graph.conv(graph.quantize(images, "input", 0.02), "stem.conv", inputs=3)], "stem.relu")


def network(middle: Middle, opset: int = 19, stem: Middle = quantized_stem) -> onnx.ModelProto:
    """Stem, `middle`, a well-placed head that scores 16 classes."""
    graph = Builder()
    x = graph.rectified(middle(graph, stem(graph, "images")), "block.out")
    x = graph.conv(x, "head.conv", weight=graph.weight((16, CHANNELS, 3, 3), "head.conv"))
    graph.add("Flatten", [graph.add("GlobalAveragePool", [x], "pool")], "scores")
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 16, 16])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 16])
    proto = helper.make_graph(graph.nodes, "layers", [images], [scores], graph.initializers)
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def _plain(g: Builder, x: str) -> str:
    return g.conv(x, LAYER)


def _weight_of(**options: Any) -> Middle:
    return lambda g, x: g.conv(x, LAYER, weight=g.weight((CHANNELS, CHANNELS, 3, 3), LAYER, **options))


def _between(operator: str, **attributes: Any) -> Middle:
    return lambda g, x: g.conv(g.add(operator, [x], "block.between", **attributes), LAYER)


def _float_weight(g: Builder, x: str) -> str:
    weight = g.constant("weight", g.rng.normal(size=(CHANNELS, CHANNELS, 3, 3)).astype(np.float32))
    return g.conv(x, LAYER, weight=weight)


def _quantized_in_place(g: Builder, x: str) -> str:
    weight = g.constant("weight", g.rng.normal(size=(CHANNELS, CHANNELS, 3, 3)).astype(np.float32))
    return g.conv(x, LAYER, weight=g.quantize(weight, "block.w", np.full(CHANNELS, 0.01), axis=0))


def _bias(integer: bool) -> Middle:
    def middle(g: Builder, x: str) -> str:
        weight = g.weight((CHANNELS, CHANNELS, 3, 3), LAYER)
        bias = g.constant("bias", np.ones(CHANNELS, np.int32 if integer else np.float32))
        if integer:
            parameters = [g.constant("bias.scale", np.full(CHANNELS, 0.0005, np.float32))]
            parameters.append(g.constant("bias.zero", np.zeros(CHANNELS, np.int32)))
            bias = g.add("DequantizeLinear", [bias, *parameters], "bias.real", axis=0)
        return g.add("Conv", [x, weight, bias], LAYER, pads=[1] * 4)

    return middle


def _requantized(**options: Any) -> Middle:
    """The input of the layer quantized in another way than the rest of the network."""
    return lambda g, x: g.conv(g.quantize(g.add("Sigmoid", [x], "block.sigmoid"), "block.in", **options), LAYER)


def _transposed(g: Builder, x: str) -> str:
    return g.add("ConvTranspose", [x, g.weight((CHANNELS, CHANNELS, 3, 3), LAYER, axis=1)], LAYER, pads=[1] * 4)


def _concat(scale: float | None) -> Middle:
    def middle(g: Builder, x: str) -> str:
        y = g.add("Sigmoid", [x], "block.sigmoid")
        y = g.quantize(y, "block.in", scale) if scale else y
        joined = g.add("Concat", [x, y], "block.concat", axis=1)
        return g.conv(joined, LAYER, weight=g.weight((CHANNELS, 2 * CHANNELS, 3, 3), LAYER))

    return middle


def _shuffle(g: Builder, x: str) -> str:
    split = g.add("Reshape", [x, g.constant("split", np.array([-1, 2, CHANNELS // 2, 16, 16]))], "block.split")
    mixed = g.add("Transpose", [split], "block.mixed", perm=[0, 2, 1, 3, 4])
    return g.conv(g.add("Reshape", [mixed, g.constant("join", np.array([-1, CHANNELS, 16, 16]))], "block.join"), LAYER)


def _slice(g: Builder, x: str) -> str:
    bounds = [g.constant(name, np.array([at])) for name, at in (("from", 0), ("to", CHANNELS // 2), ("axis", 1))]
    half = g.add("Slice", [x, *bounds], "block.half")
    return g.conv(half, LAYER, weight=g.weight((CHANNELS, CHANNELS // 2, 3, 3), LAYER))


def _half(g: Builder, x: str) -> str:
    weight = g.weight((CHANNELS, CHANNELS, 3, 3), LAYER)
    halves = [g.add("Cast", [name], f"{name}.half", to=TensorProto.FLOAT16) for name in (x, weight)]
    return g.add("Cast", [g.add("Conv", halves, LAYER, pads=[1] * 4)], "block.float", to=TensorProto.FLOAT)


def _resize(g: Builder, x: str) -> str:
    sizes = g.constant("sizes", np.array([1, 1, 2, 2], np.float32))
    return g.conv(g.add("Resize", [x, "", sizes], "block.between", mode="nearest"), LAYER)


def _sum(g: Builder, x: str) -> str:
    y = g.quantize(g.add("Sigmoid", [x], "block.sigmoid"), "block.in")
    return g.conv(g.add("Add", [x, y], "block.sum"), LAYER)


def _space_to_depth(g: Builder, x: str) -> str:
    packed = g.add("SpaceToDepth", [x], "block.between", blocksize=2)
    return g.conv(packed, LAYER, weight=g.weight((CHANNELS, 4 * CHANNELS, 3, 3), LAYER))


def _transposed_weight(g: Builder, x: str) -> str:
    flat = g.add("Flatten", [g.add("MaxPool", [x], "block.pool", kernel_shape=[16, 16])], "block.flat")
    weight = g.add("Transpose", [g.weight((CHANNELS, CHANNELS), LAYER, axis=0)], "block.turned", perm=[1, 0])
    y = g.add("MatMul", [flat, weight], LAYER)
    return g.add("Reshape", [y, g.constant("shape", np.array([-1, CHANNELS, 1, 1]))], "block.map")


def _product(operator: str, axis: int | None, **attributes: Any) -> Middle:
    def middle(g: Builder, x: str) -> str:
        flat = g.add("Flatten", [g.add("MaxPool", [x], "block.pool", kernel_shape=[16, 16])], "block.flat")
        y = g.add(operator, [flat, g.weight((CHANNELS, CHANNELS), LAYER, axis=axis)], LAYER, **attributes)
        shape = g.constant("shape", np.array([-1, CHANNELS, 1, 1]))
        return g.add("Reshape", [y, shape], "block.map")

    return middle


def _integer(g: Builder, x: str) -> str:
    """onnxruntime's operator format: QLinearConv between codes."""
    names = [g.constant("y.scale", np.float32(0.1)), g.constant("y.zero", np.uint8(0))]
    inside = [g.constant("x.scale", np.float32(0.1)), g.constant("x.zero", np.uint8(0))]
    code = g.add("QuantizeLinear", [x, *inside], "x.code")
    weight = [
        g.constant("w", g.rng.integers(-7, 8, (CHANNELS, CHANNELS, 3, 3)).astype(np.int8)),
        g.constant("w.scale", np.full(CHANNELS, 0.01, np.float32)),
        g.constant("w.zero", np.zeros(CHANNELS, np.int8)),
    ]
    y = g.add("QLinearConv", [code, *inside, *weight, *names], LAYER, pads=[1] * 4)
    return g.add("DequantizeLinear", [y, *names], "y.real")


def _pad(value: float) -> Middle:
    def middle(g: Builder, x: str) -> str:
        how = [g.constant("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1])), g.constant("value", np.float32(value))]
        return g.conv(g.add("Pad", [x, *how], "block.between"), LAYER)

    return middle


def _gather(g: Builder, x: str) -> str:
    order = g.constant("order", np.arange(CHANNELS)[::-1].copy())
    return g.conv(g.add("Gather", [x, order], "block.between", axis=1), LAYER)


def _scaled_weight(g: Builder, x: str) -> str:
    factor = g.constant("factor", np.full((CHANNELS, 1, 1, 1), 1.5, np.float32))
    weight = g.weight((CHANNELS, CHANNELS, 3, 3), LAYER)
    return g.conv(x, LAYER, weight=g.add("Mul", [weight, factor], "block.scaled"))


def _blocks(g: Builder, x: str) -> str:
    """Weight scales for blocks of 16 rows, as tools for language models write them."""
    flat = g.add("Flatten", [g.add("MaxPool", [x], "block.pool", kernel_shape=[16, 16])], "block.flat")
    codes = g.constant("codes", g.rng.integers(-7, 8, (CHANNELS, CHANNELS)).astype(np.int8))
    scales = g.constant("scales", np.full((CHANNELS // 16, CHANNELS), 0.01, np.float32))
    weight = g.add("DequantizeLinear", [codes, scales], "block.weight", axis=0, block_size=16)
    y = g.add("MatMul", [flat, weight], LAYER)
    return g.add("Reshape", [y, g.constant("shape", np.array([-1, CHANNELS, 1, 1]))], "block.map")


def _weights_first(g: Builder, x: str) -> str:
    columns = g.add("Reshape", [x, g.constant("columns", np.array([-1, CHANNELS, 256]))], "block.columns")
    y = g.add("MatMul", [g.weight((CHANNELS, CHANNELS), LAYER, axis=0), columns], LAYER)
    return g.add("Reshape", [y, g.constant("map", np.array([-1, CHANNELS, 16, 16]))], "block.map")


def _einsum(g: Builder, x: str) -> str:
    return g.add("Einsum", [x, g.weight((CHANNELS, CHANNELS), LAYER, axis=0)], LAYER, equation="nchw,dc->ndhw")


def _computed_scale(g: Builder, x: str) -> str:
    """As dynamic quantization does: from the largest value of the very input."""
    y = g.add("Sigmoid", [x], "block.sigmoid")
    scale = g.add(
        "Div", [g.add("ReduceMax", [y], "block.max", keepdims=0), g.constant("127", np.float32(127))], "block.s"
    )
    code = g.add("QuantizeLinear", [y, scale, g.constant("block.zero", np.int8(0))], "block.code")
    return g.conv(g.add("DequantizeLinear", [code, scale, "block.zero"], "block.value"), LAYER)


def _weight_through(operator: str, *constants: Any, first: bool = False, **attributes: Any) -> Middle:
    """The dequantized weights of a linear layer behind one more operator on constants."""

    def middle(g: Builder, x: str) -> str:
        flat = g.add("Flatten", [g.add("MaxPool", [x], "block.pool", kernel_shape=[16, 16])], "block.flat")
        weight = g.weight((CHANNELS, CHANNELS), LAYER, axis=1)
        names = [g.constant(f"block.constant{i}", np.asarray(value, np.float32)) for i, value in enumerate(constants)]
        through = g.add(operator, [*names, weight] if first else [weight, *names], "block.through", **attributes)
        y = g.add("MatMul", [flat, through], LAYER)
        return g.add("Reshape", [y, g.constant("shape", np.array([-1, CHANNELS, 1, 1]))], "block.map")

    return middle


def _deformable(g: Builder, x: str) -> str:
    offset = g.conv(x, "block.offset", weight=g.weight((18, CHANNELS, 3, 3), "block.offset"))
    weight = g.weight((CHANNELS, CHANNELS, 3, 3), LAYER)
    return g.add("DeformConv", [x, weight, offset], LAYER, pads=[1] * 4, kernel_shape=[3, 3])


MIDDLES: dict[str, Middle] = {
    "plain": _plain,
    "float bias": _bias(integer=False),
    "int32 bias": _bias(integer=True),
    "weight per tensor": _weight_of(axis=None),
    "weight on the input channel": _weight_of(axis=1),
    "weight uint8": _weight_of(dtype=np.uint8, zero=0),
    "weight uint8 128": _weight_of(dtype=np.uint8, zero=128),
    "weight int8 zero point": _weight_of(zero=3),
    "weight int4": _weight_of(dtype=ml_dtypes.int4),
    "weight uint4": _weight_of(dtype=ml_dtypes.uint4),
    "float weight": _float_weight,
    "weight quantized in place": _quantized_in_place,
    "max pool between": _between("MaxPool", kernel_shape=[2, 2], strides=[2, 2]),
    "average pool between": _between("AveragePool", kernel_shape=[2, 2], strides=[2, 2]),
    "relu between": _between("Relu"),
    "sigmoid between": _between("Sigmoid"),
    "identity between": _between("Identity"),
    "transpose between": _between("Transpose", perm=[0, 1, 3, 2]),
    "leaky between": _between("LeakyRelu"),
    "input per channel": _requantized(scale=np.full(CHANNELS, 0.05), axis=1),
    "input uint8": _requantized(zero=np.uint8(0)),
    "input uint8 128": _requantized(zero=np.uint8(128)),
    "input without zero point": _requantized(zero=None),
    "input int8 zero point": _requantized(zero=np.int8(5)),
    "depthwise": lambda g, x: g.conv(x, LAYER, group=CHANNELS),
    "grouped": lambda g, x: g.conv(x, LAYER, group=2),
    "grouped 4": lambda g, x: g.conv(x, LAYER, group=8),
    "dilated": lambda g, x: g.conv(x, LAYER, dilations=[2, 2]),
    "transposed": _transposed,
    "concat of equal scale": _concat(0.05),
    "concat of other scale": _concat(0.01),
    "concat with float": _concat(None),
    "shuffle between": _shuffle,
    "slice between": _slice,
    "half precision": _half,
    "resize between": _resize,
    "sum between": _sum,
    "global average between": _between("GlobalAveragePool"),
    "space to depth between": _space_to_depth,
    "input int16": _requantized(zero=np.int16(0)),
    "matmul of transposed weights": _transposed_weight,
    "gemm transB": _product("Gemm", 0, transB=1),
    "gemm": _product("Gemm", 1),
    "gemm per tensor": _product("Gemm", None),
    "gemm transB wrong axis": _product("Gemm", 1, transB=1),
    "gemm wrong axis": _product("Gemm", 0),
    "matmul": _product("MatMul", 1),
    "matmul wrong axis": _product("MatMul", 0),
    "matmul per tensor": _product("MatMul", None),
    "QLinearConv": _integer,
    "zero pad between": _pad(0.0),
    "nonzero pad between": _pad(1.0),
    "gather between": _gather,
    "weight times factor": _scaled_weight,
    "matmul in blocks": _blocks,
    "matmul with weights first": _weights_first,
    "einsum": _einsum,
    "computed scale": _computed_scale,
    "weight times factor per row": _weight_through("Mul", np.full((CHANNELS, 1), 1.5)),
    "factor times weight": _weight_through("Mul", 1.5, first=True),
    "weight divided": _weight_through("Div", 2.0),
    "weight clipped": _weight_through("Clip", -0.05, 0.05),
    "deformable": _deformable,
}
