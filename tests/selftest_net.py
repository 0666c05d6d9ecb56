"""Writes one tiny Q/DQ network, and says by the referee what must come out of it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from faqd.deploy.reference.evaluator import Referee
from faqd.reference import real

BATCH = 2
SIDE = 6
WIDTH = 32
"""Channels: the least that INT8 kernels take without padding."""


class Net:
    """A network in the making. It keeps an estimate of the size of every tensor, by which scales are chosen so that
    activations reach beyond their clip."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rng = np.random.default_rng(zlib.crc32(name.encode()))
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: dict[str, NDArray[Any]] = {}
        self.outputs: dict[str, float] = {}
        self.int8: list[str] = []
        self.sizes: dict[str, float] = {}
        self.scales: dict[str, float] = {}
        self.channels: dict[str, int] = {}
        self.expected: dict[str, NDArray[np.float64]] = {}
        self.model_changed: Callable[[onnx.ModelProto], onnx.ModelProto] | None = None

    # Tensors -------------------------------------------------------------------------------------------------------

    def constant(self, name: str, value: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
        first = inputs[0]
        sizes = [self.sizes.get(name, 0.0) for name in inputs if operator == "Add" or name == first]
        self.sizes.setdefault(output, math.hypot(*sizes) or 1.0)
        self.channels.setdefault(output, self.channels.get(first, WIDTH))
        return output

    def images(self, name: str = "images", channels: int = WIDTH, scale: float = 1 / 4, top: int = 4) -> str:
        """A float input on the grid of `scale`, quantized."""
        self.channels[name] = channels
        # Equal for equal arguments, so that most cases share one array of the file.
        codes = np.random.default_rng(len(name)).integers(-top, top + 1, (BATCH, channels, SIDE, SIDE))
        self.inputs[name] = (codes * scale).astype(np.float32)
        self.sizes[name] = scale * top * 0.6
        return self.quantized(name, f"{name}.q", scale)

    def quantized(self, x: str, name: str, scale: float | None = None, zero: np.generic | None = None) -> str:
        """Q and DQ, int8 with zero point 0; without a scale, one by which the largest values saturate."""
        if scale is None:
            scale = power_of_two(2.2 * self.sizes[x] / 127)
        zero = np.int8(0) if zero is None else zero
        parameters = [self.constant(f"{name}.s", np.float32(scale)), self.constant(f"{name}.z", zero)]
        codes = self.add("QuantizeLinear", [x, *parameters], f"{name}.code")
        value = self.add("DequantizeLinear", [codes, *parameters], name)
        self.sizes[value], self.scales[value] = self.sizes[x], scale
        self.channels[value] = self.channels[x]
        return value

    def activation(self, x: str, name: str, top: int = 127, scale: float | None = None) -> str:
        """Clip(0, top * scale), Q, DQ; 127 needs no Clip, only a Relu: Q saturates there."""
        scale = scale or power_of_two(1.2 * self.sizes[x] / top)
        if top == 127:
            clipped = self.add("Relu", [x], f"{name}.relu")
        else:
            bounds = [
                self.constant(f"{name}.low", np.float32(0)),
                self.constant(f"{name}.high", np.float32(top * scale)),
            ]
            clipped = self.add("Clip", [x, *bounds], f"{name}.clip")
        value = self.quantized(clipped, name, scale)
        self.sizes[value] = 0.6 * top * scale
        return value

    def weight(self, shape: tuple[int, ...], name: str, top: int, scales: NDArray[Any] | None = None) -> str:
        """Codes -top..top; where top is 0, the binary -1 and 1."""
        codes = self.rng.integers(-top, top + 1, shape) if top else self.rng.choice([-1, 1], shape)
        return self.weight_of(codes.astype(np.int8), name, scales)

    def weight_of(self, codes: NDArray[np.int8], name: str, scales: NDArray[Any] | None = None) -> str:
        if scales is None:
            scales = 2.0 ** -self.rng.integers(4, 7, len(codes))
        shape = scales.shape
        names = [
            self.constant(f"{name}.codes", codes),
            self.constant(f"{name}.ws", scales.astype(np.float32)),
            self.constant(f"{name}.wz", np.zeros(shape, np.int8)),
        ]
        axis = {"axis": 0} if shape else {}
        value = self.add("DequantizeLinear", names, f"{name}.weight", **axis)
        real_weight = codes * (scales.reshape(-1, *[1] * (codes.ndim - 1)) if shape else scales)
        self.sizes[value] = float(np.sqrt(np.square(real_weight).mean()))
        self._weight_scales = np.broadcast_to(scales, len(codes))
        return value

    def bias(self, name: str, x: str, size: float) -> str:
        """On the grid of the integer sums, so that adding it is exact."""
        grid = self.scales[x] * self._weight_scales
        steps = np.rint(self.rng.normal(0, 0.3 * size, len(grid)) / grid)
        return self.constant(f"{name}.bias", (steps * grid).astype(np.float32))

    # Layers --------------------------------------------------------------------------------------------------------

    def conv(
        self,
        x: str,
        name: str,
        out: int = WIDTH,
        kernel: int = 3,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        top: int = 1,
        scales: NDArray[Any] | None = None,
        codes: NDArray[np.int8] | None = None,
    ) -> str:
        inputs = self.channels[x] // groups
        shape = (out, inputs, kernel, kernel)
        weight = self.weight(shape, name, top, scales) if codes is None else self.weight_of(codes, name, scales)
        size = self.sizes[x] * self.sizes[weight] * math.sqrt(inputs * kernel**2)
        bias = self.bias(name, x, size)
        self.add(
            "Conv",
            [x, weight, bias],
            name,
            pads=[dilation * (kernel // 2)] * 4,
            strides=[stride] * 2,
            dilations=[dilation] * 2,
            group=groups,
        )
        return self.layer(name, out, size)

    def gemm(self, x: str, name: str, out: int) -> str:
        weight = self.weight((out, self.channels[x]), name, 3)
        size = self.sizes[x] * self.sizes[weight] * math.sqrt(self.channels[x])
        self.add("Gemm", [x, weight, self.bias(name, x, size)], name, transB=1)
        return self.layer(name, out, size)

    def layer(self, name: str, channels: int, size: float) -> str:
        self.channels[name], self.sizes[name] = channels, size
        self.int8.append(name)
        return name

    def pooled(self, x: str, name: str) -> str:
        """Global average, its own Q/DQ, flattened."""
        mean = self.add("GlobalAveragePool", [x], f"{name}.mean")
        self.sizes[mean] = self.sizes[x]
        quantized = self.quantized(mean, name, self.scales[x])
        flat = self.add("Flatten", [quantized], f"{name}.flat")
        self.scales[flat] = self.scales[x]
        return flat

    def output(self, x: str, step: float | None = None) -> None:
        """step: what counts as one code; for values on no grid, None: a 512th of the largest."""
        self.outputs[x] = self.scales.get(x, 0.0) if step is None else step

    # The file ------------------------------------------------------------------------------------------------------

    def model(self) -> onnx.ModelProto:
        inputs = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(value.dtype), ["batch", *value.shape[1:]]
            )
            for name, value in self.inputs.items()
        ]
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self.outputs]
        graph = helper.make_graph(self.nodes, self.name, inputs, outputs, self.constants)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9, producer_name="faqd"
        )
        return onnx.shape_inference.infer_shapes(model, strict_mode=True)

    def case(self) -> tuple[bytes, dict[str, NDArray[np.float32]]]:
        """The file, and the expected outputs by name."""
        model = self.model()
        del model.graph.value_info[:]
        expected = self.expected
        if not expected:
            values = _referee(model).run({name: value.astype(np.float32) for name, value in self.inputs.items()})
            expected = {name: real(values[name]) for name in self.outputs}
        if self.model_changed is not None:
            model = self.model_changed(model)
        return model.SerializeToString(deterministic=True), {k: v.astype(np.float32) for k, v in expected.items()}


def _referee(model: onnx.ModelProto) -> Referee:
    """Of the model in real numbers: the referee has them from the first input on, so it needs no Cast to them."""
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    for node in plain.graph.node:
        if node.op_type == "Cast":
            node.op_type = "Identity"
            del node.attribute[:]
    return Referee(plain)


def power_of_two(value: float) -> float:
    return float(2.0 ** round(math.log2(value)))
