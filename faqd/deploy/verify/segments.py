"""Cutting a Q/DQ file at its integer tensors, so that each layer can be compared on equal inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from faqd.deploy.onnx_model.graph import attributes_of
from faqd.deploy.onnx_model.inference import inferred
from faqd.deploy.reference.evaluator import OPERATORS, Evaluator, code_tensors, stored
from faqd.deploy.reference.onnx_fallback import FLOAT_OPERATORS
from faqd.deploy.reference.values import Value
from faqd.deploy.verify.test_vectors import Drive, undriven
from faqd.errors import UserError
from faqd.reference import real

ON_CODES = ("Clip", "Pad", "Unsqueeze", "Reshape")
"""What may stand behind a rounding: its limits, and zeros among the channels of an image."""
MOST_VALUES = 2**29
"""Held at once for all probes: 4 GiB in the reference's float64."""


@dataclass(frozen=True)
class Segment:
    """The part of a network between integer tensors: `inputs` (codes, or the network's own) to `output`."""

    model: onnx.ModelProto
    inputs: tuple[str, ...]
    output: str

    @property
    def layer(self) -> str:
        """The torch module whose result `output` is: `stages.0.1.relu2` for the node `stages.0.1.relu2.codes`."""
        return place_of(self.model.graph.node[-1]) or self.output

    @cached_property
    def _makers(self) -> dict[str, onnx.NodeProto]:
        return {name: node for node in self.model.graph.node for name in node.output}

    @cached_property
    def quantize(self) -> onnx.NodeProto | None:
        """What rounds to the codes `output`, behind it at most operators ON_CODES; None where something else makes
        them."""
        node = self._makers[self.output]
        while node.op_type in ON_CODES and node.input[0] in self._makers:
            node = self._makers[node.input[0]]
        return node if node.op_type == "QuantizeLinear" else None

    def put_in_place(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values, one for each code that was rounded, where those codes are in `output`; zeros where others are."""
        behind, name = [], self.output
        while (node := self._makers[name]).op_type in ON_CODES:
            behind.append(node)
            name = node.input[0]
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.model.graph.initializer}
        for node in self.model.graph.node:  # copies of constants, in files of before
            if node.op_type == "Identity" and node.input[0] in constants:
                constants[node.output[0]] = constants[node.input[0]]
        for node in reversed(behind):
            operands = [values, *(constants[name] for name in node.input[1:])]
            if node.op_type == "Pad":
                operands[2] = np.zeros(())
            values = values if node.op_type == "Clip" else OPERATORS[node.op_type](operands, attributes_of(node))
        return values

    @property
    def unclipped(self) -> str:
        """The tensor that is limited and rounded to `output`."""
        assert self.quantize is not None
        name = str(self.quantize.input[0])
        limits = name in self._makers and self._makers[name].op_type in ("Clip", "Relu")
        return str(self._makers[name].input[0]) if limits else name


def place_of(node: onnx.NodeProto) -> str:
    """The torch module of a node, by its name."""
    place: str = node.name.rpartition(".")[0]
    return place


def segments(model: onnx.ModelProto) -> Iterator[Segment]:
    """One segment per integer tensor and per network output, in graph order.

    Where there are float islands, a float tensor that an earlier segment makes is fed to the later ones as codes are:
    the residual stream of a transformer would be computed once more in front of every layer.
    """
    graph, known = model.graph, _described(model)
    codes = code_tensors(graph)
    producer = {name: index for index, node in enumerate(graph.node) for name in node.output}
    constants = {t.name: t for t in graph.initializer}
    borders = {*codes, *(v.name for v in graph.input)}
    handed_on = floats_handed_on(graph, known)
    made: set[int] = set()
    for target in [*sorted(codes, key=producer.__getitem__), *(v.name for v in graph.output)]:
        needed: set[int] = set()
        stack, inputs = [target], set()
        while stack:
            name = stack.pop()
            if name != target and (name in borders or (name in handed_on and producer[name] in made)):
                inputs.add(name)
            elif name in producer and producer[name] not in needed:
                needed.add(producer[name])
                stack.extend(graph.node[producer[name]].input)
        made |= needed
        nodes = [graph.node[index] for index in sorted(needed)]
        used = dict.fromkeys(name for node in nodes for name in node.input if name in constants)
        part = onnx.helper.make_graph(
            nodes,
            "segment",
            [known[name] for name in sorted(inputs)],
            [known[target]],
            [constants[name] for name in used],
            value_info=[known[name] for node in nodes for name in node.output if name in known and name != target],
        )
        cut = onnx.helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
        yield Segment(cut, tuple(sorted(inputs)), target)


def _described(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """Type and sizes of every tensor, by name."""
    found = inferred(model).graph
    return {value.name: value for value in [*found.value_info, *found.input, *found.output]}


def floats_handed_on(graph: onnx.GraphProto, known: dict[str, onnx.ValueInfoProto]) -> set[str]:
    """In a file with islands, the float tensors that more than one operator reads, but for what codes stand for."""
    if not any(node.op_type in FLOAT_OPERATORS for node in graph.node):
        return set()
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    readers = Counter(name for node in graph.node for name in node.input)
    computed = (node for node in graph.node if node.op_type not in ("DequantizeLinear", "Cast"))
    return {
        name
        for node in computed
        for name in node.output
        if readers[name] > 1 and name in known and known[name].type.tensor_type.elem_type in floats
    }


class Trace:
    """The reference's run of a file, segment by segment: each is fed what the segments in front of it hand on.

    computed: codes and outputs by tensor, as the file stores them, and float tensors that are handed on. reached: the
    largest real value of every tensor, of probes that are not driven. drive: hands on other codes for driven probes.
    probes: how many there are.
    """

    def __init__(self, model: onnx.ModelProto, inputs: NDArray[np.float32], drive: Drive) -> None:
        self.computed: dict[str, NDArray[Any]] = {}
        self.reached: dict[str, float] = {}
        self.probes = len(inputs)
        self._model = model
        self._inputs = {model.graph.input[0].name: inputs}
        self._drive = drive
        self._zero_points = _zero_points(model)
        self._places: dict[str, str] = {}
        self._floats = floats_handed_on(model.graph, _described(model))
        self._exact: dict[str, NDArray[np.float64]] = {}
        """Of the tensors that are handed on as floats, what float32 rounds."""

    def __iter__(self) -> Iterator[tuple[Segment, dict[str, NDArray[Any]], dict[str, Value]]]:
        """Each segment, with what it is fed and the values of all its tensors."""
        for segment in segments(self._model):
            self._refuse_oversized(segment)
            self._places[segment.output] = segment.layer
            feeds = self.feeds(segment)
            if feeds is None:
                raise UserError(
                    f"layer {segment.layer}: reads what no layer in front of it makes; export the run again."
                )
            values = Evaluator(segment.model).run(
                feeds | {name: self._exact[name] for name in feeds if name in self._exact}
            )
            self.computed[segment.output] = stored(values[segment.output])
            for name in self._floats & values.keys() - feeds.keys():
                self._exact[name], self.computed[name] = real(values[name]), stored(values[name])
            self._note(values)
            yield segment, feeds, values

    def _note(self, values: dict[str, Value]) -> None:
        for name, value in values.items():
            if isinstance(value, np.ndarray) and value.dtype.kind in "iub":
                continue  # sizes and places, which no float type holds
            found = real(value)
            self.reached[name] = float(np.abs(self.without_driven(found)).max(initial=0.0))

    def without_driven(self, array: NDArray[Any]) -> NDArray[Any]:
        return undriven(array, self.probes, self._drive.driven)

    def feeds(self, segment: Segment) -> dict[str, NDArray[Any]] | None:
        """What a segment is fed, by name; None where it reads what this file does not compute."""
        if not self.computed.keys() | self._inputs.keys() >= set(segment.inputs):
            return None
        types = {value.name: value.type.tensor_type.elem_type for value in segment.model.graph.input}
        return {
            name: self._handed_on(name).astype(onnx.helper.tensor_dtype_to_np_dtype(types[name]), copy=False)
            for name in segment.inputs
        }

    def _handed_on(self, name: str) -> NDArray[Any]:
        if name in self._inputs:
            return self._inputs[name]
        if self.computed[name].dtype.kind == "f":
            return self.computed[name]
        codes = self.centred(name)
        driven = self._drive(self._places[name], codes) + self._zero_points[name]
        return driven.astype(self.computed[name].dtype)

    def centred(self, name: str) -> NDArray[np.int16]:
        """The codes that were computed for an integer tensor, zero point removed."""
        return self.computed[name].astype(np.int16) - self._zero_points[name]

    def _refuse_oversized(self, segment: Segment) -> None:
        elements = self.probes * sum(_elements(value) for value in segment.model.graph.value_info)
        if elements > MOST_VALUES:
            raise UserError(
                f"layer {segment.layer} takes {elements:,} numbers for {self.probes} probe images; the integer "
                f"reference holds at most {MOST_VALUES:,} at once. Verify a smaller --image-size."
            )


def _zero_points(model: onnx.ModelProto) -> dict[str, int]:
    """Of every integer tensor that activations are dequantized from."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = {node.input[0]: node for node in reversed(model.graph.node) if node.op_type == "DequantizeLinear"}
    return {
        name: int(numpy_helper.to_array(constants[readers[name].input[2]]).item()) for name in code_tensors(model.graph)
    }


def _elements(value: onnx.ValueInfoProto) -> int:
    """For one image."""
    sizes = [size.dim_value for size in value.type.tensor_type.shape.dim]
    return int(np.prod([max(1, size) for size in sizes], dtype=object))
