"""What a captured network may contain, and what of it has no integer form: by its place and the user's line."""

from __future__ import annotations

import math

import torch
from torch import fx, nn

from faqd.errors import UserError
from faqd.quantize import nodes
from faqd.quantize.capture.aten import word_of
from faqd.quantize.operators.activation import CURVES
from faqd.quantize.operators.norm import NO_STATISTICS

KNOWN = (
    f"convolution, linear, batch norm, ReLU and its limited kin, {', '.join(kind.__name__ for kind in CURVES)}, "
    "pooling, resizing (nearest, bilinear), sums and products of two tensors or with a number or a parameter, "
    "concatenation, splitting, shuffling, reshaping and dropout"
)


def float_by_themselves(traced: fx.GraphModule, excluded: set[fx.Node], strict: bool) -> set[fx.Node]:
    """The nodes (shapes propagated) that have no integer form, beside those that are excluded.

    strict: UserError for the first of them, which names the places of the others. Always one for what no file can
    compute as the network does.
    """
    _refuse(traced, {node: why for node in traced.graph.nodes if (why := _refusal(traced, node))})
    left = (node for node in traced.graph.nodes if node not in excluded)
    problems = {node: problem for node in left if (problem := _problem(traced, node))}
    if strict:
        _refuse(traced, problems)
    return set(problems)


def _refuse(traced: fx.GraphModule, problems: dict[fx.Node, str]) -> None:
    if problems:
        where = nodes.places(traced)
        first, *others = problems
        more = f" So it is at {len(others)} more places: {_listed([where[node] for node in others])}." if others else ""
        raise UserError(f"{where[first]}{nodes.line_of_code(first)}: {problems[first]}{more}")


def _listed(places: list[str]) -> str:
    return ", ".join(places[:MOST_LISTED]) + (" ..." if len(places) > MOST_LISTED else "")


MOST_LISTED = 12


def _refusal(traced: fx.GraphModule, node: fx.Node) -> str | None:
    """What keeps a node from being in any file."""
    if "tensor_meta" not in node.meta or nodes.is_own(node):
        return None
    if nodes.role(traced, node) == "average" and nodes.shape(node)[:1] != nodes.shape(nodes.operand(node))[:1]:
        return "a mean over the batch axis mixes images: what one image gives would depend on the others beside it."
    if nodes.role(traced, node) == "other" and word_of(node) == "batch_norm":
        return NO_STATISTICS
    if (
        nodes.role(traced, node) == "other"
        and nodes.is_tensor(node)
        and node.meta["tensor_meta"].dtype in (torch.float16, torch.bfloat16)
    ):
        return "another type of numbers in the middle of a network cannot be proved: compute in float32 throughout."
    if nodes.role(traced, node) == "other" and (sentence := _misplaced(node)):
        return sentence
    row = nodes.row_of(traced, node)
    no_file = None if row is None or row.refusal is None else row.refusal(nodes.module_of(traced, node), node)
    return no_file or _uneven_windows(traced, node)


def _misplaced(node: fx.Node) -> str | None:
    """What torch does with pixels, or windows, that no ONNX operator does."""
    if word_of(node) in ("avg_pool1d", "avg_pool2d"):
        return "divisor_override with ceil_mode has no ONNX operator; scale the result of a plain average instead."
    return None


def _problem(traced: fx.GraphModule, node: fx.Node) -> str | None:
    """What keeps a node from being quantized exactly as it is written."""
    if "tensor_meta" not in node.meta or nodes.is_own(node):
        return None  # numbers, sizes and what is computed of parameters: whoever reads them is asked
    if nodes.role(traced, node) == "other":
        return _OF_OPERATORS.get(word_of(node)) or (
            f"{_operator(traced, node)} cannot be quantized yet. Known are {KNOWN}. --exclude with a regular "
            "expression that fits this path keeps it float."
        )
    row = nodes.row_of(traced, node)
    return None if row is None or row.problem is None else row.problem(nodes.module_of(traced, node), node)


def _uneven_windows(traced: fx.GraphModule, node: fx.Node) -> str | None:
    """Adaptive pooling that is neither global nor, in standard terms, ordinary pooling: it has no ONNX operator."""
    adaptive = isinstance(nodes.module_of(traced, node), _ADAPTIVE_MODULES)
    if not adaptive or math.prod(after := nodes.shape(node)[2:]) == 1:
        return None
    before = "x".join(map(str, nodes.shape(nodes.operand(node))[2:]))
    wanted = "x".join(map(str, after))
    return (
        f"adaptive pooling from {before} to {wanted} has windows of several sizes, which no ONNX operator has: choose "
        f"an --image-size at which one of {before} and {wanted} divides the other, or pool to another size."
    )


_ADAPTIVE_MODULES = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)


_COMPUTED = (
    "its weights are computed from the image, so they cannot be quantized once and for all; --exclude with a regular "
    "expression that fits this path keeps it float."
)
_OF_OPERATORS = {
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d"), _COMPUTED),
    "index": "indexing with a list of positions cannot be quantized yet; view and transpose, or nn.ChannelShuffle, "
    "shuffle channels.",
}
"""What is known of an operator that is nothing to the quantizer as it is written."""


def _operator(traced: fx.GraphModule, node: fx.Node) -> str:
    module = nodes.module_of(traced, node)
    return type(module).__name__ if module is not None else word_of(node)
