"""What a row of the tables writes into an ONNX file: one call of a converted network, as nodes of opset 19."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

OPSET = 19
FLOAT = 1
"""ONNX's number for float32."""

Value = Any
"""A tensor of the file."""
Size = int | tuple[int, int]
"""A size of an axis; of one that depends on how many images there are, those of two and of three images."""


class File(Protocol):
    """The file that is being written."""

    def operator(self, name: str, inputs: Sequence[Value | None], attributes: dict[str, Any], place: str) -> Value: ...

    def number(self, name: str, tensor: Tensor) -> Value:
        """An initializer, integers as they are, others in float32; of a name that is known, the one that there is."""
        ...


class Emission:
    """A call, and the file that it becomes nodes of.

    module: what the call is of; None for a function. path: of the module, or the place of the function, by which
    numbers are called. flavour: of the file. values: the tensors that the call reads, in the file. before, after: sizes
    of what it reads first, and of its result.
    """

    def __init__(
        self, file: File, node: fx.Node, module: Any, path: str, flavour: str, values: dict[fx.Node, Value],
        sizes: dict[fx.Node, tuple[Size, ...]],
    ) -> None:  # fmt: skip
        self.node, self.module, self.path, self.flavour = node, module, path, flavour
        self._file, self._values, self._sizes = file, values, sizes
        self.before, self.after = sizes[node.all_input_nodes[0]], sizes[node]

    @property
    def x(self) -> Value:
        """The tensor that an operator of one reads."""
        return self._values[self.node.all_input_nodes[0]]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the call is given in order, tensors as nodes."""
        return self.node.args

    def argument(self, index: int) -> Value:
        """A tensor of the arguments, or a number of them."""
        given = self.arguments[index]
        return self._values[given] if isinstance(given, fx.Node) else self.number(f"argument_{index}", given)

    def promoted(self, index: int) -> Value:
        """The same as floats where the result is floats: torch mixes them with integers, ONNX does not."""
        given, value = self.arguments[index], self.argument(index)
        if not isinstance(given, fx.Node) or not _is_float(self.node) or _is_float(given):
            return value
        return self.op("Cast", value, to=FLOAT)

    @property
    def given(self) -> dict[str, Any]:
        """The arguments of a function of torch's, by the names that torch gives them."""
        target: Any = self.node.target
        usual = {argument.name: argument.default_value for argument in target._schema.arguments}
        return usual | dict(zip(usual, self.node.args, strict=False)) | self.node.kwargs

    def value(self, name: str) -> Value | None:
        """A tensor of the arguments of a function of torch's, or None where it is left out."""
        given = self.given[name]
        return self._values[given] if isinstance(given, fx.Node) else given

    def sizes(self, name: str) -> tuple[Size, ...]:
        """Of a tensor of the arguments of a function of torch's."""
        return self._sizes[self.given[name]]

    def values(self, index: int) -> list[Value]:
        """The tensors of an argument that is a list of them."""
        return [self._values[node] for node in self.arguments[index]]

    def op(self, operator: str, *inputs: Value | None, **attributes: Any) -> Value:
        """The result of one of ONNX's operators."""
        return self._file.operator(operator, inputs, attributes, self.path)

    def number(self, name: str, value: Any) -> Value:
        """A tensor of numbers that the file holds."""
        return self._file.number(f"{self.path}.{name}", torch.as_tensor(value))


def _is_float(node: fx.Node) -> bool:
    meta = node.meta.get("tensor_meta")
    return meta is not None and meta.dtype.is_floating_point


Emit = Callable[[Emission], Value | None]
"""Writes a call, and gives its result; None where ONNX has no operator for a call like this one."""


def one(operator: str, **attributes: Any) -> Emit:
    """An operator of one tensor that is one of ONNX's."""
    return lambda emission: emission.op(operator, emission.x, **attributes)


def two(operator: str) -> Emit:
    """An operator of two tensors that is one of ONNX's."""
    return lambda emission: emission.op(operator, emission.promoted(0), emission.promoted(1))


def settled(sizes: Sequence[Size]) -> list[int] | None:
    """The sizes, where none depends on how many images there are."""
    return [size for size in sizes if isinstance(size, int)] if all(isinstance(s, int) for s in sizes) else None
