"""What a layer of integer weights costs on onnxruntime where nothing may round its sums before a SiLU.

`python -m faqd.benchmarks.studies.unrounded_sums --json FILE` times, on one thread and in turn in one process, a few
equal layers in a row, each a convolution of codes, SiLU and a rounding: with the sums rounded to 8 bits (another
network), as ConvInteger, as floats with weights dequantized in every run or once and for all, and all in floats.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import click
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rich import box
from rich.console import Console
from rich.table import Table

from faqd import __version__
from faqd.benchmarks.backends.sessions import ClosedLoop
from faqd.benchmarks.measure.environment import environment
from faqd.benchmarks.measure.latency import Length, Submission, interleaved, speed_up
from faqd.command import Finite, emit_json, json_option, run
from faqd.deploy.onnx_model.session import OnnxSession, version

VERSION = 1
CHAIN = 4
LAYERS: dict[str, tuple[int, int, int, int]] = {
    "1x1": (64, 1, 1, 52),
    "1x1, wide and small": (256, 1, 1, 13),
    "3x3": (64, 3, 1, 52),
    "3x3, few channels": (16, 3, 1, 104),
    "depthwise 5x5": (64, 5, 64, 52),
}
"""Name -> channels, kernel, groups, pixels per side: such layers as small detectors have."""
INPUT_SCALE = np.float32(0.05)


@dataclass
class Chain:
    """Nodes and constants of a file that grows layer by layer."""

    channels: int
    kernel: int
    groups: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, values: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(values), f"c{len(self.constants)}"))
        return str(self.constants[-1].name)

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [f"t{len(self.nodes)}"], **attributes))
        return str(self.nodes[-1].output[0])

    def convolve(self, operator: str, *inputs: str) -> str:
        pads = [self.kernel // 2] * 4
        return self.add(operator, *inputs, kernel_shape=[self.kernel] * 2, pads=pads, group=self.groups)

    def grid(self) -> tuple[str, str]:
        return self.constant(INPUT_SCALE), self.constant(np.uint8(128))

    def rounded(self, x: str) -> str:
        return self.add("QuantizeLinear", x, *self.grid())

    def real(self, codes: str) -> str:
        return self.add("DequantizeLinear", codes, *self.grid())

    def real_weight(self, codes: NDArray[np.int8], scale: NDArray[np.float32]) -> str:
        zeros = self.constant(np.zeros(len(scale), np.int8))
        return self.add("DequantizeLinear", self.constant(codes), self.constant(scale), zeros, axis=0)


Weights = tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32]]
"""Codes (O, I, k, k), scales (O,), biases (O,)."""


def _rounded_sums(chain: Chain, x: str, weights: Weights) -> str:
    codes, scale, bias = weights
    stored = [
        chain.constant(np.rint(bias / (scale * INPUT_SCALE)).astype(np.int32)),
        chain.constant(scale * INPUT_SCALE),
    ]
    real_bias = chain.add("DequantizeLinear", *stored, axis=0)
    return chain.real(chain.rounded(chain.convolve("Conv", chain.real(x), chain.real_weight(codes, scale), real_bias)))


def _integer_sums(chain: Chain, x: str, weights: Weights) -> str:
    codes, scale, bias = weights
    sums = chain.convolve("ConvInteger", x, chain.constant(codes), chain.constant(np.uint8(128)))
    factor, offset = (chain.constant(values.reshape(-1, 1, 1)) for values in (scale * INPUT_SCALE, bias))
    return chain.add("Add", chain.add("Mul", chain.add("Cast", sums, to=TensorProto.FLOAT), factor), offset)


def _dequantized(chain: Chain, x: str, weights: Weights) -> str:
    codes, scale, bias = weights
    return chain.convolve("Conv", chain.real(x), chain.real_weight(codes, scale), chain.constant(bias))


def _floats(chain: Chain, x: str, weights: Weights) -> str:
    codes, scale, bias = weights
    stored = chain.constant(codes * scale.reshape(-1, 1, 1, 1))
    return chain.convolve("Conv", chain.real(x), stored, chain.constant(bias))


PLAIN = "float network"
FORMS: dict[str, Callable[[Chain, str, Weights], str] | None] = {
    "rounded sums": _rounded_sums,
    "ConvInteger": _integer_sums,
    "floats, weights dequantized in each run": _dequantized,
    "floats": _floats,
    PLAIN: None,
}


def chain_of(layer: str, form: str) -> onnx.ModelProto:
    """CHAIN such layers, with random weights."""
    channels, kernel, groups, side = LAYERS[layer]
    chain, draw = Chain(channels, kernel, groups), np.random.default_rng(0)
    emit = FORMS[form]
    x = "x" if emit is None else chain.rounded("x")
    for _ in range(CHAIN):
        shape = (channels, channels // groups, kernel, kernel)
        codes = draw.integers(-60, 61, shape).astype(np.int8)
        scale = np.full(channels, 1 / (35 * np.sqrt(np.prod(shape[1:]))), np.float32)
        weights = codes, scale, draw.normal(0, 0.1, channels).astype(np.float32)
        if emit is None:
            stored = chain.constant(codes * scale.reshape(-1, 1, 1, 1))
            y = chain.convolve("Conv", x, stored, chain.constant(weights[2]))
        else:
            y = emit(chain, x, weights)
        x = chain.add("Mul", y, chain.add("Sigmoid", y))
        x = x if emit is None else chain.rounded(x)
    x = x if emit is None else chain.real(x)
    graph = helper.make_graph(
        chain.nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", channels, side, side])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, None)],
        chain.constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def measure(layer: str, length: Length) -> list[dict[str, Any]]:
    channels, _, _, side = LAYERS[layer]
    image = np.random.default_rng(1).normal(size=(1, channels, side, side)).astype(np.float32)
    submissions: dict[str, Submission] = {}
    for form in FORMS:
        session = OnnxSession(chain_of(layer, form).SerializeToString(), threads=1)
        submissions[form] = ClosedLoop(session, {session.inputs[0]: image}, time.perf_counter)
    times = interleaved(submissions, length)
    return [
        {
            "layer": layer,
            "form": form,
            "samples": len(found.queries),
            "min_ms": min(found.all_ms),
            "round_medians_ms": found.round_medians_ms,
            "speed_up_over_float": speed_up(found, times[PLAIN]).to_json(),
        }
        for form, found in times.items()
    ]


@click.command(help=(__doc__ or "").splitlines()[0])
@json_option
@click.option("--duration", default=3.0, show_default=True, type=Finite(0.0), help="Seconds for each form of a layer.")
@click.option("--rounds", default=10, show_default=True, type=click.IntRange(1), help="How often all forms run.")
def command(json_target: str | None, duration: float, rounds: int) -> None:
    length = Length(duration_s=duration, rounds=rounds)
    rows = [row for layer in LAYERS for row in measure(layer, length)]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title in ("layer", "form", "min ms", "× float"):
        table.add_column(title, justify="left" if title in ("layer", "form") else "right")
    for row in rows:
        ratio = row["speed_up_over_float"]
        noisy = " ~" if ratio["noisy"] else ""
        table.add_row(row["layer"], row["form"], f"{row['min_ms']:.3f}", f"{ratio['paired_median']:.2f}{noisy}")
    Console(stderr=json_target == "-", width=None if sys.stdout.isatty() else 120).print(table)
    result = {
        "version": VERSION,
        "what": f"onnxruntime on the CPU, one thread, batch 1: {CHAIN} layers of integer weights before a SiLU each",
        "command": shlex.join(["python", "-m", "faqd.benchmarks.studies.unrounded_sums", *sys.argv[1:]]),
        "environment": environment(),
        "versions": {"faqd": __version__, "onnxruntime": version},
        "rows": rows,
    }
    emit_json(json_target, result)


def main() -> None:
    run(command)


if __name__ == "__main__":
    main()
