"""A network that comes as torch.export's program: the same graph in torch's own functions and modules.

Its layers get the places that they had in the user's code, so that the keys of its state dict stay what they were.
"""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.utils._pytree import tree_unflatten

from faqd.errors import UserError
from faqd.quantize.capture.lift_parameters import layer_of

_GUARDS = "_guards_fn"
"""The module of torch's that holds an input against the shapes the program was exported with."""


def is_exported(built: Any) -> bool:
    """Whether `built` is such a program, or the module that torch makes of one."""
    return isinstance(built, ExportedProgram) or (isinstance(built, fx.GraphModule) and hasattr(built, _GUARDS))


def as_plain_modules(built: Any) -> fx.GraphModule:
    """`built` as a network that can be captured, in evaluation mode or training like any other.

    UserError where it was exported in training mode, whose statistics and random numbers its operators keep.
    """
    exported = copy.deepcopy(built.module() if isinstance(built, ExportedProgram) else built)
    traced = fx.GraphModule(exported, exported.graph)
    _with_the_users_outputs(traced.graph)
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and node.target == _GUARDS:
            traced.graph.erase_node(node)
        elif isinstance(node.target, OpOverload):
            _translate(node)
    for node in traced.graph.nodes:
        _as_module(traced, node)
    traced.graph.eliminate_dead_code()
    delattr(traced, _GUARDS)
    traced.recompile()
    return traced


def _with_the_users_outputs(program: fx.Graph) -> None:
    """Let the program take and return what the user's forward did; torch keeps that beside a graph of flat lists."""
    returned = program._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    (output,) = (node for node in program.nodes if node.op == "output")
    output.args = (tree_unflatten(list(output.args[0]), returned),)
    program.set_codegen(fx.graph.CodeGen())


def _translate(node: fx.Node) -> None:
    name = str(node.target._schema.name).partition("::")[2]  # type: ignore[union-attr]
    if name in ("batch_norm", "dropout", "feature_dropout") and True in node.args[2:6]:
        raise UserError(
            f"{node.name}: the exported program is one in training mode; export the network after network.eval()."
        )
    if name in _REWRITTEN:
        _REWRITTEN[name](node)
    elif name in _FUNCTIONAL:
        node.target = getattr(F, name)
    elif hasattr(torch, name):
        node.target = getattr(torch, name)
    elif hasattr(torch.Tensor, name):
        node.op, node.target = "call_method", name


_FUNCTIONAL = (
    *("relu", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "silu", "gelu", "hardswish", "hardsigmoid", "mish"),
    *("elu", "softplus", "pad", "dropout", "linear", "avg_pool1d", "avg_pool2d", "pixel_shuffle", "pixel_unshuffle"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d", "channel_shuffle"),
)
"""What torch.nn.functional has under the same name, with its arguments in the same order."""


def _slice(node: fx.Node) -> None:
    given: dict[str, Any] = dict(zip(("x", "axis", "start", "end", "step"), node.args, strict=False))
    end = given.get("end")
    wanted = slice(given.get("start"), None if end == sys.maxsize else end, given.get("step"))
    _index(node, given["x"], given.get("axis", 0), wanted)


def _select(node: fx.Node) -> None:
    _index(node, *node.args)


def _index(node: fx.Node, x: Any, axis: Any, index: Any) -> None:
    whole = (slice(None),) * (axis % x.meta["val"].dim())
    node.target, node.args = operator.getitem, (x, (*whole, index))


def _resize(mode: str) -> Callable[[fx.Node], None]:
    def rule(node: fx.Node) -> None:
        x, size, *rest = node.args
        aligned = {} if mode == "nearest" else {"align_corners": rest[0]}
        node.target, node.args = F.interpolate, (x, size, rest[-1], mode)
        node.kwargs = aligned

    return rule


def _size(node: fx.Node) -> None:
    node.op, node.target = "call_method", "size"


_REWRITTEN: dict[str, Callable[[fx.Node], None]] = {
    "slice": _slice,
    "select": _select,
    "sym_size": _size,
    "upsample_nearest2d": _resize("nearest"),
    "upsample_bilinear2d": _resize("bilinear"),
}


def _as_module(traced: fx.GraphModule, node: fx.Node) -> None:
    """Let a layer be the module that it was, where its weights alone lie at one place of the network."""
    held = [each for each in node.all_input_nodes if each.op == "get_attr"]
    places = {str(each.target).rpartition(".")[0] for each in held}
    if node.op != "call_function" or len(places) != 1:
        return
    (place,) = places
    layer = layer_of(traced, node, node.meta["val"].dim()) if place else None
    if layer is None:
        return
    there = traced.get_submodule(place)
    if not isinstance(there, type(layer)):  # else another use of it
        if there.state_dict().keys() != layer.state_dict().keys():
            return
        traced.set_submodule(place, layer)
    x = next(each for each in node.all_input_nodes if each not in held)
    node.op, node.target, node.args, node.kwargs = "call_module", place, (x,), {}
