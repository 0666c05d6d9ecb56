"""Which float parts of a Q/DQ file FP16 is too coarse for, measured on images: pixel coordinates, squares in norms.

A part is a group of operators between the integers that read each other; they are run with every tensor stored in FP16,
and again in float32. It stays float32 where that moves a result by more than a quarter of the step of the grid that
rounds it, or, where no grid does, by more than 2^-10 of the range that it has on the images. Sums of a residual stream
end a part and stay FP16: what their rounding does is seen behind the norm that reads them.

So does a layer of integers whose bias is large beside that step: its sums, which the bias takes back, are rounded as
coarsely. That of a layer that reads moved codes (faqd/quantize/lowering/offsets.py) often is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from faqd.deploy.export.float16 import float16_from_float32
from faqd.deploy.export.stored_run import StoredRun
from faqd.deploy.onnx_model.inference import inferred
from faqd.deploy.onnx_model.session import OnnxSession
from faqd.errors import UserError

IMAGES = 16
"""What it is measured on, at most."""
BATCH = 4
MOST_OF_A_STEP = 0.25
MOST_OF_THE_RANGE = 2.0**-10
OF_A_SUM = 2.0**-11
"""What FP16 moves a sum by that the bias takes back, as a share of the bias: half a unit in the last place of each."""
ENDS = 128
"""Codes beyond which every grid saturates: what is moved there is not seen."""

_MOVES = {
    *("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Concat", "Gather", "Expand"),
    *("Identity", "Pad", "Tile", "Cast"),
}
_HARMLESS = _MOVES | {
    *("Add", "Mul", "Relu", "PRelu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Resize"),
}
"""Between a layer and the grid that rounds it, few of which round to FP16 a time or two: not worth measuring, but for
sums with constants, which may be large and taken away again."""
_LINKING = {TensorProto.FLOAT, TensorProto.BOOL}
"""Types of what operators of one part hand on to each other; sizes are no part of it."""
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Float32Part:
    """Operators that stay float32. nodes: their names, of which the first names the part. reason: for people."""

    nodes: tuple[str, ...]
    reason: str


def float32_parts(model: onnx.ModelProto, images: NDArray[np.float32]) -> list[Float32Part]:
    """Of a float32 Q/DQ file. images: (N, C, H, W), its input; the first IMAGES of them are used."""
    file = _File(model)
    layers = list(file.layers_of_large_bias())
    parts = list(file.parts())
    if not parts:
        return layers
    watched = dict.fromkeys(name for part in parts for name in (*part.reads, *part.results))
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    known = {value.name for value in model.graph.output}
    whole.graph.output.extend(file.described[name] for name in watched if name not in known)
    session = OnnxSession(whole.SerializeToString(), optimise=False)
    halves = [StoredRun(float16_from_float32(part.model)) for part in parts]
    seen = [_Seen(part) for part in parts]
    for start in range(0, min(IMAGES, len(images)), BATCH):
        values = session.run({model.graph.input[0].name: images[start : start + BATCH]})
        for part, half, found in zip(parts, halves, seen, strict=True):
            found.compare(half, {name: values[name] for name in part.reads}, values)
    coarse = (
        Float32Part(tuple(node.name for node in part.model.graph.node), reason)
        for part, found in zip(parts, seen, strict=True)
        if (reason := found.reason())
    )
    return [*layers, *coarse]


@dataclass(frozen=True)
class _Part:
    """model: of its own. reads: what else computes for it. results: what others read of it, and the step of the finest
    grid that rounds it; None where none does."""

    model: onnx.ModelProto
    reads: tuple[str, ...]
    results: dict[str, float | None]


class _Seen:
    """What FP16 does to a part, over several batches."""

    def __init__(self, part: _Part) -> None:
        self._part = part
        self._moved = dict.fromkeys(part.results, 0.0)
        self._ends = dict.fromkeys(part.results, (np.inf, -np.inf))
        self._overflow = ""

    def compare(self, half: StoredRun, feeds: dict[str, NDArray[Any]], wanted: dict[str, NDArray[Any]]) -> None:
        if self._overflow:
            return
        try:
            found = half(feeds)
        except UserError as error:
            self._overflow = str(error)
            return
        for name, step in self._part.results.items():
            full, reach = wanted[name].astype(np.float64), np.inf if step is None else step * ENDS
            moved = np.abs(np.clip(found[name], -reach, reach) - np.clip(full, -reach, reach))
            self._moved[name] = max(self._moved[name], float(moved.max(initial=0.0)))
            lowest, highest = self._ends[name]
            self._ends[name] = (min(lowest, full.min(initial=np.inf)), max(highest, full.max(initial=-np.inf)))

    def reason(self) -> str:
        """Why the part stays float32; nothing where FP16 is fine."""
        if self._overflow:
            return self._overflow
        for name, step in self._part.results.items():
            lowest, highest = self._ends[name]
            unit, most = (highest - lowest, MOST_OF_THE_RANGE) if step is None else (step, MOST_OF_A_STEP)
            if unit > 0 and not self._moved[name] <= most * unit:
                of = "its range" if step is None else "a step of its quantization"
                return f"FP16 moves {name} by {self._moved[name] / unit:.2g} of {of}"
        return ""


class _File:
    """A Q/DQ file, as one looks for its float parts."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model, graph = model, model.graph
        found = inferred(model).graph
        self.described = {value.name: value for value in [*found.value_info, *found.input, *found.output]}
        self._outputs = {value.name for value in graph.output}
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._nodes = list(graph.node)
        self._makers = {name: index for index, node in enumerate(self._nodes) for name in node.output}

    @cached_property
    def _readers(self) -> dict[str, list[int]]:
        readers: dict[str, list[int]] = {}
        for index, node in enumerate(self._nodes):
            for name in dict.fromkeys(node.input):
                readers.setdefault(name, []).append(index)
        return readers

    def parts(self) -> Iterator[_Part]:
        """Those that FP16 could be too coarse for, in graph order."""
        own = [index for index in range(len(self._nodes)) if self._is_part(index)]
        group: dict[int, list[int]] = {index: [index] for index in own}
        for index in own:
            for name in self._nodes[index].input:
                maker = self._makers.get(name)
                if maker in group and group[maker] is not group[index] and self._type(name) in _LINKING:
                    joined = group[maker] + group[index]
                    group |= dict.fromkeys(joined, joined)
        unique = {id(members): sorted(members) for members in group.values()}
        for members in sorted(unique.values()):
            if self._is_worth_measuring(members):
                yield self._part(members)

    def layers_of_large_bias(self) -> Iterator[Float32Part]:
        """The layers of integers whose sums FP16 rounds too coarsely, because their bias takes most of them back."""
        for index, node in enumerate(self._nodes):
            bias = self._constants.get(node.input[2]) if len(node.input) > 2 else None
            if bias is None or not self._is_layer_of_integers(index):
                continue
            step = self._finest_step(node.output[0])
            moved = float(np.abs(numpy_helper.to_array(bias)).max(initial=0.0)) * OF_A_SUM
            if step is not None and moved > MOST_OF_A_STEP * step:
                reason = (
                    f"the bias of {node.name} is large: FP16 moves it by {moved / step:.2g} of a step of its result"
                )
                yield Float32Part((node.name,), reason)

    def _type(self, name: str) -> int:
        return self.described[name].type.tensor_type.elem_type if name in self.described else TensorProto.UNDEFINED

    def _is_part(self, index: int) -> bool:
        """Whether a node computes floats outside of the integers and of a residual stream."""
        node = self._nodes[index]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") or _LINKING.isdisjoint(map(self._type, node.output)):
            return False
        return not (self._is_layer_of_integers(index) or self._continues_a_stream(index))

    def _is_layer_of_integers(self, index: int) -> bool:
        node = self._nodes[index]
        weight = self._makers.get(node.input[1]) if node.op_type in _WEIGHTED else None
        return weight is not None and self._nodes[weight].op_type == "DequantizeLinear"

    def _continues_a_stream(self, index: int) -> bool:
        """Whether a node adds what a layer of integers gives to what goes on beside it."""
        node = self._nodes[index]
        if node.op_type != "Add" or any(name in self._constants for name in node.input):
            return False
        return any(map(self._comes_from_integers, node.input))

    def _comes_from_integers(self, name: str) -> bool:
        """Behind what moves values, or multiplies them by constants."""
        while (index := self._makers.get(name)) is not None:
            node = self._nodes[index]
            if self._is_layer_of_integers(index):
                return True
            scaled = node.op_type == "Mul" and any(operand in self._constants for operand in node.input)
            if node.op_type not in _MOVES and not scaled:
                return False
            name = next((operand for operand in node.input if operand not in self._constants), "")
        return False

    def _is_worth_measuring(self, members: list[int]) -> bool:
        operators = {self._nodes[index].op_type for index in members}
        added = (self._nodes[index].input for index in members if self._nodes[index].op_type == "Add")
        if any(name in self._constants for names in added for name in names):
            return True
        is_returned = any(name in self._outputs for index in members for name in self._nodes[index].output)
        return not operators <= (_MOVES if is_returned else _HARMLESS)

    def _part(self, members: list[int]) -> _Part:
        nodes, inside = [self._nodes[index] for index in members], set(members)
        read = dict.fromkeys(name for node in nodes for name in node.input if name)
        reads = [name for name in read if name not in self._constants and self._makers.get(name) not in inside]
        made = [name for node in nodes for name in node.output if self._type(name) == TensorProto.FLOAT]
        results = [
            name for name in made if name in self._outputs or not inside.issuperset(self._readers.get(name, inside))
        ]
        part = helper.make_graph(
            nodes,
            "part",
            [self.described[name] for name in reads],
            [self.described[name] for name in results],
            [self._constants[name] for name in read if name in self._constants],
        )
        model = helper.make_model(part, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)
        return _Part(model, tuple(reads), {name: self._finest_step(name) for name in results})

    def _finest_step(self, name: str) -> float | None:
        """Of the grids that round a tensor, or what harmless operators make of it."""
        found, ahead, seen = [], [name], set[str]()
        while ahead:
            tensor = ahead.pop()
            for index in self._readers.get(tensor, []):
                node = self._nodes[index]
                if node.op_type == "QuantizeLinear":
                    found.append(float(numpy_helper.to_array(self._constants[node.input[1]]).max()))
                elif node.op_type in _HARMLESS:
                    ahead += [result for result in node.output if result not in seen]
                    seen.update(node.output)
        return min(found, default=None)
