"""Nodes that move values and change none. What a file says of its own number of images is made to hold for any."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from faqd.train.networks.from_onnx.builder import BATCH, Node, Ref, Rule


def _itself(node: Node) -> Any:
    return node.ref()


def _reshape(node: Node) -> Any:
    x, wanted = node.ref(), [int(size) for size in node.setting("shape", 1)]
    if not node.setting("allowzero"):
        wanted = [x.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    return reshaped(node, x, _for_the_batch(node, x.shape, wanted))


def reshaped(node: Node, x: Ref, sizes: list[int]) -> Any:
    """sizes: with BATCH images. The axis that holds the images is the free one."""
    if tuple(sizes) == x.shape:
        return x
    axis = next((axis for axis, size in enumerate(sizes) if size % BATCH == 0), None)
    if axis is None:
        raise node.refusal(f"makes {list(x.shape[1:])} for each image to {sizes}, so that images are mixed")
    return node.function(torch.reshape, x, tuple(-1 if index == axis else size for index, size in enumerate(sizes)))


def _for_the_batch(node: Node, before: tuple[int, ...], wanted: list[int]) -> list[int]:
    """The sizes that a reshape asks for, with BATCH images; the file may state them for its own number of images."""
    total, known = math.prod(before), math.prod(size for size in wanted if size != -1)
    if node.builder.batch is None or any(size > 0 and size % BATCH == 0 for size in wanted):
        sizes = [total // known if size == -1 else size for size in wanted]
        if math.prod(sizes) == total:
            return sizes
    own = node.builder.batch or 1  # A file may say that it takes any number of images, and hold for one.
    total = total // BATCH * own
    sizes = [total // known if size == -1 else size for size in wanted]
    if math.prod(sizes) != total:
        raise node.refusal(f"makes {list(before)} to {wanted}, which is another number of elements")
    axis = _axis_of_images(before, sizes, own)
    if axis is None:
        raise node.refusal(f"is written for {own} image, and where its images go in {wanted} is not to be seen")
    return [size // own * BATCH if index == axis else size for index, size in enumerate(sizes)]


def _axis_of_images(before: tuple[int, ...], sizes: list[int], own: int) -> int | None:
    """The axis of `sizes` that the images go to: in memory they are as far apart there as they were.

    Of axes of one element it is the first: what others name the batch stands there.
    """
    batch = next(axis for axis, size in enumerate(before) if size % BATCH == 0)
    apart = before[batch] // BATCH * math.prod(before[batch + 1 :])
    fitting = [
        i for i, size in enumerate(sizes) if size % own == 0 and size // own * math.prod(sizes[i + 1 :]) == apart
    ]
    return fitting[0] if fitting else None


def _flatten(node: Node) -> Any:
    shape = node.ref().shape
    axis = int(node.setting("axis", default=1)) % (len(shape) + 1)
    return reshaped(node, node.ref(), [math.prod(shape[:axis]), math.prod(shape[axis:])])


def _transpose(node: Node) -> Any:
    rank = len(node.ref().shape)
    order = tuple(node.setting("perm", default=list(range(rank))[::-1]))
    return node.ref() if order == tuple(range(rank)) else node.function(torch.permute, node.ref(), order)


def _squeeze(node: Node) -> Any:
    shape = node.ref().shape
    axes = node.setting("axes", 1)
    gone = {axis % len(shape) for axis in axes} if axes else {axis for axis, size in enumerate(shape) if size == 1}
    if any(shape[axis] != 1 for axis in gone):
        raise node.refusal(f"takes axes {sorted(gone)} away from {list(shape)}; the images' axis has to stay")
    return reshaped(node, node.ref(), [size for axis, size in enumerate(shape) if axis not in gone])


def _unsqueeze(node: Node) -> Any:
    axes, shape = node.setting("axes", 1), list(node.ref().shape)
    rank = len(shape) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        shape.insert(axis, 1)
    return reshaped(node, node.ref(), shape)


def _concat(node: Node) -> Any:
    refs = [value for value in node.inputs if isinstance(value, Ref)]
    axis = int(node.setting("axis")) % len(refs[0].shape)
    if len(node.inputs) == 1:
        return refs[0]
    images = next((index for index, size in enumerate(refs[0].shape) if size == BATCH), 0)
    constants = [node.tensor(value).numpy() for value in node.inputs if isinstance(value, np.ndarray)]
    if axis == images:
        raise node.refusal("joins images along their own axis, so that images are mixed")
    if constants and any(value.shape[images] != 1 for value in constants):
        raise node.refusal("joins a constant for each of several images: export the file with one, or any number")
    held = iter(constants)
    parts = [value if isinstance(value, Ref) else next(held) for value in node.inputs]
    if constants:
        return node.function(_joined, parts, axis, images, refs[0])
    return node.function(torch.cat, parts, axis)


def _joined(parts: list[Tensor], axis: int, images: int, like: Tensor) -> Tensor:
    """Constants among the parts are repeated for each image."""
    sizes = [-1] * like.dim()
    sizes[images] = like.shape[images]
    return torch.cat([part.expand(sizes) for part in parts], axis)


def _split(node: Node) -> Any:
    axis = int(node.setting("axis", default=0)) % len(node.ref().shape)
    size, count = node.ref().shape[axis], len(node.proto.output)
    step = -(-size // count)
    sizes = node.setting("split", 1) or [min(step, size - step * index) for index in range(count)]
    if count == 1:
        return node.ref()
    return node.function(_pieces, node.ref(), tuple(int(size) for size in sizes), axis)


def _pieces(x: Tensor, sizes: tuple[int, ...], axis: int) -> list[Tensor]:
    return list(torch.split(x, list(sizes), axis))


def _slice(node: Node) -> Any:
    x = node.ref()
    starts, ends = node.setting("starts", 1), node.setting("ends", 2)
    axes = node.setting("axes", 3) or list(range(len(starts)))
    steps = node.setting("steps", 4) or [1] * len(starts)
    index: list[slice] = [slice(None)] * len(x.shape)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        if step < 0:
            raise node.refusal("reads an axis backwards, which is not read")
        begin, stop, step = slice(start, end, step).indices(size)
        if size % BATCH == 0 and (begin, stop, step) != (0, size, 1):
            if node.builder.batch is None or stop - begin != node.builder.batch:
                raise node.refusal("takes some of the images; a network computes the same for each")
            continue
        if (begin, stop, step) != (0, size, 1):
            index[axis] = slice(begin, stop, step)
    if all(each == slice(None) for each in index):
        return x
    return node.function(_sliced, x, tuple(index))


def _sliced(x: Tensor, index: tuple[Any, ...]) -> Tensor:
    return x[index]


def _gather(node: Node) -> Any:
    x, index = node.ref(), node.constant(1)
    assert index is not None
    axis = int(node.setting("axis", default=0)) % len(x.shape)
    if x.shape[axis] % BATCH == 0:
        raise node.refusal("picks images; a network computes the same for each")
    index = np.where(index < 0, index + x.shape[axis], index)
    if index.ndim == 0:
        return node.function(torch.select, x, axis, int(index))
    if index.ndim > 1:
        raise node.refusal(f"picks by a table of {index.ndim} axes, which is not read")
    if np.array_equal(index, np.arange(index[0], index[0] + len(index))):
        return node.function(_sliced, x, (*[slice(None)] * axis, slice(int(index[0]), int(index[0]) + len(index))))
    return node.function(torch.index_select, x, axis, index.astype(np.int64))


def _gather_elements(node: Node) -> Any:
    return node.function(torch.gather, node.at(0), int(node.setting("axis", default=0)), node.at(1))


def _expand(node: Node) -> Any:
    x, wanted = node.ref(), [int(size) for size in node.setting("shape", 1)]
    sizes = list(np.broadcast_shapes(x.shape, tuple(wanted)))
    if tuple(sizes) == x.shape:
        return x
    before = [1] * (len(sizes) - len(x.shape)) + list(x.shape)
    if any(size % BATCH == 0 and size != old for size, old in zip(sizes, before, strict=True)):
        raise node.refusal("repeats a tensor for each image, which is not read")
    return node.function(_expanded, x, tuple(-1 if a == b else b for a, b in zip(before, sizes, strict=True)))


def _expanded(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    return x.expand(sizes)


def _tile(node: Node) -> Any:
    counts = tuple(int(count) for count in node.setting("repeats", 1))
    return node.ref() if all(count == 1 for count in counts) else node.function(torch.tile, node.ref(), counts)


def _depth_to_space(node: Node) -> Any:
    size = int(node.setting("blocksize"))
    if node.setting("mode", default="DCR") == "CRD":
        return node.module(torch.nn.PixelShuffle(size), node.ref())
    return node.function(_blocks_apart, node.ref(), size)


def _blocks_apart(x: Tensor, size: int) -> Tensor:
    """What lies in the channels, the block's place first, goes to the pixels."""
    channels, height, width = x.shape[1:]
    x = x.reshape(-1, size, size, channels // size**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(-1, channels // size**2, height * size, width * size)


def _space_to_depth(node: Node) -> Any:
    return node.function(_blocks_joined, node.ref(), int(node.setting("blocksize")))


def _blocks_joined(x: Tensor, size: int) -> Tensor:
    channels, height, width = x.shape[1:]
    x = x.reshape(-1, channels, height // size, size, width // size, size).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(-1, channels * size**2, height // size, width // size)


RULES: dict[str, Rule] = {
    "Identity": _itself,
    "Dropout": _itself,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Expand": _expand,
    "Tile": _tile,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
}
