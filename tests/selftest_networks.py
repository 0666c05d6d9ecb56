"""The tiny networks of `faqd-deploy selftest`, with inputs and what must come out. Written into the package by

    python -m tests.selftest_networks

A board has no onnx, so files and numbers are made here, once, and travel with the package. What must come out is the
referee's word; a test asks onnxruntime as well. Scales are powers of two and values lie on their grids wherever that
is possible: then every sum is exact in float32 and any correct backend gives equal codes, ties included.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from faqd.deploy.board.cases import CASES_FILE, FORMAT, VERSION
from faqd.deploy.export.float16 import float16_from_float32
from faqd.files import written_beside
from faqd.reference import convolve
from tests.selftest_net import BATCH, SIDE, WIDTH, Net, power_of_two

# The cases: what each is for stands in its docstring, which travels with it -----------------------------------------

Maker = Callable[[Net], None]
CASES: dict[str, tuple[Maker, bool]] = {}
"""By name: the maker, and whether faqd's exporter relies on it."""


def case(name: str, *, relied_on: bool = True) -> Callable[[Maker], Maker]:
    def register(maker: Maker) -> Maker:
        CASES[name] = maker, relied_on
        return maker

    return register


def _clip(bits: int) -> Maker:
    def maker(net: Net) -> None:
        net.output(net.activation(net.conv(net.images(), "conv"), "act", 2**bits - 1))

    maker.__doc__ = f"Conv, Clip to {bits} bits with values beyond it, Q/DQ."
    return maker


for _bits in range(1, 7):
    case(f"clip-{_bits}-bit")(_clip(_bits))


@case("clip-7-bit")
def _(net: Net) -> None:
    """Conv, Clip to 0..127, Q/DQ: the Clip says what Q does anyway."""
    x = net.conv(net.images(), "conv")
    scale = power_of_two(1.2 * net.sizes[x] / 127)
    bounds = [net.constant("low", np.float32(0)), net.constant("high", np.float32(127 * scale))]
    net.output(net.quantized(net.add("Clip", [x, *bounds], "clip"), "act", scale))


@case("relu-saturates")
def _(net: Net) -> None:
    """Conv, Relu, Q/DQ at 0..127 (8 bits as trained for TensorRT): Q itself is the clip."""
    net.output(net.activation(net.conv(net.images(), "conv"), "act", 127))


@case("signed-8-bit")
def _(net: Net) -> None:
    """Conv without activation, Q/DQ at -128..127 with values beyond both ends, another conv."""
    x = net.quantized(net.conv(net.images(), "conv1"), "signed")
    net.output(net.activation(net.conv(x, "conv2"), "act", 15))
    net.output(x)


@case("linear-clip")
def _(net: Net) -> None:
    """Gemm, Clip to 4 bits, Q/DQ: TensorRT 10.12 and 10.13 are known to drop the upper bound behind a linear layer."""
    x = net.pooled(net.activation(net.conv(net.images(), "conv"), "act", 15), "pool")
    net.output(net.activation(net.gemm(x, "linear", WIDTH), "out", 15))


@case("linear-clip-float", relied_on=False)
def _(net: Net) -> None:
    """MatMul, Add, Clip in float, no Q/DQ: where the upper bound was first seen dropped."""
    net.inputs["x"] = (net.rng.integers(-12, 13, (BATCH, WIDTH)) / 16).astype(np.float32)
    weight = net.constant("w", (net.rng.integers(-3, 4, (WIDTH, WIDTH)) / 16).astype(np.float32))
    bias = net.constant("b", (net.rng.integers(-8, 9, WIDTH) / 256).astype(np.float32))
    total = net.add("Add", [net.add("MatMul", ["x", weight], "product"), bias], "sum")
    bounds = [net.constant("low", np.float32(0)), net.constant("high", np.float32(0.25))]
    net.output(net.add("Clip", [total, *bounds], "clip"), 1 / 256)
    product = net.inputs["x"].astype(np.float64) @ numpy_helper.to_array(net.constants[0])
    net.expected = {"clip": np.clip(product + numpy_helper.to_array(net.constants[1]), 0, 0.25)}


@case("residual")
def _(net: Net) -> None:
    """Identity shortcut: the DQ tensor of the block's input is added to the branch, which has no Q/DQ of its own."""
    x = net.activation(net.conv(net.images(), "stem", kernel=1), "act0", 15)
    branch = net.conv(net.activation(net.conv(x, "conv1"), "act1", 15), "conv2")
    net.output(net.activation(net.add("Add", [branch, x], "sum"), "act2", 15))


@case("residual-downsample")
def _(net: Net) -> None:
    """1×1 convolution of stride 2 on the shortcut, with its own signed Q/DQ."""
    x = net.activation(net.conv(net.images(), "stem", kernel=1), "act0", 15)
    branch = net.conv(net.activation(net.conv(x, "conv1", stride=2), "act1", 15), "conv2")
    shortcut = net.quantized(net.conv(x, "down", kernel=1, stride=2), "short")
    net.output(net.activation(net.add("Add", [branch, shortcut], "sum"), "act2", 15))


@case("residual-signed")
def _(net: Net) -> None:
    """A sum without activation behind it, as in inverted residuals: signed Q/DQ on the shortcut and on the sum."""
    x = net.quantized(net.conv(net.images(), "stem", kernel=1), "act0")
    branch = net.conv(net.activation(net.conv(x, "conv1"), "act1", 15), "conv2")
    net.output(net.quantized(net.add("Add", [branch, x], "sum"), "act2"))


@case("concat")
def _(net: Net) -> None:
    """Two branches, Concat, one Q/DQ behind it."""
    x = net.images()
    convs = [net.conv(x, f"conv{i}") for i in (1, 2)]
    scale = power_of_two(1.2 * net.sizes["conv1"] / 15)
    bounds = [net.constant("low", np.float32(0)), net.constant("high", np.float32(15 * scale))]
    clips = [net.add("Clip", [conv, *bounds], f"{conv}.clip") for conv in convs]
    joined = net.add("Concat", clips, "concat", axis=1)
    net.channels[joined] = 2 * WIDTH
    x = net.quantized(joined, "act", scale)
    net.sizes[x] = 9 * scale
    net.output(net.activation(net.conv(x, "conv3", kernel=1), "out", 15))


@case("concat-shared-scale")
def _(net: Net) -> None:
    """Two branches with Q/DQ of one shared scale before the Concat, none behind it."""
    x = net.images()
    convs = [net.conv(x, f"conv{i}") for i in (1, 2)]
    scale = power_of_two(1.2 * net.sizes["conv1"] / 15)
    joined = net.add("Concat", [net.activation(conv, f"{conv}.act", 15, scale) for conv in convs], "concat", axis=1)
    net.channels[joined], net.scales[joined] = 2 * WIDTH, scale
    net.output(net.activation(net.conv(joined, "conv3", kernel=1), "out", 15))


@case("max-pool")
def _(net: Net) -> None:
    """Max pooling between DQ and the next convolution."""
    x = net.activation(net.conv(net.images(), "conv1"), "act", 15)
    pooled = net.add("MaxPool", [x], "pool", kernel_shape=[2, 2], strides=[2, 2])
    net.scales[pooled] = net.scales[x]
    net.output(net.activation(net.conv(pooled, "conv2", kernel=1), "out", 15))


@case("average-pool")
def _(net: Net) -> None:
    """Average pooling with a Q/DQ of its own behind it."""
    x = net.activation(net.conv(net.images(), "conv1"), "act", 15)
    pooled = net.add("AveragePool", [x], "pool", kernel_shape=[2, 2], strides=[2, 2])
    net.sizes[pooled] /= 2
    x = net.quantized(pooled, "mean", net.scales[x] / 8)
    net.output(net.activation(net.conv(x, "conv2", kernel=1), "out", 15))


@case("global-pool-classifier")
def _(net: Net) -> None:
    """Global average pooling, Q/DQ, Gemm with float outputs: the head of a classifier."""
    x = net.pooled(net.activation(net.conv(net.images(), "conv"), "act", 127), "pool")
    net.output(net.gemm(x, "classifier", 10))


@case("depthwise")
def _(net: Net) -> None:
    """Depthwise 3×3 between two 1×1 convolutions."""
    x = net.activation(net.conv(net.images(), "expand", kernel=1), "act0", 15)
    x = net.activation(net.conv(x, "depthwise", groups=WIDTH), "act1", 15)
    net.output(net.activation(net.conv(x, "project", kernel=1), "act2", 15))


@case("grouped")
def _(net: Net) -> None:
    """Grouped convolution, two groups of 32 channels."""
    x = net.activation(net.conv(net.images(), "conv1", 64, 1), "act1", 15)
    net.output(net.activation(net.conv(x, "grouped", 64, groups=2), "act2", 15))


@case("transposed", relied_on=False)
def _(net: Net) -> None:
    """Transposed convolution, stride 2: quantized, known to stay float on some builders."""
    x = net.images()
    codes = net.rng.integers(-3, 4, (WIDTH, WIDTH, 2, 2)).astype(np.int8)
    names = [net.constant("codes", codes), net.constant("ws", np.float32(1 / 16)), net.constant("wz", np.int8(0))]
    weight = net.add("DequantizeLinear", names, "weight")
    net.add("ConvTranspose", [x, weight], "deconv", strides=[2, 2])
    out = net.activation(net.layer("deconv", WIDTH, net.sizes[x] * 2 / 16 * math.sqrt(WIDTH)), "act", 15)
    net.output(out)
    spread = np.zeros((BATCH, WIDTH, 2 * SIDE, 2 * SIDE))
    spread[:, :, ::2, ::2] = net.inputs["images"]
    flipped = np.flip(codes, (2, 3)).swapaxes(0, 1) / 16
    sums = convolve(spread, flipped, (1, 1), (1, 1, 0, 0), (1, 1), 1)
    scale = net.scales[out]
    net.expected = {out: np.clip(np.rint(np.clip(sums, 0, 15 * scale) / scale), 0, 15) * scale}


@case("dilated")
def _(net: Net) -> None:
    """Convolution with dilation 2."""
    net.output(net.activation(net.conv(net.images(), "conv", dilation=2), "act", 15))


@case("strided")
def _(net: Net) -> None:
    """5×5 convolution with stride 2 on three channels."""
    x = net.images(channels=3)
    net.output(net.activation(net.conv(x, "conv", kernel=5, stride=2, top=7), "act", 15))


@case("first-layer")
def _(net: Net) -> None:
    """Three input channels, signed 8-bit input, 8-bit weights at ±127."""
    x = net.images(channels=3, scale=1 / 64, top=160)
    net.output(net.activation(net.conv(x, "conv", top=127), "act", 15))


@case("fp16-rest")
def _(net: Net) -> None:
    """The rest in FP16, scales in FP32 through Casts, as export writes it: residual block, pooling, classifier."""
    x = net.activation(net.conv(net.images(), "stem", kernel=1, scales=np.full(WIDTH, 1 / 16)), "act0", 15)
    branch = net.conv(x, "conv", scales=np.full(WIDTH, 1 / 16))
    x = net.activation(net.add("Add", [branch, x], "sum"), "act1", 15)
    net.output(x)
    net.output(net.gemm(net.pooled(x, "pool"), "classifier", 10))
    net.model_changed = float16_from_float32


@case("threshold-1-bit")
def _(net: Net) -> None:
    """1-bit weights and 1-bit activations: Clip(0, α) and Q(α) switch at α/2, which is a tie and rounds to zero."""
    x = net.activation(net.conv(net.images(), "conv1", top=0), "act1", 1)
    net.output(net.activation(net.conv(x, "conv2", top=0), "act2", 1))


@case("several-outputs")
def _(net: Net) -> None:
    """A feature map and two heads as outputs of one network."""
    x = net.activation(net.conv(net.images(), "conv"), "act", 15)
    net.output(x)
    net.output(net.activation(net.conv(x, "head1", 64, 1), "out1", 127))
    net.output(net.gemm(net.pooled(x, "pool"), "head2", 10))


@case("two-inputs")
def _(net: Net) -> None:
    """Two network inputs, each quantized; the second is the shortcut."""
    x, y = net.images("left"), net.images("right", scale=1 / 8)
    net.output(net.activation(net.add("Add", [net.conv(x, "conv"), y], "sum"), "act", 15))


@case("shared-tensor")
def _(net: Net) -> None:
    """One dequantized tensor read by two convolutions of other widths."""
    x = net.activation(net.conv(net.images(), "stem", kernel=1), "act", 15)
    net.output(net.activation(net.conv(x, "conv1"), "out1", 15))
    net.output(net.activation(net.conv(x, "conv2", 64, 1), "out2", 7))


@case("ties")
def _(net: Net) -> None:
    """Half of all sums lie midway between two codes: rounding must be half to even."""
    codes = np.zeros((WIDTH, WIDTH, 1, 1), np.int8)
    codes[np.arange(WIDTH), np.arange(WIDTH)] = 1
    x = net.images(scale=1 / 16, top=31)
    x = net.conv(x, "conv", kernel=1, scales=np.full(WIDTH, 1.0), codes=codes)
    net.constants[-1].CopyFrom(numpy_helper.from_array(np.zeros(WIDTH, np.float32), "conv.bias"))
    net.output(net.quantized(x, "act", 1 / 8))


@case("per-channel-scales")
def _(net: Net) -> None:
    """Weight scales from 0.0005 to 0.5 in one layer, no powers of two, and a channel of zeros, as a dead one gives."""
    codes = net.rng.integers(-7, 8, (WIDTH, WIDTH, 3, 3)).astype(np.int8)
    codes[5] = 0
    scales = net.rng.permutation(np.geomspace(5e-4, 0.5, WIDTH))
    x = net.conv(net.images(), "conv", codes=codes, scales=scales)
    net.sizes[x] /= 4
    net.output(net.activation(x, "act", 127))


@case("per-tensor-scale")
def _(net: Net) -> None:
    """One weight scale for the whole layer."""
    net.output(net.activation(net.conv(net.images(), "conv", scales=np.asarray(1 / 16)), "act", 15))


@case("common-scales")
def _(net: Net) -> None:
    """Scales as training finds them, no powers of two: equal but for a rare code next to a rounding border."""
    x = net.images(scale=0.2613)
    for name in ("conv1", "conv2"):
        x = net.conv(x, name, scales=net.rng.uniform(0.01, 0.05, WIDTH))
        x = net.activation(x, f"{name}.act", 15, 1.1317 * net.sizes[x] / 15)
    net.output(x)


@case("uint8-input")
def _(net: Net) -> None:
    """uint8 pixels, channels last, as the network input: Cast, Transpose, normalisation, Q, all in the graph."""
    pixels = net.rng.integers(0, 256, (BATCH, SIDE, SIDE, 3)).astype(np.uint8)
    net.inputs["images"], net.channels["images"], net.sizes["images"] = pixels, 3, 128.0
    x = net.add("Cast", ["images"], "float", to=TensorProto.FLOAT)
    x = net.add("Transpose", [x], "planes", perm=[0, 3, 1, 2])
    x = net.add("Sub", [x, net.constant("mean", np.full((1, 3, 1, 1), 128, np.float32))], "centred")
    x = net.add("Mul", [x, net.constant("factor", np.full((1, 3, 1, 1), 1 / 64, np.float32))], "normal")
    net.sizes[x] = 1.2
    x = net.quantized(x, "q", 1 / 64)
    net.output(net.activation(net.conv(x, "conv"), "act", 15))


@case("int8-input", relied_on=False)
def _(net: Net) -> None:
    """Codes themselves as the network input, which a DequantizeLinear reads."""
    net.inputs["codes"] = net.rng.integers(-128, 128, (BATCH, WIDTH, SIDE, SIDE)).astype(np.int8)
    parameters = [net.constant("s", np.float32(1 / 16)), net.constant("z", np.int8(0))]
    x = net.add("DequantizeLinear", ["codes", *parameters], "real")
    net.sizes[x], net.scales[x] = 4.6, 1 / 16
    net.output(net.activation(net.conv(x, "conv"), "act", 15))


@case("integer-clip", relied_on=False)
def _(net: Net) -> None:
    """The clip on the codes, between Q and DQ, as the file for onnxruntime has it."""
    x = net.add("Relu", [net.conv(net.images(), "conv")], "relu")
    scale = power_of_two(1.2 * net.sizes[x] / 15)
    parameters = [net.constant("s", np.float32(scale)), net.constant("z", np.int8(0))]
    codes = net.add("QuantizeLinear", [x, *parameters], "code")
    bounds = [net.constant("low", np.int8(0)), net.constant("high", np.int8(15))]
    net.output(net.add("DequantizeLinear", [net.add("Clip", [codes, *bounds], "clip"), *parameters], "act"), scale)


@case("uint8-activations", relied_on=False)
def _(net: Net) -> None:
    """uint8 codes with zero point 0 up to 255: where they are read as int8, everything above 127 is lost."""
    x = net.add("Relu", [net.conv(net.images(), "conv1")], "relu")
    x = net.quantized(x, "act", power_of_two(1.2 * net.sizes[x] / 255), np.uint8(0))
    net.output(x)
    net.output(net.activation(net.conv(x, "conv2", kernel=1), "out", 15))


@case("int32-bias", relied_on=False)
def _(net: Net) -> None:
    """A bias of int32 codes behind a DequantizeLinear, as onnxruntime wants it."""
    x = net.images()
    weight = net.weight((WIDTH, WIDTH, 3, 3), "conv", 3, np.full(WIDTH, 1 / 16))
    names = [
        net.constant("bias.codes", net.rng.integers(-200, 201, WIDTH).astype(np.int32)),
        net.constant("bias.s", np.full(WIDTH, 1 / 256, np.float32)),
        net.constant("bias.z", np.zeros(WIDTH, np.int32)),
    ]
    bias = net.add("DequantizeLinear", names, "bias", axis=0)
    net.add("Conv", [x, weight, bias], "conv", pads=[1] * 4)
    size = net.sizes[x] * net.sizes[weight] * math.sqrt(9 * WIDTH)
    net.output(net.activation(net.layer("conv", WIDTH, size), "act", 15))


# The file of all of them --------------------------------------------------------------------------------------------


def arrays() -> dict[str, NDArray[Any]]:
    """The contents of the package's case file: an index as JSON, and under their SHA-256 the ONNX bytes, inputs and
    outputs that it names."""
    index: list[dict[str, Any]] = []
    found: dict[str, NDArray[Any]] = {}

    def stored(value: NDArray[Any]) -> str:
        key = hashlib.sha256(f"{value.dtype}{value.shape}".encode() + value.tobytes()).hexdigest()
        found[key] = value
        return key

    for name, (maker, relied_on) in CASES.items():
        net = Net(name)
        maker(net)
        file, expected = net.case()
        steps = {key: step or float(np.abs(expected[key]).max()) / 512 for key, step in net.outputs.items()}
        index.append(
            {
                "name": name,
                "shows": " ".join((maker.__doc__ or "").split()),
                "relied_on": relied_on,
                "int8": net.int8,
                "steps": steps,
                "onnx": stored(np.frombuffer(file, np.uint8)),
                "inputs": {key: stored(value) for key, value in net.inputs.items()},
                "expected": {key: stored(value) for key, value in expected.items()},
            }
        )
    text = json.dumps({"format": FORMAT, "version": VERSION, "cases": index})
    return {"index": np.frombuffer(text.encode(), np.uint8)} | found


def main() -> None:
    with written_beside(CASES_FILE) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays())
    print(f"{CASES_FILE.name}: {len(CASES)} cases, {CASES_FILE.stat().st_size} bytes")  # noqa: T201


if __name__ == "__main__":
    main()
