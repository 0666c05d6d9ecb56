"""Moves: operators that only move or drop values, join them, or pad with zeros. Codes pass through them unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from faqd.quantize.operators.arithmetic import Stacked
from faqd.quantize.operators.emit import Emission, Size, Value, settled
from faqd.quantize.operators.row import Call, Operator, Rule, is_number, sizes
from faqd.quantize.operators.treatment import PASSED, Treatment


class Constant(nn.Module):
    """The same for every image, whatever it shows: `value` (1, ...), or without a batch, once for each image of x."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        if isinstance(value, nn.Parameter):
            self.value = value
        else:
            self.register_buffer("value", value if value.is_floating_point() else value.float())

    def forward(self, x: Tensor) -> Tensor:
        return self.value.expand(x.shape[0], *self.value.shape[1:])


class Reshape(nn.Module):
    """Other axes for the same values. sizes: with -1 where they depend on how many images there are."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(self.sizes)

    def extra_repr(self) -> str:
        return str(self.sizes)


def _reshape(call: Call) -> Any:
    wanted = tuple(size if is_number(size) else -1 for size in call.after)
    if wanted.count(-1) > 1:
        return None
    return Reshape(wanted)


def _permute(call: Call) -> Any:
    axes = list(range(len(call.before)))
    if call.get("dims") is not None:
        axes = [axis % len(axes) for axis in call["dims"]]
    elif call.get("dim0") is not None or call.get("axis0") is not None:
        first, second = (
            (call.get("dim0"), call.get("dim1")) if call.get("dim0") is not None else (call["axis0"], call["axis1"])
        )
        axes[first], axes[second] = axes[second], axes[first]
    elif len(axes) == 2:
        axes = [1, 0]
    return call.function(torch.permute, call.x, tuple(axes))


def _stack(call: Call) -> Any:
    rank = len(call.after)
    axis = int(call["dim"]) % rank
    if call.node.users and all(_sums_over(reader, axis, rank) for reader in call.node.users):
        return Stacked(call["tensors"])
    wanted = [*call.after]
    wanted[axis] = 1
    if axis == 0 or sum(not is_number(size) for size in wanted) > 1:
        return None
    shape = tuple(size if is_number(size) else -1 for size in wanted)
    return call.function(torch.cat, [call.module(Reshape(shape), each, "unsqueeze") for each in call["tensors"]], axis)


def _sums_over(reader: fx.Node, axis: int, rank: int) -> bool:
    given = [*reader.args[1:], *reader.kwargs.values()]
    alone = len(given) == 1 and given[0] in ([axis], [axis - rank])
    return reader.target in (torch.ops.aten.mean.dim, torch.ops.aten.sum.dim_IntList) and alone


def _joined(call: Call) -> tuple[list[fx.Node], int]:
    tensors = call["tensors"]
    return tensors, int(call.get("dim") or 0) % len(sizes(tensors[0]))


def _size(call: Call) -> Any:
    return call.function(torch.Tensor.size, call.x, call.get("dim"))


def _emit_joined(emission: Emission) -> Value:
    return emission.op("Concat", *emission.values(0), axis=emission.arguments[1])


def _emit_reshape(emission: Emission) -> Value:
    """Flatten where it is one, and the number of images as it is: backends know both on codes."""
    before, after = emission.before, emission.after
    known = settled(before[1:]), settled(after[1:])
    if None in known or after[0] != before[0]:
        wanted: list[Size] = [size if isinstance(size, int) else -1 for size in after]
    elif len(after) == 2:
        return emission.x if len(before) == 2 else emission.op("Flatten", emission.x, axis=1)
    else:
        wanted = [0, *after[1:]]
    return emission.op("Reshape", emission.x, emission.number("shape", wanted))


def _emit_permute(emission: Emission) -> Value:
    return emission.op("Transpose", emission.x, perm=list(emission.arguments[1]))


def _emit_channel_shuffle(emission: Emission) -> Value | None:
    sizes, groups = settled(emission.before[1:]), emission.module.groups
    if sizes is None or len(sizes) != 3:
        return None
    c, h, w = sizes
    return _regrouped(emission, (groups, c // groups, h, w), (0, 2, 1, 3, 4))


def _emit_pixel_unshuffle(emission: Emission) -> Value | None:
    sizes, block = settled(emission.before[1:]), emission.module.downscale_factor
    if sizes is None or len(sizes) != 3:
        return None
    c, h, w = sizes
    return _regrouped(emission, (c, h // block, block, w // block, block), (0, 1, 3, 5, 2, 4))


def _regrouped(emission: Emission, parts: tuple[int, ...], order: tuple[int, ...]) -> Value:
    """Axes behind the batch taken apart, put in another order and joined again. order: the batch included."""
    apart = emission.op("Reshape", emission.x, emission.number("parts", [0, *parts]))
    ordered = emission.op("Transpose", apart, perm=list(order))
    return emission.op("Reshape", ordered, emission.number("sizes", [0, *emission.after[1:]]))


def _emit_pixel_shuffle(emission: Emission) -> Value | None:
    if len(emission.before) != 4:
        return None
    return emission.op("DepthToSpace", emission.x, blocksize=emission.module.upscale_factor, mode="CRD")


def _emit_constant(emission: Emission) -> Value:
    """Once for each image."""
    value = emission.module.value
    count = emission.op("Shape", emission.x, start=0, end=1)
    sizes = emission.op("Concat", count, emission.number("sizes", list(value.shape[1:])), axis=0)
    return emission.op("Expand", emission.number("value", value), sizes)


OPERATORS = (
    Operator(
        "concat",
        (torch.cat,),
        {
            **dict.fromkeys(("cat", "concat", "concatenate"), lambda call: call.function(torch.cat, *_joined(call))),
            "stack": _stack,
        },
        emit=_emit_joined,
        stands_for="concatenation, `stack`",
        treatment=Treatment(
            "all tensors that are joined share one range and scale, also where a split or a shuffle stands between. "
            "The result has a scale of its own where the image is joined, or a map with its own multiple or mean "
            "(`x / 2`, `(x + y) / 2`, an average, a LeakyReLU of it)",
            "on INT8",
            "on integers",
        ),
    ),
    Operator(
        "reshape",
        (Reshape, torch.flatten),
        {
            **dict.fromkeys(
                ("flatten", "unflatten", "view", "_unsafe_view", "reshape", "view_as", "reshape_as"), _reshape
            ),
            **dict.fromkeys(("squeeze", "unsqueeze"), _reshape),
        },
        emit=_emit_reshape,
        stands_for="flatten, reshape, view, squeeze",
        treatment=PASSED,
    ),
    Operator(
        "reshape",
        (torch.permute,),
        dict.fromkeys(("permute", "transpose", "t", "swapaxes", "swapdims", "numpy_T"), _permute),
        emit=_emit_permute,
        stands_for="permute, transpose",
        treatment=PASSED,
    ),
    Operator(
        "reshape",
        (nn.ChannelShuffle,),
        {"channel_shuffle": lambda call: nn.ChannelShuffle(call["groups"])},
        emit=_emit_channel_shuffle,
        stands_for="channel shuffle",
        treatment=PASSED,
    ),
    Operator(
        "reshape",
        (nn.PixelShuffle,),
        {"pixel_shuffle": lambda call: nn.PixelShuffle(call["upscale_factor"])},
        emit=_emit_pixel_shuffle,
        stands_for="pixel shuffle",
        treatment=PASSED,
    ),
    Operator(
        "reshape",
        (nn.PixelUnshuffle,),
        {"pixel_unshuffle": lambda call: nn.PixelUnshuffle(call["downscale_factor"])},
        emit=_emit_pixel_unshuffle,
        stands_for="pixel unshuffle",
        treatment=PASSED,
    ),
    Operator(
        "reshape",
        (nn.Identity,),
        emit=lambda emission: emission.x,
        stands_for="identity, dropout",
        treatment=Treatment("removed", "–", "–"),
    ),
    Operator(
        "constant",
        (Constant,),
        emit=_emit_constant,
        stands_for="a tensor of the network's own in a concatenation, expanded to the batch (coordinates, a buffer, "
        "`torch.linspace`)",
        treatment=Treatment("as the concatenation", "float, then quantized", "float, then quantized"),
    ),
)


def _type_as(call: Call) -> fx.Node:
    """Of the other tensor, nothing but its type is read."""
    return call.function(Tensor.to, call.x, call.node.meta["val"].dtype)


def _filled(call: Call) -> Any:
    """A tensor of one number, of which another tensor says the type, and the sizes if it is not told them."""
    if not all(map(is_number, call.after)):
        return None
    names = {"new_zeros": 0.0, "zeros_like": 0.0, "new_ones": 1.0, "ones_like": 1.0}
    value = next((number for name, number in names.items() if name in call.name), call.get("fill_value"))
    kind = call.node.meta["val"]
    return call.function(torch.full, tuple(call.after), value, dtype=kind.dtype, device=kind.device)


HELPERS: dict[str, Rule] = {
    "type_as": _type_as,
    **dict.fromkeys(("new_full", "new_zeros", "new_ones", "full_like", "zeros_like", "ones_like"), _filled),
    "expand": lambda call: call.function(Tensor.expand, call.x, *call["size"]),
    "expand_as": lambda call: call.function(Tensor.expand_as, call.x, call["other"]),
    "broadcast_to": lambda call: call.function(Tensor.expand, call.x, *call["size"]),
    "repeat": lambda call: call.function(Tensor.repeat, call.x, *call["repeats"]),
    "copy": lambda call: call["src"] if sizes(call["src"]) == call.after else None,
    "sym_size": _size,
}
"""What is nothing to the quantizer by itself, but to what reads it."""
