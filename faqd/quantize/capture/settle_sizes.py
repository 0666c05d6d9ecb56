"""Operators whose sizes torch settles when they run, in terms that every runtime has: sizes settled, at capture.

A transposed convolution that was told its output size gets the output padding that the size implies. A pooling with
ceil_mode drops it where it makes no window; a padding that is negative becomes a slice.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from faqd.errors import UserError
from faqd.quantize import nodes
from faqd.quantize.operators.elementwise import Part

Sizes = tuple[int, ...]


def with_its_size(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The transposed convolution that `node` is with its output padding, reading its tensor alone; None where it was
    not told a size."""
    module: Any = nodes.module_of(traced, node)
    if not isinstance(module, nodes.TRANSPOSED) or (len(node.args) < 2 and not node.kwargs):
        return None
    node.args, node.kwargs = (nodes.operand(node),), {}
    sizes = zip(
        *(nodes.shape(nodes.operand(node))[2:], nodes.shape(node)[2:]),
        *(module.kernel_size, module.stride, module.padding, module.dilation),
        strict=True,
    )
    # A copy that shares the weights: another use may be told another size.
    told = copy.copy(module)
    told._parameters = dict(module._parameters)
    told.output_padding = tuple(
        after - ((before - 1) * step - 2 * pad + dilation * (kernel - 1) + 1)
        for before, after, kernel, step, pad, dilation in sizes
    )
    return told


# Pooling ----------------------------------------------------------------------------------------------------------

_MAXIMA = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVERAGES = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_POOLS: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    **dict.fromkeys((F.max_pool1d, torch.max_pool1d), (nn.MaxPool1d, _MAXIMA)),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), (nn.MaxPool2d, _MAXIMA)),
    **dict.fromkeys((F.avg_pool1d, torch.avg_pool1d), (nn.AvgPool1d, _AVERAGES[:-1])),
    F.avg_pool2d: (nn.AvgPool2d, _AVERAGES),
}


def with_whole_windows(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The pooling with ceil_mode that `node` is, as one without; None for any other, and where ceil_mode gives every
    axis that it can one more window, which all runtimes know.

    torch drops a window that would start in the padding, and others do not. UserError for an average that has one more
    window along one axis alone.
    """
    module = nodes.module_of(traced, node)
    kind, names = next(
        ((k, n) for k, n in _POOLS.values() if isinstance(module, k)), _POOLS.get(node.target, (None, ()))
    )
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    if module is not None:
        given = {name: getattr(module, name) for name in names if hasattr(module, name)}
    if kind is None or not given.get("ceil_mode"):
        return None
    before, after = nodes.shape(nodes.operand(node))[2:], nodes.shape(node)[2:]
    kernel, padding, dilation = (_each(given.get(name, usual), before) for name, usual in _USUAL.items())
    stride = _each(given.get("stride") or kernel, before)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    room = [size + 2 * pad - r for size, pad, r in zip(before, padding, reach, strict=True)]
    more = [(count - 1) * step - space for count, step, space in zip(after, stride, room, strict=True)]
    possible = [space % step != 0 for space, step in zip(room, stride, strict=True)]
    if all(beyond > 0 for beyond, could in zip(more, possible, strict=True) if could):
        return None
    settings = {name: value for name, value in given.items() if name != "input"}
    whole: nn.Module = kind(**settings | {"ceil_mode": False})
    if not any(beyond > 0 for beyond in more):
        return whole
    if issubclass(kind, nn.AvgPool1d | nn.AvgPool2d) or any(d > 1 for d in dilation):
        raise UserError(
            f"{nodes.places(traced)[node]}{nodes.line_of_code(node)}: ceil_mode gives this pooling from {before} to "
            f"{after} one more window along one axis and none along the other, which no ONNX operator has; pad in "
            "forward and leave ceil_mode out, or choose another --image-size."
        )
    # What is repeated lies in a window with what it repeats, so that no maximum changes.
    below, beside = (max(0, beyond) for beyond in more)
    path = nodes.unused(f"{nodes.places(traced)[node]}_pad", {name for name, _ in traced.named_modules()})
    traced.add_submodule(path, nn.ReplicationPad2d((0, beside, 0, below)))
    with traced.graph.inserting_before(node):
        padded = traced.graph.call_module(path, (nodes.operand(node),))
    padded.stack_trace = node.stack_trace
    node.args, node.kwargs = (padded,), {}
    return whole


_USUAL = {"kernel_size": 1, "padding": 0, "dilation": 1}


def _each(value: Any, axes: Sizes) -> Sizes:
    """A setting for each axis."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * len(axes) if len(values) == 1 else values


# Padding ----------------------------------------------------------------------------------------------------------

_MODES: dict[type[nn.Module], str] = {
    **dict.fromkeys((nn.ConstantPad1d, nn.ConstantPad2d, nn.ZeroPad1d, nn.ZeroPad2d), "constant"),
    **dict.fromkeys((nn.ReflectionPad1d, nn.ReflectionPad2d), "reflect"),
    **dict.fromkeys((nn.ReplicationPad1d, nn.ReplicationPad2d), "replicate"),
    **dict.fromkeys((nn.CircularPad1d, nn.CircularPad2d), "circular"),
}


def crop(traced: fx.GraphModule, node: fx.Node, place: str) -> None:
    """Let a padding that is negative on some side, or computed from sizes, be the padding of the other sides and a
    slice."""
    module: Any = nodes.module_of(traced, node)
    mode = next((mode for kind, mode in _MODES.items() if isinstance(module, kind)), None)
    if node.target is not F.pad and mode is None:
        return
    x = nodes.operand(node)
    given: dict[str, Any] = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
    given |= {} if mode is None else {"pad": module.padding, "mode": mode, "value": getattr(module, "value", None)}
    asked = [int(width) for width in nodes.fixed(given["pad"])]
    widths = [max(0, width) for width in asked]
    if list(given["pad"]) == widths or given.get("mode") == "circular":  # which wraps what is left of it
        return
    node.op, node.target, node.kwargs = "call_function", F.pad, {}
    node.args = (x, widths, given.get("mode", "constant"), given.get("value"))
    rank, last = len(nodes.shape(x)), node
    for index in range(0, len(asked), 2):
        first, second = asked[index : index + 2]
        if min(first, second) >= 0:
            continue
        axis = rank - 1 - index // 2
        end = nodes.shape(x)[axis] + widths[index] + widths[index + 1] + min(0, second)
        last = nodes.called_behind(traced, last, f"{place}_crop", Part(axis, max(0, -first), end))
    if not any(widths):
        node.replace_all_uses_with(x)
