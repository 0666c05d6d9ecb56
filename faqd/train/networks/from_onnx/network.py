"""What an ONNX file becomes: a network whose modules are the nodes of the file, in their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Called:
    """A module on values of the network, all by name. read_last: what no later call reads."""

    module: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    read_last: tuple[str, ...] = ()


class OnnxNetwork(nn.Module):
    """calls: of its modules, in order. image: the name of the input in the file, which files made of this network keep.
    outputs: name in the file -> value. A dictionary of the outputs comes back."""

    def __init__(self, modules: dict[str, nn.Module], calls: list[Called], image: str, outputs: dict[str, str]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self._calls, self._outputs = _with_ends(calls, set(outputs.values())), outputs
        self.image_name = image

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        values: dict[str, Any] = {self.image_name: x}
        for call in self._calls:
            result = self.get_submodule(call.module)(*[values[name] for name in call.inputs])
            results = (result,) if len(call.outputs) == 1 else result
            values.update(zip(call.outputs, results, strict=True))
            for name in call.read_last:
                del values[name]
        return {name: values[value] for name, value in self._outputs.items()}


class Function(nn.Module):
    """A node without weights that torch has no module for: a function of tensors, constants and settings.

    arguments: of the function; a Read stands for the tensor of that place, a tensor is a constant.
    """

    def __init__(self, function: Callable[..., Any], arguments: list[Any], settings: dict[str, Any]) -> None:
        super().__init__()
        self._function, self._settings = function, settings
        self._arguments: list[Any] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                name = f"constant_{len(self._arguments)}"
                self.register_buffer(name, argument)
                argument = _Held(name)
            self._arguments.append(argument)

    def forward(self, *tensors: Tensor) -> Any:
        return self._function(*[self._given(each, tensors) for each in self._arguments], **self._settings)

    def _given(self, argument: Any, tensors: tuple[Tensor, ...]) -> Any:
        if isinstance(argument, Read):
            return tensors[argument]
        if isinstance(argument, _Held):
            return getattr(self, argument)
        return [self._given(each, tensors) for each in argument] if isinstance(argument, list) else argument


class Read(int):
    """Which of the tensors that a Function is called with."""


class _Held(str):
    """The name of a constant."""


def _with_ends(calls: list[Called], kept: set[str]) -> list[Called]:
    found, seen = [], set(kept)
    for call in reversed(calls):
        ends = tuple(name for name in dict.fromkeys((*call.inputs, *call.outputs)) if name not in seen)
        seen.update(ends)
        found.append(Called(call.module, call.inputs, call.outputs, ends))
    return found[::-1]
