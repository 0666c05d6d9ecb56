"""A captured network in standard terms: one module for each way in which an activation or a resize can be written.

F.relu6, x.clamp(0, 6), nn.Hardtanh(0, 6) and nn.ReLU6 become one Clamp; x * torch.sigmoid(x) becomes SiLU. Nodes keep
their names, their places and their lines in the user's code.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from faqd.quantize import nodes
from faqd.quantize.capture.lift_parameters import join_constants, norm_of_constants, with_own_tensors
from faqd.quantize.capture.settle_sizes import crop, with_its_size, with_whole_windows
from faqd.quantize.operators.elementwise import Bilinear, Clamp, Nearest, Part, Rows, Scaled


def standardise(traced: fx.GraphModule) -> None:
    """Rewrite `traced` (shapes propagated) in place; what has no standard term stays as it is."""
    # What has weights keeps them together until it is deployed.
    nodes.unshare(traced, lambda module: not module.state_dict())
    names = nodes.places(traced)
    for node in list(traced.graph.nodes):
        if not nodes.is_tensor(node) or not node.op.startswith("call"):
            continue
        if _is_idle(node) or _is_broadcast(traced, node):
            node.replace_all_uses_with(nodes.operand(node))
            continue
        module = (
            _piece(traced, node)
            or with_own_tensors(traced, node)
            or with_its_size(traced, node)
            or with_whole_windows(traced, node)
            or _standard(traced, node)
        )
        if module is not None:
            _call(traced, node, names[node], module)
        crop(traced, node, names[node])
        join_constants(traced, node, names[node])
        if isinstance(nodes.module_of(traced, node), nn.Linear) and len(nodes.shape(node)) > 2:
            _on_rows(traced, node, names[node])
    for node in traced.graph.nodes:
        for join in (_hard_sigmoid, _gated, _divided_gate, _frozen_norm):
            join(traced, node)
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()


def _call(traced: fx.GraphModule, node: fx.Node, place: str, module: nn.Module) -> None:
    """Let `node` call `module` on its tensor, at `place`."""
    source = nodes.operand(node)
    if str(node.target) == place:
        traced.set_submodule(place, module)
    else:  # a function, or a second use of a module, which may mean another size there
        while place in {name for name, _ in traced.named_modules()}:
            place += "_"
        traced.add_submodule(place, module)
        if node.op == "call_module":
            node.meta.pop("nn_module_stack", None)  # names the shared module, and with it nodes of the exported file
    node.op, node.target, node.args, node.kwargs = "call_module", place, (source,), {}


def _is_idle(node: fx.Node) -> bool:
    """Whether nothing but memory comes of a method here."""
    if node.op != "call_method" or (len(_tensors(node)) != 1 and node.target != "type_as"):
        return False
    same_type = node.meta["tensor_meta"].dtype == nodes.operand(node).meta["tensor_meta"].dtype
    return node.target in ("clone", "detach") or (node.target in ("to", "float", "type_as", "cpu") and same_type)


def _is_broadcast(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a map is brought to the size of another that it then meets, which the sum or product does by itself."""
    if node.target not in _EXPANDS or nodes.is_own(node):
        return False
    before, after = nodes.shape(nodes.operand(node)), nodes.shape(node)
    if len(before) != len(after) or any(a not in (1, b) for a, b in zip(before, after, strict=True)):
        return False

    def has_another_of_that_size(reader: fx.Node) -> bool:
        others = [each for each in _tensors(reader) if each is not node]
        return nodes.role(traced, reader) in ("add", "multiply") and any(nodes.shape(each) == after for each in others)

    return bool(node.users) and all(map(has_another_of_that_size, node.users))


_EXPANDS = ("expand", "expand_as", "repeat", "broadcast_to", torch.broadcast_to)


def _on_rows(traced: fx.GraphModule, node: fx.Node, place: str) -> None:
    """A linear layer on vectors, whatever axes they stand in: one axis before it, all of them behind."""
    before = nodes.operand(node)
    for name, sizes in (("rows", nodes.shape(before)[-1:]), ("whole", nodes.shape(node)[1:])):
        traced.add_submodule(f"{place}_{name}", Rows(sizes))
    with traced.graph.inserting_before(node):
        rows = traced.graph.call_module(f"{place}_rows", (before,))
    with traced.graph.inserting_after(node):
        whole = traced.graph.call_module(f"{place}_whole", (node,))
    for new, like in ((rows, before), (whole, node)):
        new.meta, new.stack_trace = {"tensor_meta": like.meta["tensor_meta"]}, node.stack_trace
    node.args, node.kwargs = (rows,), {}
    nodes.read_instead(node, whole)


def _standard(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    if node.op == "call_module":
        return _of_module(traced.get_submodule(str(node.target)), node)
    if len(_tensors(node)) != 1:
        return None
    make = _FUNCTIONS.get(node.target) if node.op == "call_function" else _METHODS.get(str(node.target))
    return make(node) if make else None


def _piece(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """An element of what chunk or split returns, read from their operand; `node` then reads that."""
    if node.target is not operator.getitem or not isinstance(node.args[1], int):
        return None
    pieces, index = nodes.operand(node), node.args[1]
    if nodes.is_tensor(pieces) or pieces.target not in _SPLITS:
        return None
    axis = int(_given(pieces, 2, "dim", 0))
    lengths = [meta.shape[axis] for meta in pieces.meta["tensor_meta"]]
    index %= len(lengths)
    node.args = (nodes.operand(pieces), index)
    start = sum(lengths[:index])
    return Part(axis % len(nodes.shape(nodes.operand(pieces))), start, start + lengths[index])


_SPLITS = (torch.chunk, torch.split, "chunk", "split")


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [argument for argument in node.all_input_nodes if nodes.is_tensor(argument)]


def _of_module(module: Any, node: fx.Node) -> nn.Module | None:
    if isinstance(module, nn.ReLU6 | nn.Hardtanh):
        return Clamp(float(module.min_val), float(module.max_val))
    if isinstance(module, nn.ConstantPad2d) and not isinstance(module, nn.ZeroPad2d) and module.value == 0:
        return nn.ZeroPad2d(module.padding)
    if isinstance(module, nn.Upsample):
        return _resize(node, module.mode, module.scale_factor, bool(module.align_corners))
    return next((_windows(node, pool) for kind, pool in _ADAPTIVE.items() if isinstance(module, kind)), None)


_ADAPTIVE = {
    nn.AdaptiveAvgPool1d: nn.AvgPool1d,
    nn.AdaptiveAvgPool2d: nn.AvgPool2d,
    nn.AdaptiveMaxPool1d: nn.MaxPool1d,
    nn.AdaptiveMaxPool2d: nn.MaxPool2d,
}


# Functions and methods -------------------------------------------------------------------------------------------


def _given(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _limits(node: fx.Node) -> nn.Module | None:
    low, high = _given(node, 1, "min", None), _given(node, 2, "max", None)
    if low == 0 and high is None:
        return nn.ReLU()
    return Clamp(float(low), float(high)) if isinstance(low, int | float) and isinstance(high, int | float) else None


def _lower_limit(node: fx.Node) -> nn.Module | None:
    return nn.ReLU() if _given(node, 1, "min", None) == 0 else None


def _hard_tanh(node: fx.Node) -> nn.Module:
    return Clamp(float(_given(node, 1, "min_val", -1.0)), float(_given(node, 2, "max_val", 1.0)))


def _number(scaled: Callable[[float], Scaled], reversed_: Callable[[float], Scaled] | None) -> Any:
    """A rule for a binary operator of a tensor and a number; `reversed_` where the number stands first."""

    def rule(node: fx.Node) -> nn.Module | None:
        if len(node.args) != 2 or node.kwargs:
            return None
        first, second = node.args
        if isinstance(second, int | float):
            return scaled(float(second))
        return reversed_(float(first)) if isinstance(first, int | float) and reversed_ is not None else None

    return rule


_ADD = _number(lambda n: Scaled(1.0, n), lambda n: Scaled(1.0, n))
_SUB = _number(lambda n: Scaled(1.0, -n), lambda n: Scaled(-1.0, n))
_MUL = _number(lambda n: Scaled(n, 0.0), lambda n: Scaled(n, 0.0))
_DIV = _number(lambda n: Scaled(1.0 / n, 0.0), None)


def _interpolate(node: fx.Node) -> nn.Module | None:
    if _given(node, 6, "antialias", False):
        return None
    mode, factor = _given(node, 3, "mode", "nearest"), _given(node, 2, "scale_factor", None)
    return _resize(node, mode, factor, bool(_given(node, 4, "align_corners", False)))


def _resize(node: fx.Node, mode: str, factor: Any, align_corners: bool) -> nn.Module | None:
    """A resize whose ratio is that of the sizes: with any other, torch takes the pixels by a number no file has."""
    before, size = nodes.shape(nodes.operand(node))[2:], nodes.shape(node)[2:]
    factors = factor if isinstance(factor, tuple | list) else [factor] * len(size)
    if any(f is not None and b * f != a for b, f, a in zip(before, factors, size, strict=True)):
        return None
    if mode == "nearest" and not any(a % b for b, a in zip(before, size, strict=True)):
        return Nearest(before, size)
    return Bilinear(before, size, align_corners) if mode == "bilinear" else None


def _windows(node: fx.Node, pool: Any) -> nn.Module | None:
    """An adaptive pooling whose windows are all of one size, as ordinary pooling; where every window is one pixel, as
    the repetition that it is. A global average stays one."""
    before, after = nodes.shape(nodes.operand(node))[2:], nodes.shape(node)[2:]
    if math.prod(after) == 1 and issubclass(pool, nn.AvgPool1d | nn.AvgPool2d):
        return None
    if not any(a % b for b, a in zip(before, after, strict=True)):
        return nn.Identity() if before == after else Nearest(before, after)
    if any(b % a for b, a in zip(before, after, strict=True)):
        return None
    kernel = tuple(b // a for b, a in zip(before, after, strict=True))
    return pool(kernel, kernel)  # type: ignore[no-any-return]


def _leaky(node: fx.Node) -> nn.Module:
    return nn.LeakyReLU(float(_given(node, 1, "negative_slope", 0.01)))


_FUNCTIONS: dict[Any, Callable[[fx.Node], nn.Module | None]] = {
    F.relu6: lambda node: Clamp(0.0, 6.0),
    F.hardtanh: _hard_tanh,
    F.hardtanh_: _hard_tanh,
    torch.clamp_min: _lower_limit,
    torch.clamp: _limits,
    torch.clip: _limits,
    F.leaky_relu: _leaky,
    F.leaky_relu_: _leaky,
    F.silu: lambda node: nn.SiLU(),
    F.hardswish: lambda node: nn.Hardswish(),
    F.sigmoid: lambda node: nn.Sigmoid(),
    torch.sigmoid: lambda node: nn.Sigmoid(),
    F.hardsigmoid: lambda node: nn.Hardsigmoid(),
    F.gelu: lambda node: nn.GELU(_given(node, 1, "approximate", "none")),
    F.tanh: lambda node: nn.Tanh(),
    torch.tanh: lambda node: nn.Tanh(),
    operator.add: _ADD,
    torch.add: _ADD,
    operator.sub: _SUB,
    torch.sub: _SUB,
    operator.mul: _MUL,
    torch.mul: _MUL,
    operator.truediv: _DIV,
    torch.div: _DIV,
    operator.neg: lambda node: Scaled(-1.0, 0.0),
    torch.neg: lambda node: Scaled(-1.0, 0.0),
    F.interpolate: _interpolate,
    F.adaptive_avg_pool1d: lambda node: _windows(node, nn.AvgPool1d),
    F.adaptive_max_pool1d: lambda node: _windows(node, nn.MaxPool1d),
    F.adaptive_avg_pool2d: lambda node: _windows(node, nn.AvgPool2d),
    F.adaptive_max_pool2d: lambda node: _windows(node, nn.MaxPool2d),
}
_METHODS: dict[str, Callable[[fx.Node], nn.Module | None]] = {
    "clamp": _limits,
    "clip": _limits,
    "clamp_min": _lower_limit,
    "neg": lambda node: Scaled(-1.0, 0.0),
    "sigmoid": lambda node: nn.Sigmoid(),
    "tanh": lambda node: nn.Tanh(),
    "add": _ADD,
    "sub": _SUB,
    "mul": _MUL,
    "div": _DIV,
}


# Activations written out -----------------------------------------------------------------------------------------


def _is_scaled(module: nn.Module | None, factor: float, offset: float) -> bool:
    if not isinstance(module, Scaled) or not isinstance(module.factor, float) or not isinstance(module.offset, float):
        return False
    return math.isclose(module.factor, factor) and module.offset == offset


def _is_relu6_of_x_plus_3(traced: fx.GraphModule, node: Any) -> bool:
    clamp = nodes.module_of(traced, node)
    return (
        isinstance(clamp, Clamp)
        and (clamp.low, clamp.high) == (0.0, 6.0)
        and _is_scaled(nodes.module_of(traced, nodes.operand(node)), 1.0, 3.0)
    )


def _hard_sigmoid(traced: fx.GraphModule, node: fx.Node) -> None:
    """relu6(x + 3) / 6"""
    if _is_scaled(nodes.module_of(traced, node), 1 / 6, 0.0) and _is_relu6_of_x_plus_3(traced, nodes.operand(node)):
        traced.set_submodule(str(node.target), nn.Hardsigmoid())
        node.args = (nodes.operand(nodes.operand(nodes.operand(node))),)


def _gated(traced: fx.GraphModule, node: fx.Node) -> None:
    """x * sigmoid(x) and x * hardsigmoid(x)"""
    for x, gate in _factors(traced, node):
        module = nodes.module_of(traced, gate)
        if isinstance(module, nn.Sigmoid | nn.Hardsigmoid) and nodes.operand(gate) is x:
            new = nn.SiLU() if isinstance(module, nn.Sigmoid) else nn.Hardswish()
            place = nodes.places(traced)[node]
            node.args, node.kwargs = (x,), {}
            _call(traced, node, place, new)
            return


def _divided_gate(traced: fx.GraphModule, node: fx.Node) -> None:
    """x * relu6(x + 3) / 6"""
    if not _is_scaled(nodes.module_of(traced, node), 1 / 6, 0.0):
        return
    for x, gate in _factors(traced, nodes.operand(node)):
        if _is_relu6_of_x_plus_3(traced, gate) and nodes.operand(nodes.operand(gate)) is x:
            traced.set_submodule(str(node.target), nn.Hardswish())
            node.args = (x,)
            return


def _frozen_norm(traced: fx.GraphModule, node: fx.Node) -> None:
    """x * scale + shift behind a layer"""
    if isinstance(nodes.module_of(traced, node), Scaled) and (norm := norm_of_constants(traced, node)) is not None:
        traced.set_submodule(str(node.target), norm)


def _factors(traced: fx.GraphModule, node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The two tensors of a product, in both orders."""
    tensors = _tensors(node) if nodes.role(traced, node) == "multiply" else []
    return [(tensors[0], tensors[1]), (tensors[1], tensors[0])] if len(tensors) == 2 else []
