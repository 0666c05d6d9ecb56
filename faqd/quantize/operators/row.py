"""A row of the tables of operators: what the quantizer knows of one, beginning with what torch calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, fx, nn

from faqd.quantize.operators.emit import Emit
from faqd.quantize.operators.treatment import Treatment

Role = Literal[
    "input", "compute", "norm", "rectify", "clamp", "curve", "average", "add", "multiply", "concat", "reshape",
    "constant", "output", "other",
]  # fmt: skip
OWN = "faqd_own"
"""The key of a node's meta data that says whether it depends on the network's own tensors and on sizes alone."""


@dataclass(frozen=True)
class Operator:
    """kinds: the modules, or the functions, that the operator is in a captured network, and by which it is found.

    spellings: torch's operators that stand for it -> the rule that makes it of them. never_negative: whether its result
    is none, whatever it reads. problem: a sentence of what keeps this call from being quantized, of the module or None
    and the node (shapes propagated); refusal: of what keeps it from being in any file. formula: of an activation's
    module, its arithmetic (`activation.Formula`). exact: the module of a converted network, on float64 and with the
    numbers of the file, of (the user's module, dimensions of what it reads) and for a batch norm what to add; on_codes:
    the same of (what is called, scale of the codes that it reads). emit: writes it into an ONNX file; None where
    torch's exporter has to. stands_for, treatment: what docs/operators.md says of it, the first in a user's words.
    """

    role: Role
    kinds: tuple[Any, ...]
    spellings: dict[str, Rule] = field(default_factory=dict)
    never_negative: bool = False
    problem: Callable[[Any, fx.Node], str | None] | None = None
    refusal: Callable[[Any, fx.Node], str | None] | None = None
    formula: Callable[[Any], Any] | None = None
    exact: Callable[..., nn.Module] | None = None
    on_codes: Callable[[Any, Tensor], nn.Module] | None = None
    emit: Emit | None = None
    stands_for: str = field(kw_only=True)
    treatment: Treatment = field(kw_only=True)


@dataclass(frozen=True)
class ExactForm:
    """What stands in a converted network for an operator of a student.

    kind: its module. emit: writes it into an ONNX file. numbers: of it that the file states and verify binds, by name;
    those of layers and roundings have places of their own in verify.
    """

    kind: type[nn.Module]
    emit: Emit
    numbers: Callable[[Any], dict[str, Tensor]] = lambda module: {}


class Pieces(list[Callable[[], fx.Node]]):
    """What an operator returns that returns several: each is made where it is read."""


class _Builder(Protocol):
    """The graph that is being made."""

    held: dict[fx.Node, Tensor]

    def named(self, word: str | None) -> Any: ...

    def call_module(
        self, node: fx.Node, module: nn.Module, x: Any, tensors: list[fx.Node] | None = None
    ) -> fx.Node: ...

    def call_function(self, node: fx.Node, target: Callable[..., Any], args: Any, kwargs: Any) -> fx.Node: ...


class Call:
    """One call of an operator of torch's, whose arguments are nodes of the new graph by the names that torch gives."""

    def __init__(self, builder: _Builder, node: fx.Node, args: Any, kwargs: Any) -> None:
        self.node, self.name = node, str(node.target)
        self._builder = builder
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        usual = {argument.name: argument.default_value for argument in schema}
        self._given = usual | dict(zip(usual, args, strict=False)) | kwargs

    def __getitem__(self, name: str) -> Any:
        return self._given[name]

    def get(self, name: str) -> Any:
        return self._given.get(name)

    @property
    def x(self) -> fx.Node:
        """The tensor that an operator of one reads."""
        value = next(iter(self._given.values()))
        assert isinstance(value, fx.Node)
        return value

    @property
    def before(self) -> tuple[Any, ...]:
        return sizes(self.x)

    @property
    def after(self) -> tuple[Any, ...]:
        return sizes(self.node)

    def module(self, module: nn.Module, x: Any = None, word: str | None = None) -> fx.Node:
        """The call of a module on `x`, or on the operator's own tensor. word: the node's name, if it is another one."""
        with self._builder.named(word):
            return self._builder.call_module(self.node, module, self.x if x is None else x)

    def layer(self, module: nn.Module, tensors: list[fx.Node]) -> fx.Node:
        """The call of a module that holds `tensors`, at their own place where they have one."""
        return self._builder.call_module(self.node, module, self.x, tensors)

    def function(self, target: Callable[..., Any], *args: Any, word: str | None = None, **kwargs: Any) -> fx.Node:
        with self._builder.named(word):
            return self._builder.call_function(self.node, target, args, kwargs)

    def is_own(self, node: Any) -> bool:
        """Whether `node` is made of the network's own tensors alone."""
        held, read = self._builder.held, node.all_input_nodes if isinstance(node, fx.Node) else []
        return node in held or (bool(read) and all(map(self.is_own, read)))

    def tensor(self, node: Any) -> Tensor | None:
        """The parameter or buffer of the network's own that `node` is."""
        return self._builder.held.get(node) if isinstance(node, fx.Node) else None


Rule = Callable[[Call], Any]
"""Gives the module or the nodes that a call is; None where it is something that the quantizer does not know."""


def sizes(node: fx.Node) -> tuple[Any, ...]:
    """The sizes of a tensor: a number, or a symbol where they depend on how many images there are."""
    return tuple(node.meta["val"].shape)


def is_number(size: Any) -> bool:
    return isinstance(size, int) and not isinstance(size, torch.SymInt)


def parameter(tensor: Tensor) -> nn.Parameter:
    """What a layer trains, or a fixed filter, which is not trained."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
