"""Capture of a user's network as a torch.fx graph, and what its nodes mean to the quantizer.

Every node has a place: the path of its module in the user's network, such as `stages.0.1.relu2`, or the path of
the enclosing module and the function's name, such as `stages.0.1.add`. Messages, tensor names and tables use it.
"""

from __future__ import annotations

import operator
import re
import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from faqd.errors import UserError

Role = Literal["input", "compute", "norm", "rectify", "average", "add", "concat", "reshape", "output", "other"]

COMPUTE = (nn.Conv1d, nn.Conv2d, nn.Linear)
NORM = (nn.BatchNorm1d, nn.BatchNorm2d)
_MODULES: dict[Role, tuple[type[nn.Module], ...]] = {
    "compute": COMPUTE,
    "norm": NORM,
    "rectify": (nn.ReLU,),
    "average": (nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    # Reshaping operators only move or drop values: codes pass through them unchanged.
    "reshape": (nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d),
}
_FUNCTIONS: dict[Role, tuple[Any, ...]] = {
    "rectify": (F.relu, torch.relu, F.relu_, torch.relu_),
    "average": (F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean),
    "add": (operator.add, operator.iadd, torch.add),
    "concat": (torch.cat, torch.concat),
    "reshape": (F.max_pool2d, F.adaptive_max_pool2d, torch.flatten, torch.reshape, F.dropout, F.dropout2d),
}
_METHODS: dict[Role, tuple[str, ...]] = {
    "rectify": ("relu", "relu_"),
    "average": ("mean",),
    "add": ("add", "add_"),
    "reshape": ("flatten", "view", "reshape", "contiguous", "squeeze", "unsqueeze"),
}
_IN_PLACE_FREE = {operator.iadd: operator.add, F.relu_: F.relu, torch.relu_: torch.relu}


def capture(network: nn.Module, example: Tensor) -> fx.GraphModule:
    """Trace `network` in evaluation mode and propagate shapes with `example` (N, C, H, W).

    Raises UserError naming the line of the user's code that cannot be captured.
    """
    network = network.eval()
    for module in network.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # a quantized tensor has several readers
    tracer = fx.Tracer()
    tracer.record_stack_traces = True
    try:
        graph = tracer.trace(network)
    except Exception as error:  # whatever the user's forward raises under tracing
        raise UserError(
            f"{type(network).__name__}: its forward cannot be captured as a graph: {_first_line(error)}. "
            "Control flow that depends on tensor values is the usual cause; move it out of forward."
        ) from error
    traced = fx.GraphModule(network, graph)
    for node in traced.graph.nodes:
        node.target = _IN_PLACE_FREE.get(node.target, node.target)
        if node.op == "call_method" and node.target in ("add_", "relu_"):
            node.target = node.target[:-1]
    traced.recompile()
    propagate(traced, example)
    return traced


def propagate(traced: fx.GraphModule, example: Tensor) -> None:
    """Write each node's shape into its meta data."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            ShapeProp(traced).propagate(example)
        except RuntimeError as error:
            raise UserError(
                f"the network does not accept an input of shape {tuple(example.shape)}: {_first_line(error)}"
            ) from error


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


def places(traced: fx.GraphModule) -> dict[fx.Node, str]:
    """A unique place for every node; a module or function used again gets _1, _2 ... appended."""
    taken: dict[str, int] = {}
    found = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            name = str(node.target)
        else:
            stack = node.meta.get("nn_module_stack") or {}
            path = next((str(entry[0]) for entry in reversed(stack.values())), "")
            word = re.sub(r"_\d+$", "", node.name) if node.op != "placeholder" else str(node.target)
            name = f"{path}.{word}" if path else word
        count = taken.get(name, 0)
        taken[name] = count + 1
        found[node] = name if count == 0 else f"{name}_{count}"
    return found


def line_of_code(node: fx.Node) -> str:
    """Where the user's code calls this node: `file:line`, or nothing if unknown."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
    return f" ({found[-1][0]}:{found[-1][1]})" if found else ""


def with_taps(traced: fx.GraphModule, names: list[str]) -> fx.GraphModule:
    """A copy that returns (output, [tap, ...]) for the nodes of these names; it shares the parameters."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(traced.graph, copied)
    by_name = {node.name: new for node, new in copied.items()}
    graph.output((output, [by_name[name] for name in names]))
    return fx.GraphModule(traced, graph)
