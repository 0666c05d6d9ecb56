"""Walks the nodes of an ONNX file: what is constant is computed here, what depends on the image becomes a module.

Sizes are those of a batch of BATCH images, a prime that no network has for a size of its own. So a multiple of it is
the batch, wherever a file takes sizes apart and puts them together, and what is built holds for any number of images.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from faqd.deploy.onnx_model.graph import attributes_of
from faqd.errors import UserError, first_line
from faqd.quantize.nodes import unused
from faqd.train.networks.from_onnx.network import Called, Function, OnnxNetwork, Read

BATCH = 1009
MAX_CONSTANT = 2**27
"""Elements of a constant that is computed, with BATCH images."""


@dataclass(frozen=True)
class Ref:
    """A tensor that depends on the image. shape: with BATCH images."""

    name: str
    fake: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.fake.shape)


Value = Ref | NDArray[Any]
Rule = Callable[["Node"], Any]
"""What makes of a node its result: a Ref, a constant, or a list of one for each output."""


class Builder:
    """rules: by operator. batch: the number of images that the file is written for, None where it is free."""

    def __init__(
        self, model: onnx.ModelProto, where: str, rules: dict[str, Rule], image: tuple[int, ...], batch: int | None
    ) -> None:
        self.graph, self.where, self.batch, self._rules = model.graph, where, batch, rules
        self.opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        self._opsets = list(model.opset_import)
        self._ir_version = model.ir_version
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.modules: dict[str, nn.Module] = {}
        self.calls: list[Called] = []
        self.made: dict[Any, str] = {}
        self._taken: set[str] = set(dir(nn.Module()))
        self.values: dict[str, Value] = {t.name: numpy_helper.to_array(t) for t in self.graph.initializer}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for proto in self.graph.node:
            for name in proto.input:
                self._readers.setdefault(name, []).append(proto)
        self._returned = {output.name for output in self.graph.output}
        self._absorbed: set[str] = set()
        self.image = next(value.name for value in self.graph.input if value.name not in self.values)
        with self._fakes:
            self.values[self.image] = Ref(self.image, torch.empty(BATCH, *image))

    def network(self, image: str, outputs: dict[str, str]) -> OnnxNetwork:
        return OnnxNetwork(self.modules, self.calls, image, outputs)

    def walk(self) -> None:
        """UserError names the node that cannot be read."""
        constant = {name for name, value in self.values.items() if not isinstance(value, Ref)}
        for proto in self.graph.node:  # First, so that a layer finds what is added behind it.
            if proto.op_type != "Identity" and constant.issuperset(filter(None, proto.input)):
                constant.update(proto.output)
        early = [proto for proto in self.graph.node if constant.issuperset(proto.output)]
        late = [proto for proto in self.graph.node if not constant.issuperset(proto.output)]
        for proto in (*early, *late):
            node = Node(self, proto)
            try:
                result = node.result(self._rules)
            except UserError:
                raise
            except Exception as error:  # what numpy, onnx and torch raise where values do not fit an operator
                raise node.refusal(f"cannot be computed ({first_line(error)})") from error
            results = result if isinstance(result, list) else [result]
            for name, value in zip(proto.output, results, strict=False):
                if name:
                    self.values[name] = value

    def bias_behind(self, name: str, channels: int, shape: tuple[int, ...]) -> tuple[str, NDArray[Any]] | None:
        """The constant, by name, that one Add alone adds to the result `name` of a layer; it then is the layer's.

        shape: that of a tensor with a number for each channel.
        """
        readers = self._readers.get(name, [])
        if len(readers) != 1 or readers[0].op_type != "Add" or name in self._returned:
            return None
        other = next((each for each in readers[0].input if each != name), name)
        value = self.values.get(other)
        if not isinstance(value, np.ndarray) or value.size != channels or value.ndim > len(shape) + 1:
            return None
        if (1,) * (len(shape) + 1 - value.ndim) + value.shape != (1, *shape):
            return None
        self._absorbed.add(readers[0].output[0])
        return other, value.reshape(-1)

    def is_absorbed(self, name: str) -> bool:
        return name in self._absorbed

    def place(self, wanted: str) -> str:
        """A name for a module; it is the node's, as far as Python has such names."""
        return unused(re.sub(r"\W+", "_", wanted).strip("_") or "node", self._taken)

    def call(self, place: str, module: nn.Module, tensors: Sequence[Ref]) -> Any:
        """The result, or the list of results, of a module that stands at `place`."""
        with self._fakes, torch.no_grad():
            found = module(*[ref.fake for ref in tensors])
        several = isinstance(found, tuple | list)
        results = list(found) if several else [found]
        refs = [Ref(f"{len(self.calls)}_{index}", fake) for index, fake in enumerate(results)]
        self.calls.append(Called(place, tuple(ref.name for ref in tensors), tuple(ref.name for ref in refs)))
        return refs if several else refs[0]

    def fold(self, proto: onnx.NodeProto, values: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """What a node makes of constants, by ONNX's own reference."""
        inputs = [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in values.items()
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in proto.output if name]
        graph = onnx.helper.make_graph([proto], "constant", inputs, outputs)
        model = onnx.helper.make_model(graph, opset_imports=self._opsets, ir_version=self._ir_version)
        results = iter(ReferenceEvaluator(model).run(None, values))
        return [np.asarray(next(results)) if name else np.zeros(0) for name in proto.output]


class Node:
    """A node of the file as its rule sees it. inputs: constants, and Refs to what depends on the image."""

    def __init__(self, builder: Builder, proto: onnx.NodeProto) -> None:
        self.builder, self.proto = builder, proto
        self.name = proto.name or f"{proto.op_type}_{proto.output[0]}"
        self.opset = builder.opset
        if missing := [name for name in proto.input if name and name not in builder.values]:
            raise self.refusal(f"reads {missing[0]}, a second result of another node that is not read")
        self.inputs: list[Value | None] = [builder.values[name] if name else None for name in proto.input]
        self.attributes: dict[str, Any] = attributes_of(proto)
        self._place: str | None = None

    def result(self, rules: dict[str, Rule]) -> Any:
        kind = self.proto.op_type
        if kind in ("Shape", "Size"):
            return self._sizes()
        if any(isinstance(value, Ref) for value in self.inputs):
            if self.builder.is_absorbed(self.proto.output[0]):
                return next(value for value in self.inputs if isinstance(value, Ref))
            return rules[kind](self)
        if kind == "Identity":
            return self.inputs[0]
        if kind in ("ConstantOfShape", "Expand", "Tile"):
            self._refuse_huge()
        given = dict(zip(self.proto.input, self.inputs, strict=True))
        return self.builder.fold(self.proto, {name: value for name, value in given.items() if name})

    def _sizes(self) -> NDArray[np.int64]:
        value = self.inputs[0]
        assert value is not None
        shape = np.array(value.shape, np.int64)
        if self.proto.op_type == "Size":
            return np.array(shape.prod(), np.int64)
        return shape[self.attributes.get("start", 0) : self.attributes.get("end", len(shape))]

    def _refuse_huge(self) -> None:
        *values, sizes = (value for value in self.inputs if isinstance(value, np.ndarray))
        times = float(values[0].size) if values and self.proto.op_type == "Tile" else 1.0
        if times * float(np.prod(sizes.astype(np.float64))) > MAX_CONSTANT:
            raise self.refusal(f"makes a constant of {list(sizes)} elements, which nothing needs for one image")

    # What it reads -----------------------------------------------------------------------------------------------

    def at(self, index: int) -> Value | None:
        return self.inputs[index] if index < len(self.inputs) else None

    def ref(self, index: int = 0) -> Ref:
        """A tensor that depends on the image; a constant is refused."""
        value = self.at(index)
        if not isinstance(value, Ref):
            raise self.refusal(f"has a constant for its input {index}")
        return value

    def of_axes(self, kinds: dict[int, Any]) -> Any:
        """Of modules by the number of axes that they read, the one for the first tensor."""
        rank = len(self.ref().shape)
        if rank not in kinds:
            raise self.refusal(f"reads a tensor of {rank} axes; taken are those of {', '.join(map(str, kinds))}")
        return kinds[rank]

    def constant(self, index: int) -> NDArray[Any] | None:
        """None where there is no such input; what depends on the image is refused."""
        value = self.at(index)
        if isinstance(value, Ref):
            raise self.refusal(f"computes its input {index} ({self.proto.input[index]}) from the image")
        return value

    def tensor(self, value: NDArray[Any]) -> Tensor:
        """A constant; of equal ones for each image, one."""
        for axis, size in enumerate(value.shape):
            first = value.take([0], axis) if size == BATCH else value
            if size == BATCH and np.array_equal(np.broadcast_to(first, value.shape), value):
                value = first
        return torch.from_numpy(np.array(value))

    def setting(self, name: str, index: int | None = None, default: Any = None) -> Any:
        """An attribute; in newer opsets an input, as a number or a list."""
        if name in self.attributes:
            value = self.attributes[name]
            return value.decode() if isinstance(value, bytes) else value
        found = None if index is None else self.constant(index)
        return default if found is None else found.tolist()

    # What it becomes ---------------------------------------------------------------------------------------------

    @property
    def place(self) -> str:
        """Of the module that has its name."""
        if self._place is None:
            self._place = self.builder.place(self.name)
        return self._place

    def module(self, module: nn.Module, *tensors: Ref, beside: str = "") -> Any:
        """What `module` computes. beside: what it does, where it is not what the node is called after."""
        place = self.builder.place(f"{self.place}_{beside}") if beside else self.place
        if place in self.builder.modules:
            place = self.builder.place(f"{place}_{len(self.builder.modules)}")
        self.builder.modules[place] = module
        return self.builder.call(place, module, tensors)

    def function(self, function: Callable[..., Any], *arguments: Any, beside: str = "", **settings: Any) -> Any:
        """The same for a function: arguments and lists of them may be Refs, constants and settings."""
        tensors: list[Ref] = []

        def held(argument: Any) -> Any:
            if isinstance(argument, Ref):
                tensors.append(argument)
                return Read(len(tensors) - 1)
            if isinstance(argument, np.ndarray):
                return self.tensor(argument)
            return [held(each) for each in argument] if isinstance(argument, list) else argument

        made = Function(function, [held(argument) for argument in arguments], settings)
        return self.module(made, *tensors, beside=beside)

    def shared(self, make: Callable[[], nn.Module], *tensors: Ref, bias: str = "") -> Any:
        """A layer with weights: one module for all nodes that read the same ones with the same settings. bias: the
        name of one that is no input."""
        names = (*self.proto.input[len(tensors) :], bias)
        key = (self.proto.op_type, names, repr(sorted(self.attributes.items(), key=lambda item: item[0])))
        if key in self.builder.made:
            return self.builder.call(self.builder.made[key], self.builder.modules[self.builder.made[key]], tensors)
        result = self.module(make(), *tensors)
        self.builder.made[key] = self.place
        return result

    def refusal(self, why: str) -> UserError:
        return UserError(f"{self.builder.where}: node {self.name} ({self.proto.op_type}) {why}.")
