"""Operators whose sizes torch settles when they run, in terms that every runtime has: sizes settled, at capture.

A transposed convolution that was told its output size gets the output padding that the size implies. A pooling with
ceil_mode drops it where it makes no window; a padding that is negative becomes a slice.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from faqd.errors import UserError
from faqd.quantize import nodes
from faqd.quantize.operators.pad import Pad
from faqd.quantize.operators.slice import Part

Sizes = tuple[int, ...]


# Pooling ----------------------------------------------------------------------------------------------------------

_SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d), ("kernel_size", "stride", "padding", "dilation", "ceil_mode")),
    nn.AvgPool1d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
    nn.AvgPool2d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
}


def with_whole_windows(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The pooling with ceil_mode that `node` is, as one without; None for any other, and where ceil_mode gives every
    axis that it can one more window, which all runtimes know.

    torch drops a window that would start in the padding, and others do not. UserError for an average that has one more
    window along one axis alone.
    """
    module: Any = nodes.module_of(traced, node)
    kind = next((kind for kind in _SETTINGS if isinstance(module, kind)), None)
    if kind is None or not module.ceil_mode:
        return None
    given: dict[str, Any] = {name: getattr(module, name) for name in _SETTINGS[kind]}
    before, after = nodes.shape(nodes.operand(node))[2:], nodes.shape(node)[2:]
    kernel, padding, dilation = (_each(given.get(name, usual), before) for name, usual in _USUAL.items())
    stride = _each(given.get("stride") or kernel, before)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    room = [size + 2 * pad - r for size, pad, r in zip(before, padding, reach, strict=True)]
    more = [(count - 1) * step - space for count, step, space in zip(after, stride, room, strict=True)]
    possible = [space % step != 0 for space, step in zip(room, stride, strict=True)]
    if all(beyond > 0 for beyond, could in zip(more, possible, strict=True) if could):
        return None
    whole: nn.Module = kind(**given | {"ceil_mode": False})
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
    traced.add_submodule(path, Pad((0, beside, 0, below), "replicate", 0.0))
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


def crop(traced: fx.GraphModule, node: fx.Node, place: str) -> None:
    """Let a padding that is negative on some side be the padding of the other sides and a slice."""
    pad = nodes.module_of(traced, node)
    if not isinstance(pad, Pad) or min(pad.widths) >= 0 or pad.mode == "circular":  # which wraps what is left of it
        return
    x = nodes.operand(node)
    asked = pad.widths
    pad.widths = widths = tuple(max(0, width) for width in asked)
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
