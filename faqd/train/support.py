"""What a captured network may contain: everything else is refused by its place and its line in the user's code."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from faqd.errors import UserError
from faqd.train import graph


def refuse_unknown(traced: fx.GraphModule) -> None:
    """UserError for the first node (shapes propagated) that would not be quantized exactly as it is written."""
    where = graph.places(traced)
    seen: set[str] = set()
    for node in traced.graph.nodes:
        problem = _problem(traced, node, seen)
        if problem:
            raise UserError(f"{where[node]}{graph.line_of_code(node)}: {problem}")
        seen.add(str(node.target))


def _problem(traced: fx.GraphModule, node: fx.Node, seen: set[str]) -> str | None:
    kind = graph.role(traced, node)
    if kind == "other" and graph.is_tensor(node):
        return (
            f"{_operator(traced, node)} cannot be quantized yet. Known are convolution, linear, batch norm, ReLU, max "
            "and average pooling, addition of two tensors, concatenation, flatten and dropout."
        )
    if kind == "add" and (len(_tensor_arguments(node)) != 2 or "alpha" in node.kwargs):
        return "only the plain sum of two tensors can be quantized yet, not one with a number or a factor."
    if kind in ("compute", "norm") and str(node.target) in seen:
        return "its weights are used twice, which cannot be quantized yet; give each use a module of its own."
    if kind == "compute":
        return _layer_problem(traced.get_submodule(str(node.target)), node)
    if kind == "norm" and getattr(traced.get_submodule(str(node.target)), "running_mean", None) is None:
        return "batch norm without running statistics (track_running_stats=False) cannot be folded."
    return None


def _layer_problem(layer: Any, node: fx.Node) -> str | None:
    if "weight" not in layer._parameters:
        return "its weight is computed (a parametrization such as weight norm); remove that before quantizing."
    if isinstance(layer, nn.Linear):
        dimensions = len(graph.shape(graph.operand(node)))
        return None if dimensions == 2 else f"a linear layer reads vectors (N, C); found {dimensions} dimensions."
    if layer.padding_mode != "zeros":
        return f"padding_mode={layer.padding_mode!r} cannot be quantized yet, only zeros."
    return None


def _tensor_arguments(node: fx.Node) -> list[Any]:
    given = [*node.args, *node.kwargs.values()]
    return [argument for argument in given if isinstance(argument, fx.Node) and graph.is_tensor(argument)]


def _operator(traced: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(traced.get_submodule(str(node.target))).__name__
    return getattr(node.target, "__name__", str(node.target))
