"""Capture of a user's network as a torch.fx graph in standard terms."""

from __future__ import annotations

import inspect
import operator
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from faqd.errors import UserError, first_line
from faqd.quantize.capture.spellings import SAME, written_out
from faqd.quantize.capture.standardize import standardise
from faqd.quantize.nodes import innermost, operand, propagate
from faqd.quantize.outputs import is_named_tuple, named_outputs

_IN_PLACE_FREE = {
    operator.iadd: operator.add,
    operator.imul: operator.mul,
    F.relu_: F.relu,
    torch.relu_: torch.relu,
}


def capture(network: nn.Module, example: Tensor) -> fx.GraphModule:
    """Trace `network` in evaluation mode and propagate shapes with `example` (N, C, H, W).

    The graph has no in-place operators: a quantized tensor has several readers. Raises UserError naming the line of
    the user's code that cannot be captured, and where the graph computes something else than the network.
    """
    _refuse_scripts(network)
    network = network.eval()
    noise = torch.randn(example[:2].shape, generator=torch.Generator().manual_seed(0)).to(example)
    wanted = _outputs(network, noise)
    if not _equal(_outputs(network, noise), wanted):
        raise UserError(
            f"{type(network).__name__}: returns something else each time for the same images: it draws random numbers "
            "in evaluation mode, as F.dropout without training=self.training or torch.rand do. Draw none there."
        )
    traced = _traced(network)
    try:
        propagate(traced, example)
        standardise(traced)
        propagate(traced, example)
    except RuntimeError as error:  # what torch raises where sizes do not meet
        raise UserError(
            f"{type(network).__name__}: its forward was captured for one path through it, and that cannot be run on "
            f"images of shape {tuple(example.shape)}: {first_line(error.__cause__ or error)}. Control flow that "
            "depends on sizes or values is the usual cause; move it out of forward."
        ) from error
    found = _outputs(traced, noise)
    if not _equal(found, wanted):
        pairs = [(a, b) for a, b in zip(found, wanted, strict=False) if isinstance(a, Tensor) and isinstance(b, Tensor)]
        kinds = [f"{_kind(b)} and not {_kind(a)}" for a, b in pairs if a.dtype != b.dtype]
        cause = (
            f"it returns {kinds[0]}, as under autocast or from numbers of that type. Compute in float32 throughout."
            if kinds
            else "the usual cause is an in-place operator whose input is read again, such as ReLU(inplace=True) in "
            "front of a shortcut."
        )
        raise UserError(
            f"{type(network).__name__}: the captured graph computes something else than its forward: {cause}"
        )
    return traced


def _refuse_scripts(network: nn.Module) -> None:
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(
                f"{name or type(network).__name__}: a TorchScript module has no Python forward to capture. Build the "
                "network from its classes and give the weights of the script: torch.jit.load(...).state_dict()."
            )


def _equal(found: list[Any], wanted: list[Any]) -> bool:
    return len(found) == len(wanted) and all(map(_close, found, wanted))


def _traced(network: nn.Module) -> fx.GraphModule:
    for module in network.modules():
        if hasattr(module, "inplace"):
            setattr(module, "inplace", False)  # noqa: B010 - mypy takes every attribute of a module for a tensor
    try:
        traced = _graph_of(network)
    except Exception as error:  # whatever the user's forward raises under tracing
        # Of tests, loops and numbers that are made of tensors; what else may be wrong, the error says.
        cause = " Control flow that depends on tensor values or sizes is the usual cause; move it out of forward."
        of_tensors = isinstance(error, fx.proxy.TraceError) or "Proxy" in str(error)
        raise UserError(
            f"{type(network).__name__}: its forward cannot be captured as a graph: "
            f"{first_line(error.__cause__ or error)}{_line_that_raised(error)}."
            f"{cause * of_tensors}"
        ) from error
    for node in traced.graph.nodes:
        node.target = _IN_PLACE_FREE.get(node.target, node.target)
        if node.op == "call_method" and node.target in _IN_PLACE:
            node.target = node.target[:-1]
        if node.op == "call_method" and node.target == "view" and not isinstance(node.args[1], torch.dtype):
            node.target = "reshape"  # in channels-last memory, where a student is trained, no view has all its channels
        if node.target is F.relu:
            node.args, node.kwargs = (operand(node),), {}  # without inplace=True
        if _hands_on(node):
            node.replace_all_uses_with(operand(node))
            traced.graph.erase_node(node)
    traced.recompile()
    return traced


def _graph_of(network: nn.Module) -> fx.GraphModule:
    """The network as a graph. A buffer is its values, by which a forward may choose its way; where that cannot be,
    since it meets sizes of other nodes, a node."""
    failed: list[Exception] = []
    for traces_buffers in (False, True):
        tracer = _Tracer()
        tracer.record_stack_traces = True
        tracer.proxy_buffer_attributes = traces_buffers
        try:
            with warnings.catch_warnings(), _lengths_of_proxies(network), _own_forward(network), _norms_unchecked():
                warnings.simplefilter("ignore")  # of defaults that fx cannot assert to be what they are
                return fx.GraphModule(network, _with_one_input(tracer.trace(network, _defaults(network))))
        except Exception as error:  # whatever the user's forward raises
            failed.append(error)
    raise failed[0]


@contextmanager
def _lengths_of_proxies(network: nn.Module) -> Iterator[None]:
    """Lets len(x) in the files of the network's forwards be the first size of what stands for a tensor: Python takes
    nothing but an int from __len__. Not in all of Python: what is imported meanwhile would keep it."""

    def first_size(value: Any) -> Any:
        stands_in = isinstance(value, fx.Proxy) and not isinstance(value, _Pieces)
        return value.size(0) if stands_in else len(value)

    forwards = (inspect.unwrap(type(module).forward) for module in network.modules())
    files: list[dict[str, Any]] = [forward.__globals__ for forward in forwards if isinstance(forward, FunctionType)]
    changed = []
    for file in files:
        if "len" not in file and not str(file.get("__name__", "")).startswith("torch."):
            file["len"] = first_size
            changed.append(file)
    try:
        yield
    finally:
        for file in changed:
            del file["len"]


@contextmanager
def _own_forward(network: nn.Module) -> Iterator[None]:
    """Lets a forward be traced that was assigned to the network itself, as fused detectors do."""
    own, kind = vars(network).get("forward"), type(network)
    if own is not None:
        network.__class__ = type(kind.__name__, (kind,), {"forward": lambda self, x: own(x)})
    try:
        yield
    finally:
        network.__class__ = kind


@contextmanager
def _norms_unchecked() -> Iterator[None]:
    """Lets a forward of a batch norm be traced that calls torch's, whose test of the dimensions asks for values."""
    kinds: list[Any] = [nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm]
    checks = [kind._check_input_dim for kind in kinds]
    for kind in kinds:
        setattr(kind, _CHECK, lambda self, x: None)
    try:
        yield
    finally:
        for kind, check in zip(kinds, checks, strict=True):
            setattr(kind, _CHECK, check)


_CHECK = "_check_input_dim"
_IN_PLACE = ("add_", "sub_", "mul_", "div_", "relu_", "sigmoid_", "tanh_", "clamp_", "clamp_min_")


class _Tracer(fx.Tracer):
    """Knows how many pieces come of chunk and split, so that forward may iterate over them, and other words for what
    the quantizer knows."""

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        spelled = None
        if kind in ("call_function", "call_method"):
            target = SAME.get(target, target)
            spelled = written_out(target, args, kwargs)
        return spelled() if spelled is not None else super().create_proxy(kind, target, args, kwargs, *rest, **more)

    def create_arg(self, a: Any) -> Any:
        # A named tuple would be a call of its class: what is returned has the names of its fields.
        return super().create_arg(a._asdict() if is_named_tuple(a) else a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return super().proxy(node) if _pieces(node) is None else _Pieces(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return iter([obj[index] for index in range(len(obj))]) if isinstance(obj, _Pieces) else super().iter(obj)


class _Pieces(fx.Proxy):
    """What chunk or split returned."""

    def __len__(self) -> int:
        return _pieces(self.node) or 0

    def __getitem__(self, index: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})


def _pieces(node: fx.Node) -> int | None:
    """How many there are, where the call says it."""
    asked = [*node.args[1:2], *(node.kwargs.get(name) for name in ("chunks", "split_size_or_sections"))]
    first = next((value for value in asked if value is not None), None)
    if node.target in (torch.chunk, "chunk"):
        return first if isinstance(first, int) else None
    return len(first) if node.target in (torch.split, "split") and isinstance(first, list | tuple) else None


def _defaults(network: nn.Module) -> dict[str, Any]:
    """The arguments of forward that are left to their defaults: an image is all that a deployed network is given."""
    if "forward" in vars(network):  # it is traced as a function of an image, with its own defaults
        return {}
    parameters = inspect.signature(network.forward).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def _with_one_input(traced: fx.Graph) -> fx.Graph:
    """Without what fx notes of arguments with a fixed value: an input each, and assertions that it has that value."""
    _, *fixed = (node for node in traced.nodes if node.op == "placeholder")
    noted = set(fixed)
    for node in traced.nodes:
        if node.op == "call_function" and noted.intersection(node.all_input_nodes):
            noted.add(node)
    for node in reversed(list(traced.nodes)):
        if node in noted:
            traced.erase_node(node)
    traced.set_codegen(fx.graph.CodeGen())
    return traced


def _hands_on(node: fx.Node) -> bool:
    """Whether a function that is kept whole (torch.fx.wrap), such as stochastic depth in evaluation mode, returns its
    tensor itself: it is called with a stand-in that has no values, so what holds for that holds for all."""
    function = node.target
    if not isinstance(function, FunctionType) or function.__module__.startswith("torch."):
        return False
    tensors = node.all_input_nodes
    if node.op != "call_function" or len(tensors) != 1:
        return False
    stand_in: Any = fx.Proxy(fx.Graph().placeholder("x"))
    arguments = [stand_in if argument in tensors else argument for argument in node.args]
    named = {name: stand_in if argument in tensors else argument for name, argument in node.kwargs.items()}
    try:
        return bool(function(*arguments, **named) is stand_in)
    except Exception:  # it asks for values, or for anything else that a stand-in has not
        return False


def _outputs(network: nn.Module, x: Tensor) -> list[Any]:
    """What `network` returns for a copy of `x`, tuples and dictionaries taken apart."""
    with torch.no_grad():
        try:
            return list(named_outputs(network(x.clone())).values())
        # Whatever the user's forward raises; SystemExit is what sys.exit does there.
        except (Exception, SystemExit) as error:
            cause = error.__cause__ or error
            raise UserError(
                f"the network does not accept one input of shape {tuple(x.shape)} and nothing else: "
                f"{first_line(cause) or type(cause).__name__}"
            ) from error


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _close(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    same_kind = a.shape == b.shape and a.dtype == b.dtype
    return same_kind and torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)


def _line_that_raised(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return innermost([(frame.filename, frame.lineno or 0) for frame in frames])
