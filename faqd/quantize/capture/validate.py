"""What a captured network may contain: everything else is refused by its place and its line in the user's code."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from faqd.errors import UserError
from faqd.quantize import nodes

KNOWN = (
    "convolution, linear, batch norm, ReLU and its limited kin, LeakyReLU, PReLU, SiLU, Hardswish, Sigmoid, "
    "Hardsigmoid, GELU, Tanh, pooling, resizing (nearest, bilinear), sums and products of two tensors or with a number "
    "or a parameter, concatenation, splitting, shuffling, reshaping and dropout"
)


def refuse_unknown(traced: fx.GraphModule, excluded: set[fx.Node]) -> None:
    """UserError for the first node (shapes propagated) that would not be quantized exactly as it is written; it names
    the places of the others."""
    where = nodes.places(traced)
    problems = {
        node: problem
        for node in traced.graph.nodes
        if (problem := _uneven_windows(traced, node) or (None if node in excluded else _problem(traced, node)))
    }
    if problems:
        first, *others = problems
        more = f" So it is at {len(others)} more places: {_listed([where[node] for node in others])}." if others else ""
        raise UserError(f"{where[first]}{nodes.line_of_code(first)}: {problems[first]}{more}")


def _listed(places: list[str]) -> str:
    return ", ".join(places[:MOST_LISTED]) + (" ..." if len(places) > MOST_LISTED else "")


MOST_LISTED = 12


def _problem(traced: fx.GraphModule, node: fx.Node) -> str | None:
    kind = nodes.role(traced, node)
    if "tensor_meta" not in node.meta or node.op == "get_attr":
        return None  # numbers, sizes and parameters: whoever reads them is asked
    if kind == "other":
        return (
            f"{_operator(traced, node)} cannot be quantized yet. Known are {KNOWN}. --exclude with a regular "
            "expression that fits this place keeps it float."
        )
    if kind in ("add", "multiply"):
        return _arithmetic_problem(node)
    if kind == "compute":
        return _layer_problem(traced.get_submodule(str(node.target)), node)
    if kind == "norm" and getattr(traced.get_submodule(str(node.target)), "running_mean", None) is None:
        return "batch norm without running statistics (track_running_stats=False) cannot be folded."
    if kind == "reshape" and _argument(node, "mode", 2) in ("circular",):
        return "circular padding has no ONNX operator yet; use zeros, reflect or replicate."
    if kind == "reshape" and node.target is F.pad and _argument(node, "value", 3) not in (None, 0, 0.0):
        return "padding with another number than zero would not lie on the grid of the padded tensor."
    if kind == "average" and nodes.shape(node)[:1] != nodes.shape(nodes.operand(node))[:1]:
        return "a mean over the batch axis mixes images: what one image gives would depend on the others beside it."
    if node.target is operator.getitem and _picks(node):
        return (
            "indexing with a list of places cannot be quantized yet; view and transpose, or nn.ChannelShuffle, shuffle "
            "channels."
        )
    if kind == "average" and _divisor(traced, node):
        return "divisor_override has no ONNX operator; scale the result of a plain average instead."
    return None


def _arithmetic_problem(node: fx.Node) -> str | None:
    tensors = _tensor_arguments(node)
    if len(tensors) != 2:
        return (
            "only the sum or product of two tensors can be quantized yet; --exclude with a regular expression that "
            "fits this place keeps it float."
        )
    if any(tensor.op == "get_attr" for tensor in tensors):
        return (
            "a parameter that makes the other operand larger, or that differs between images, cannot be quantized "
            "yet; --exclude with a regular expression that fits this place keeps the operator float."
        )
    return None


def _uneven_windows(traced: fx.GraphModule, node: fx.Node) -> str | None:
    """Adaptive pooling that is neither global nor, in standard terms, ordinary pooling: it has no ONNX operator."""
    adaptive = isinstance(nodes.module_of(traced, node), _ADAPTIVE_MODULES) or node.target in _ADAPTIVE_FUNCTIONS
    if not adaptive or math.prod(after := nodes.shape(node)[2:]) == 1:
        return None
    before = "x".join(map(str, nodes.shape(nodes.operand(node))[2:]))
    wanted = "x".join(map(str, after))
    return (
        f"adaptive pooling from {before} to {wanted} has windows of several sizes, which no ONNX operator has: choose "
        f"an --image-size at which one of {before} and {wanted} divides the other, or pool to another size."
    )


_ADAPTIVE_MODULES = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)
_ADAPTIVE_FUNCTIONS = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_max_pool1d, F.adaptive_max_pool2d)


def _divisor(traced: fx.GraphModule, node: fx.Node) -> Any:
    module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
    given = node.args[6] if node.target is F.avg_pool2d and len(node.args) > 6 else node.kwargs.get("divisor_override")
    return getattr(module, "divisor_override", None) or given


def _picks(node: fx.Node) -> bool:
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return any(isinstance(part, list | fx.Node) for part in index)


def _argument(node: fx.Node, name: str, index: int) -> Any:
    if node.target is not F.pad:
        return None
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


def _layer_problem(layer: Any, node: fx.Node) -> str | None:
    if "weight" not in layer._parameters:
        return "its weight is computed (a parametrization such as weight norm); remove that before quantizing."
    if isinstance(layer, nn.Linear):
        return None
    if layer.padding_mode != "zeros":
        return f"padding_mode={layer.padding_mode!r} cannot be quantized yet, only zeros."
    if isinstance(layer, nodes.TRANSPOSED) and layer.groups > 1:
        return "a transposed convolution with groups cannot be quantized yet; --exclude keeps it float."
    return None


def _tensor_arguments(node: fx.Node) -> list[Any]:
    given = [*node.args, *node.kwargs.values()]
    return [argument for argument in given if isinstance(argument, fx.Node) and nodes.is_tensor(argument)]


def _operator(traced: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(traced.get_submodule(str(node.target))).__name__
    return getattr(node.target, "__name__", str(node.target))
