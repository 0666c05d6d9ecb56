"""Operators that a network writes out, as older ONNX files do: GELU by erf, layer norm by mean, square and root.

Each is found at its last node, which then calls torch's own module on what the whole of it reads.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from faqd.quantize import nodes
from faqd.quantize.operators.arithmetic import Scaled

aten = torch.ops.aten
_QUOTIENTS = (operator.truediv, aten.div.Tensor)
_NEAR = 1e-6
"""A number that a file has in float32 is this near to what it was."""


def is_near(value: Any, wanted: float) -> bool:
    return isinstance(value, float) and math.isclose(value, wanted, rel_tol=_NEAR)


def _is_number(value: Any, wanted: float) -> bool:
    return not isinstance(value, Tensor) and bool(value == wanted)


def written_out(traced: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, nn.Module] | None:
    """What `node` is the end of: the tensor that is read and the module that reads it."""
    return _gelu(traced, node) or _layer_norm(traced, node)


# GELU -------------------------------------------------------------------------------------------------------------


def _gelu(traced: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, nn.Module] | None:
    """x * (1 + erf(x / sqrt(2))) / 2, in whatever order"""
    tensors, number = _product(traced, node)
    if len(tensors) != 2 or not is_near(number, 0.5):
        return None
    for x, gate in (tensors, tensors[::-1]):
        erf = _scaled(traced, gate, 1.0, 1.0)
        if erf is None or erf.target is not aten.erf.default:
            continue
        if _scaled(traced, nodes.operand(erf), math.sqrt(0.5), 0.0) is x:
            return x, nn.GELU()
    return None


def _product(traced: fx.GraphModule, node: fx.Node, depth: int = 3) -> tuple[list[fx.Node], float]:
    """The tensors and the number that a product is made of; what others read as well is a factor as it is."""
    scaled = nodes.module_of(traced, node)
    if isinstance(scaled, Scaled) and isinstance(scaled.factor, float) and _is_number(scaled.offset, 0.0):
        tensors, number = _product(traced, nodes.operand(node), depth - 1) if depth else ([nodes.operand(node)], 1.0)
        return tensors, number * scaled.factor
    if nodes.role(traced, node) == "multiply" and len(node.all_input_nodes) == 2 and depth:
        parts = [_product(traced, each, depth - 1) for each in node.all_input_nodes]
        return [tensor for part in parts for tensor in part[0]], math.prod(part[1] for part in parts)
    return [node], 1.0


def _scaled(traced: fx.GraphModule, node: fx.Node, factor: float, offset: float) -> fx.Node | None:
    """What `node` is that line of; None where it is another."""
    module = nodes.module_of(traced, node)
    if not isinstance(module, Scaled) or not _is_number(module.offset, offset):
        return None
    return nodes.operand(node) if is_near(module.factor, factor) else None


# Layer norm -------------------------------------------------------------------------------------------------------


def _layer_norm(traced: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, nn.Module] | None:
    """(x - mean) / sqrt(mean of the squares of that + eps), times a weight, plus a bias, over the last axis"""
    size = nodes.shape(node)[-1] if nodes.shape(node) else 0
    quotient, weight, bias = node, None, None
    if (found := _of_channels(traced, quotient, "offset", size)) is not None:
        bias, quotient = found, nodes.operand(quotient)
    if (found := _of_channels(traced, quotient, "factor", size)) is not None:
        weight, quotient = found, nodes.operand(quotient)
    if quotient.target not in _QUOTIENTS or _goes_on(traced, node, size, weight, bias):
        return None
    difference, root = quotient.all_input_nodes if len(quotient.all_input_nodes) == 2 else (None, None)
    if difference is None or root is None or root.target is not aten.sqrt.default:
        return None
    plus = nodes.module_of(traced, nodes.operand(root))
    if not isinstance(plus, Scaled) or not _is_number(plus.factor, 1.0) or not isinstance(plus.offset, float):
        return None
    squares = _averaged(nodes.operand(nodes.operand(root)))
    if squares is None or nodes.role(traced, squares) != "multiply" or squares.all_input_nodes != [difference]:
        return None
    if difference.target not in (operator.sub, aten.sub.Tensor) or len(difference.all_input_nodes) != 2:
        return None
    x, mean = difference.all_input_nodes
    if _averaged(mean) is not x:
        return None
    if weight is None and bias is not None:
        return None
    layer = nn.LayerNorm(size, plus.offset, elementwise_affine=weight is not None, bias=bias is not None)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            setattr(layer, name, value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach().clone()))
    return x, layer


def _goes_on(traced: fx.GraphModule, node: fx.Node, size: int, weight: Any, bias: Any) -> bool:
    """Whether the norm's own weight or bias is still to come behind a node."""
    if bias is not None:
        return False
    part = "factor" if weight is None else "offset"
    return any(_of_channels(traced, reader, part, size) is not None for reader in node.users)


def _of_channels(traced: fx.GraphModule, node: fx.Node, part: str, size: int) -> Tensor | None:
    """The factor or the offset of `node`, one number for each of the last axis; None where it does anything else."""
    module = nodes.module_of(traced, node)
    if not isinstance(module, Scaled):
        return None
    value, other = (module.factor, module.offset) if part == "factor" else (module.offset, module.factor)
    neutral = _is_number(other, 0.0 if part == "factor" else 1.0)
    return value if neutral and isinstance(value, Tensor) and tuple(value.shape) == (size,) else None


def _averaged(node: Any) -> fx.Node | None:
    """What a mean over the last axis, which stays, is taken of."""
    if not isinstance(node, fx.Node) or node.target is not torch.mean or len(node.args) < 2:
        return None
    x, axes = node.args[:2]
    keep = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
    rank = len(nodes.shape(node))
    last = axes in ((-1,), [-1], -1, (rank - 1,), [rank - 1], rank - 1)
    return x if keep and last and isinstance(x, fx.Node) else None
