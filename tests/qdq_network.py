"""A tiny residual Q/DQ network in ONNX, laid out as TensorRT wants it, with the faults that tests ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 19
LAYERS = ("stem", "conv1", "conv2", "down", "conv3", "classifier")
SHAPE = (3, 16, 16)
CLASSES = 16
TOP_LEVEL = 15
ZERO = np.int8(0)


class Graph:
    """Nodes and initializers in the order in which they are added; a node is named after its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(7)

    def constant(self, name: str, value: Any) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def model(self, output: str) -> onnx.ModelProto:
        images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *SHAPE])
        logits = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", CLASSES])
        graph = helper.make_graph(self.nodes, "tiny", [images], [logits], self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
        onnx.checker.check_model(model, full_check=True)
        return model


def residual_network(without_qdq: str = "", zero: np.generic = ZERO, further_blocks: int = 0) -> onnx.ModelProto:
    """Stem, a residual block with identity, one with a downsample, pooling, classifier: six layers, all INT8.

    without_qdq: the layer whose input stays float. zero: the zero point of the activations. further_blocks: so many
    more of the first kind, two layers each.
    """
    graph = Graph()

    def quantized(x: str, scale: float, name: str) -> str:
        parameters = [graph.constant(f"{name}.scale", np.float32(scale)), graph.constant(f"{name}.zero", zero)]
        code = graph.add("QuantizeLinear", [x, *parameters], f"{name}.code")
        return graph.add("DequantizeLinear", [code, *parameters], f"{name}.value")

    def activation(x: str, name: str, scale: float = 0.1) -> str:
        bounds = [
            graph.constant(f"{name}.low", np.float32(0)),
            graph.constant(f"{name}.high", np.float32(TOP_LEVEL * scale)),
        ]
        return quantized(graph.add("Clip", [x, *bounds], f"{name}.clip"), scale, name)

    def weight(shape: tuple[int, ...], name: str) -> str:
        codes = graph.rng.integers(-7, 8, shape).astype(np.int8)
        scales = graph.rng.uniform(0.005, 0.02, shape[0]).astype(np.float32)
        names = [graph.constant(f"{name}.codes", codes), graph.constant(f"{name}.weight_scale", scales)]
        names.append(graph.constant(f"{name}.weight_zero", np.zeros(shape[0], np.int8)))
        return graph.add("DequantizeLinear", names, f"{name}.weight", axis=0)

    def conv(x: str, shape: tuple[int, int, int], name: str, stride: int = 1) -> str:
        outputs, inputs, kernel = shape
        bias = graph.constant(f"{name}.bias", graph.rng.normal(0, 0.1, outputs).astype(np.float32))
        weights = weight((outputs, inputs, kernel, kernel), name)
        pads = [kernel // 2] * 4
        return graph.add("Conv", [x, weights, bias], name, pads=pads, strides=[stride] * 2)

    x = activation(conv(quantized("images", 0.02, "input"), (32, 3, 3), "stem"), "stem.out")
    branch = conv(x, (32, 32, 3), "conv1")
    if without_qdq != "conv2":
        branch = activation(branch, "conv1.out")
    # Only the shortcut of a residual sum is quantized, so that conv, sum, clip and Q make one kernel.
    x = activation(graph.add("Add", [conv(branch, (32, 32, 3), "conv2"), x], "sum1"), "sum1.out")
    for block in range(further_blocks):
        name = f"further{block}"
        branch = conv(activation(conv(x, (32, 32, 3), f"{name}.a"), f"{name}.a.out"), (32, 32, 3), f"{name}.b")
        x = activation(graph.add("Add", [branch, x], f"{name}.sum"), f"{name}.out")
    shortcut = quantized(conv(x, (64, 32, 1), "down", stride=2), 0.05, "down.out")
    x = activation(graph.add("Add", [conv(x, (64, 32, 3), "conv3", stride=2), shortcut], "sum2"), "sum2.out")
    x = quantized(graph.add("GlobalAveragePool", [x], "pool"), 0.01, "pool.out")
    bias = graph.constant("classifier.bias", np.zeros(CLASSES, np.float32))
    flat = graph.add("Flatten", [x], "flat")
    graph.add("Gemm", [flat, weight((CLASSES, 64), "classifier"), bias], "classifier", transB=1)
    return graph.model("classifier")


def unbuildable_network() -> onnx.ModelProto:
    """Legal ONNX that the parser takes and the builder does not: FP32 activation scale, FP16 weight scale in a Gemm."""
    graph = Graph()
    parameters = [graph.constant("scale", np.float32(0.02)), graph.constant("zero", np.int8(0))]
    code = graph.add("QuantizeLinear", [graph.add("Flatten", ["images"], "flat"), *parameters], "code")
    value = graph.add("DequantizeLinear", [code, *parameters], "value")
    half = graph.add("Cast", [value], "half", to=TensorProto.FLOAT16)
    codes = graph.constant("codes", np.ones((CLASSES, int(np.prod(SHAPE))), np.int8))
    scales = graph.constant("weight_scale", np.full(CLASSES, 0.01, np.float16))
    zeros = graph.constant("weight_zero", np.zeros(CLASSES, np.int8))
    weights = graph.add("DequantizeLinear", [codes, scales, zeros], "weight", axis=0)
    product = graph.add("Gemm", [half, weights], "product", transB=1)
    return graph.model(graph.add("Cast", [product], "logits", to=TensorProto.FLOAT))


def written(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path
