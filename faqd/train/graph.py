"""Capture of a user's network as a torch.fx graph, and what its nodes mean to the quantizer.

Every node has a place: the path of its module in the user's network, such as `stages.0.1.relu2`, or the path of
the enclosing module and the function's name, such as `stages.0.1.add`. Messages, tensor names and tables use it.
"""

from __future__ import annotations

import operator
import re
import traceback
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils._pytree import tree_leaves

from faqd.errors import UserError

Role = Literal["input", "compute", "norm", "rectify", "average", "add", "concat", "reshape", "output", "other"]

COMPUTE = (nn.Conv1d, nn.Conv2d, nn.Linear)
NORM = (nn.BatchNorm1d, nn.BatchNorm2d)
IDLE_MODULES = (nn.Identity, nn.Dropout, nn.Dropout2d)
IDLE_FUNCTIONS = (F.dropout, F.dropout2d)
"""What does nothing in evaluation mode; `capture` refuses dropout that stays on there."""
_MODULES: dict[Role, tuple[type[nn.Module], ...]] = {
    "compute": COMPUTE,
    "norm": NORM,
    "rectify": (nn.ReLU,),
    "average": (nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    # Reshaping operators only move or drop values: codes pass through them unchanged.
    "reshape": (nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, *IDLE_MODULES),
}
_FUNCTIONS: dict[Role, tuple[Any, ...]] = {
    "rectify": (F.relu, torch.relu, F.relu_, torch.relu_),
    "average": (F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean),
    "add": (operator.add, operator.iadd, torch.add),
    "concat": (torch.cat, torch.concat),
    "reshape": (F.max_pool2d, F.adaptive_max_pool2d, torch.flatten, torch.reshape, *IDLE_FUNCTIONS),
}
_METHODS: dict[Role, tuple[str, ...]] = {
    "rectify": ("relu", "relu_"),
    "average": ("mean",),
    "add": ("add", "add_"),
    "reshape": ("flatten", "view", "reshape", "contiguous", "squeeze", "unsqueeze"),
}
_TORCH = str(Path(torch.__file__).parent)
_IN_PLACE_FREE = {operator.iadd: operator.add, F.relu_: F.relu, torch.relu_: torch.relu}


def capture(network: nn.Module, example: Tensor) -> fx.GraphModule:
    """Trace `network` in evaluation mode and propagate shapes with `example` (N, C, H, W).

    The graph has no in-place operators: a quantized tensor has several readers. Raises UserError naming the line of
    the user's code that cannot be captured, and where the graph computes something else than the network.
    """
    network = network.eval()
    noise = torch.randn(example[:2].shape, generator=torch.Generator().manual_seed(0)).to(example)
    wanted = _outputs(network, noise)
    traced = _traced(network)
    if not all(map(_close, _outputs(traced, noise), wanted)):
        raise UserError(
            f"{type(network).__name__}: the captured graph computes something else than its forward. Usual causes: an "
            "in-place operator whose input is read again (ReLU(inplace=True) in front of a shortcut), or values drawn "
            "at random in evaluation mode (F.dropout without training=self.training)."
        )
    propagate(traced, example)
    return traced


def _traced(network: nn.Module) -> fx.GraphModule:
    for module in network.modules():
        if hasattr(module, "inplace"):
            setattr(module, "inplace", False)  # noqa: B010 - mypy takes every attribute of a module for a tensor
    tracer = fx.Tracer()
    tracer.record_stack_traces = True
    try:
        traced = fx.GraphModule(network, tracer.trace(network))
    except Exception as error:  # whatever the user's forward raises under tracing
        raise UserError(
            f"{type(network).__name__}: its forward cannot be captured as a graph: "
            f"{_first_line(error)}{_line_that_raised(error)}. "
            "Control flow that depends on tensor values is the usual cause; move it out of forward."
        ) from error
    for node in traced.graph.nodes:
        node.target = _IN_PLACE_FREE.get(node.target, node.target)
        if node.op == "call_method" and node.target in ("add_", "relu_"):
            node.target = node.target[:-1]
        if node.target is F.relu:
            node.args, node.kwargs = (operand(node),), {}  # without inplace=True
    traced.recompile()
    return traced


def _outputs(network: nn.Module, x: Tensor) -> list[Any]:
    """What `network` returns for a copy of `x`, tuples and dictionaries taken apart."""
    with torch.no_grad():
        try:
            return tree_leaves(network(x.clone()))
        except RuntimeError as error:
            raise UserError(
                f"the network does not accept an input of shape {tuple(x.shape)}: {_first_line(error)}"
            ) from error


def _close(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)


def propagate(traced: fx.GraphModule, example: Tensor) -> None:
    """Write each node's shape into its meta data."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        ShapeProp(traced).propagate(example)


def _first_line(error: BaseException) -> str:
    text = str(error.__cause__ or error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def role(traced: fx.GraphModule, node: fx.Node) -> Role:
    """What `node` does, in the quantizer's terms; `other` is an operator it does not know."""
    if node.op == "placeholder":
        return "input"
    if node.op == "output":
        return "output"
    if node.op == "call_module":
        return _look_up(_MODULES, lambda types: isinstance(traced.get_submodule(str(node.target)), types))
    if node.op == "call_method":
        return _look_up(_METHODS, lambda names: node.target in names)
    return _look_up(_FUNCTIONS, lambda functions: node.target in functions)


def _look_up(table: dict[Role, Any], holds: Any) -> Role:
    return next((name for name, entry in table.items() if holds(entry)), "other")


def is_tensor(node: fx.Node) -> bool:
    return "tensor_meta" in node.meta and hasattr(node.meta["tensor_meta"], "shape")


def shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["tensor_meta"].shape)


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    return [argument for argument in node.all_input_nodes if is_tensor(argument)]


def operand(node: fx.Node) -> fx.Node:
    """The tensor that an operator of one input reads, however the user passed it."""
    return node.all_input_nodes[0]


def read_instead(node: fx.Node, new: fx.Node) -> None:
    """Let every reader of `node` but `new` read `new`."""
    node.replace_all_uses_with(new, delete_user_cb=lambda reader: reader is not new)


def places(traced: fx.GraphModule) -> dict[fx.Node, str]:
    """A unique place for every node; a module or function used again gets _1, _2 ... appended."""
    own = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    taken = set(own)
    found = {}
    for node in traced.graph.nodes:
        place = _place(node)
        if node.op == "call_module" and place in own:
            own.remove(place)
        else:
            place = unused(place, taken)
        found[node] = place
    return found


def _place(node: fx.Node) -> str:
    if node.op in ("call_module", "placeholder"):
        return str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(entry[0]) for entry in reversed(stack.values())), "")
    word = re.sub(r"_\d+$", "", node.name)
    return f"{path}.{word}" if path else word


def unused(name: str, taken: set[str]) -> str:
    """`name`, or the first of name_1, name_2 ... that is not `taken`; it is taken from now on."""
    candidate, count = name, 1
    while candidate in taken:
        candidate, count = f"{name}_{count}", count + 1
    taken.add(candidate)
    return candidate


def line_of_code(node: fx.Node) -> str:
    """Where the user's code calls this node: ` (file:line)`, or nothing if unknown."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
    return _innermost([(file, int(line)) for file, line in frames])


def _line_that_raised(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return _innermost([(frame.filename, frame.lineno or 0) for frame in frames if frame.filename != __file__])


def _innermost(frames: list[tuple[str, int]]) -> str:
    """The last frame outside torch, as ` (file:line)`."""
    outside = [f"{file}:{line}" for file, line in frames if not file.startswith(_TORCH)]
    return f" ({outside[-1]})" if outside else ""


def with_taps(traced: fx.GraphModule, names: list[str]) -> fx.GraphModule:
    """A copy that returns (output, [tap, ...]) for the nodes of these names; it shares the parameters."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(traced.graph, copied)
    by_name = {node.name: new for node, new in copied.items()}
    graph.output((output, [by_name[name] for name in names]))
    return fx.GraphModule(traced, graph)
