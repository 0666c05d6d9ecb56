"""torch.export of a user's network, and what stops it, in sentences for its user."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_unflatten

from faqd.errors import UserError, first_line
from faqd.notice import slow
from faqd.quantize.capture.aten import views_are_written, word_of
from faqd.quantize.capture.translate import Translation
from faqd.quantize.nodes import innermost
from faqd.quantize.outputs import is_named_tuple
from faqd.user_file import name_anywhere

_GUARDS = "_guards_fn"
"""The module of torch's that holds an input against the shapes the program was exported with."""


def in_standard_terms(network: nn.Module, example: Tensor) -> fx.GraphModule:
    """A network in evaluation mode as a graph of the operators that the quantizer knows, for any number of images.

    example: (N >= 2, C, H, W). The layers hold the network's own parameters, under the names that they have there.
    UserError naming the line of the user's code that torch.export cannot follow.
    """
    wrapped = _OneInput(network, returned := _Returned())
    program = _exported(wrapped, example, type(network).__name__)
    if views_are_written(program.graph):
        with quiet():
            program = program.run_decompositions({})
    module: Any = program.module(check_guards=False)
    return Translation(module, "network.", network).run(returned.with_outputs)


def exported(network: nn.Module, example: Tensor, name: str) -> ExportedProgram:
    """A network in evaluation mode as torch's own program of it, for any number of images: what torch.export.save
    writes. UserError as `in_standard_terms` has it.

    It says nothing of where it was made: no lines of files, and classes of the user's without the number that their
    module has in this process.
    """
    program = _exported(network, example, name)
    for graph in (module.graph for module in program.graph_module.modules() if isinstance(module, fx.GraphModule)):
        for node in graph.nodes:
            node.meta.pop("stack_trace", None)
            if stack := node.meta.get("nn_module_stack"):
                node.meta["nn_module_stack"] = {key: (path, _anywhere(kind)) for key, (path, kind) in stack.items()}
    return program


def _anywhere(kind: type | str) -> str:
    named = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return name_anywhere(named)


class _Returned:
    """What holds the outputs of a network. Beside the module: torch puts back what an export changes in one."""

    structure: Any = None

    def with_outputs(self, outputs: list[Any]) -> Any:
        return _filled(self.structure, outputs)


class _OneInput(nn.Module):
    """`network` as a function of images alone, that returns a list of tensors, whatever holds them."""

    def __init__(self, network: nn.Module, returned: _Returned) -> None:
        super().__init__()
        self.network = network
        self._returned = returned

    def forward(self, x: Tensor) -> list[Tensor]:
        found: list[Any] = []
        self._returned.structure = _structure(self.network(x), found)
        return found


class _Place(int):
    """Where a tensor is among the outputs."""


def _structure(value: Any, found: list[Any]) -> Any:
    if is_named_tuple(value):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: _structure(entry, found) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_structure(entry, found) for entry in value])
    if not isinstance(value, Tensor | torch.SymInt):
        return value
    found.append(value)
    return _Place(len(found) - 1)


def _filled(structure: Any, outputs: list[Any]) -> Any:
    if isinstance(structure, dict):
        return {key: _filled(entry, outputs) for key, entry in structure.items()}
    if isinstance(structure, list | tuple):
        return type(structure)([_filled(entry, outputs) for entry in structure])
    return outputs[structure] if isinstance(structure, _Place) else structure


_IMAGES = 7
"""With how many a network is captured: unlike the number of an earlier run, which detectors remember and compare."""


def _exported(wrapped: nn.Module, example: Tensor, name: str) -> ExportedProgram:
    shapes = ({0: Dim.DYNAMIC},)
    images = example.new_zeros(_IMAGES, *example.shape[1:])
    try:
        with slow(f"capturing {name}"), torch.no_grad(), quiet(), _lengths_are_sizes(wrapped):
            return torch.export.export(wrapped, (images,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # whatever the user's forward raises, and all that torch cannot follow
        raise UserError(_sentence(name, error)) from error


@contextmanager
def _lengths_are_sizes(network: nn.Module) -> Iterator[None]:
    """Lets len(x) in the files of the network's forwards be the first size of a tensor, whatever it is: Python takes
    nothing but an int from __len__. Not in all of Python: what is imported meanwhile would keep it."""

    def first_size(value: Any) -> Any:
        return value.shape[0] if isinstance(value, Tensor) else len(value)

    forwards = (inspect.unwrap(type(module).forward) for module in network.modules())
    files: list[dict[str, Any]] = [forward.__globals__ for forward in forwards if isinstance(forward, FunctionType)]
    changed = []
    for file in files:
        if "len" not in file and not str(file.get("__name__", "")).startswith(("torch.", "faqd.")):
            file["len"] = first_size
            changed.append(file)
    try:
        yield
    finally:
        for file in changed:
            del file["len"]


def _sentence(name: str, error: Exception) -> str:
    line = _line_that_raised(error)
    kind = type(error).__name__
    if kind == "GuardOnDataDependentSymNode" or "data-dependent" in str(error):
        return (
            f"{name}: its forward cannot be captured as a graph: it asks for values of a tensor{line}, in a test, a "
            "loop or a number. What is computed must be the same for every image: move control flow that depends on "
            "values out of forward."
        )
    if "Constraints violated" in str(error) or kind == "ConstraintViolationError":
        return (
            f"{name}: its forward holds for one number of images alone{line}: it takes the size of the first axis for "
            "a number, as x.reshape(2, -1), int(x.shape[0]) or a parameter with a value for each of two images do. "
            "Write -1 or x.shape[0] there."
        )
    return (
        f"{name}: its forward cannot be captured as a graph, with {_IMAGES} images for any number of them: "
        f"{first_line(error.__cause__ or error) or kind}{line}."
    )


def _line_that_raised(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return innermost([(frame.filename, frame.lineno or 0) for frame in frames])


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch logs, prints and warns of on the way; what stops it is an exception."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


# A program of the user's own ---------------------------------------------------------------------------------------


def is_exported(built: Any) -> bool:
    """Whether `built` is torch.export's program, or the module that torch makes of one."""
    return isinstance(built, ExportedProgram) or (isinstance(built, fx.GraphModule) and hasattr(built, _GUARDS))


def as_plain_modules(built: Any) -> fx.GraphModule:
    """`built` as a network that can be captured, in evaluation mode or training like any other.

    UserError where it was exported in training mode, whose statistics and random numbers its operators keep.
    """
    with quiet():
        program: Any = copy.deepcopy(built.module(check_guards=False) if isinstance(built, ExportedProgram) else built)
    for node in program.graph.nodes:
        if word_of(node) in _OF_TRAINING and True in node.args[2:6]:
            raise UserError(
                f"{node.name}: the exported program is one in training mode; export the network after network.eval()."
            )
    structure = program.graph._codegen.pytree_info.out_spec
    return Translation(program, "", None).run(lambda outputs: tree_unflatten(outputs, structure))


_OF_TRAINING = ("batch_norm", "dropout", "feature_dropout")
