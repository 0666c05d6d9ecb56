"""What the axes of a tensor run over: images, rows and columns of a map, tokens, or something else such as channels.

An axis is a tuple of parts, the outermost first: `flatten(2)` of a map gives an axis of rows and columns. A reshape
that takes an axis apart leaves parts that know their stride, so that what makes windows of a map and a map of them
again ends with the axes that it began with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Of = Literal["images", "rows", "columns", "tokens", "front", "other"]
PLACES: tuple[Of, ...] = ("rows", "columns", "tokens")


@dataclass(frozen=True)
class Part:
    """Of an axis. stride: between neighbours, in units of what it is of. `tokens` are all positions of a map, (height,
    width) of `grid` in raster order, behind `front` others; a part `front` is of such others alone."""

    of: Of
    size: int
    stride: int = 1
    front: int = 0
    grid: tuple[int, int] = (0, 0)


Axis = tuple[Part, ...]
Axes = tuple[Axis, ...]


def whole(of: Of, size: int) -> Axis:
    """An axis of nothing but this; one of size 1 has no parts."""
    return (Part(of, size),) if size > 1 else ()


def of_map(shape: Sequence[int]) -> Axes:
    """The axes of a feature map (B, C, H, W)."""
    kinds: tuple[Of, ...] = ("images", "other", "rows", "columns")
    return tuple(whole(of, size) for of, size in zip(kinds, shape, strict=True))


def looks_like_map(axes: Axes, shape: Sequence[int]) -> bool:
    """Whether these four are images, something, rows and columns, whatever else of a map is in the last three."""
    rows, columns = ({part.of for part in axis} for axis in axes[2:])
    return (
        axes[0] == whole("images", shape[0])
        and ("rows" in rows or shape[2] == 1)
        and ("columns" in columns or shape[3] == 1)
        and rows.isdisjoint(("columns", "tokens", "images"))
        and columns.isdisjoint(("rows", "tokens", "images"))
    )


def holds_places(axis: Axis) -> bool:
    """Whether positions of a map differ along it."""
    return any(part.of in PLACES for part in axis)


def is_other(axis: Axis) -> bool:
    """Whether neither images nor positions differ along it, as it is with channels."""
    return all(part.of == "other" for part in axis)


def regrouped(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The axes behind a reshape; None where it takes apart what has no parts."""
    ahead = [part for axis in axes for part in axis]
    found = []
    for size in shape:
        axis: list[Part] = []
        left = size
        while left > 1:
            if not ahead:
                return None
            part = ahead.pop(0)
            if left % part.size:
                if part.of in ("tokens", "front") or part.size % left:
                    return None
                ahead.insert(0, replace(part, size=part.size // left))
                part = replace(part, size=left, stride=part.stride * (part.size // left))
            axis.append(part)
            left //= part.size
        found.append(_joined(axis))
    return None if ahead else tuple(found)


def _joined(parts: list[Part]) -> Axis:
    """Neighbours that are one where nothing stands between them."""
    found: list[Part] = []
    for part in parts:
        outer = found[-1] if found else None
        if outer is not None and outer.of == part.of == "other":
            found[-1] = Part("other", outer.size * part.size)
        elif outer is not None and outer.of == part.of and outer.stride == part.stride * part.size:
            found[-1] = replace(part, size=outer.size * part.size)
        else:
            found.append(part)
    return tuple(found)


def sliced(axes: Axes, shape: Sequence[int], index: Any) -> Axes | None:
    """The axes behind `x[index]` of slices and numbers; None where some positions of a map are taken that are no map.
    shape: of x."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if not all(isinstance(entry, int | slice) for entry in entries):
        return None
    entries += [slice(None)] * (len(axes) - len(entries))
    found = []
    for axis, size, entry in zip(axes, shape, entries, strict=True):
        one = isinstance(entry, int)
        cut = _cut(axis, size, slice(entry % size, entry % size + 1) if isinstance(entry, int) else entry)
        if cut is None or (one and holds_places(axis) and axis[0].of != "tokens"):
            return None
        if not one:
            found.append(cut)
    return tuple(found)


def _cut(axis: Axis, size: int, entry: slice) -> Axis | None:
    try:
        chosen = range(*entry.indices(size))
    except TypeError:  # a bound that is a node of the graph
        return None
    if len(chosen) == size:
        return axis
    if not holds_places(axis):
        return whole(axis[0].of if len({part.of for part in axis}) == 1 else "other", len(chosen))
    (part, *others) = axis
    if others or part.stride > 1:
        return None
    if part.of != "tokens":
        return whole(part.of, len(chosen))
    first, end = part.front, part.front + math.prod(part.grid)
    if chosen.step != 1:
        return None
    if chosen.stop <= first or chosen.start >= end:
        return whole("front", len(chosen))
    if not _within(first, end, chosen):
        return None
    if len(chosen) == math.prod(part.grid):
        return (*whole("rows", part.grid[0]), *whole("columns", part.grid[1]))
    return (replace(part, size=len(chosen), front=first - chosen.start),)


def _within(first: int, end: int, chosen: range) -> bool:
    return chosen.start <= first and chosen.stop >= end


def concatenated(parts: Sequence[tuple[Axes | None, Sequence[int]]], axis: int) -> Axes | None:
    """The axes behind a concatenation along `axis` of tensors with these axes and shapes.

    axes None: of a tensor that depends on no image, and holds no positions. Where one tensor alone has a whole map's
    positions along `axis`, the others are in front of them or behind.
    """
    total = sum(shape[axis] for _, shape in parts)
    known = [each for each, _ in parts if each is not None]
    if not known:
        return None
    grids = [i for i, (each, _) in enumerate(parts) if each is not None and holds_places(each[axis])]
    if not grids:
        return (*known[0][:axis], whole("other", total), *known[0][axis + 1 :])
    place = grids[0]
    first = known[0] if parts[place][0] is None else parts[place][0]
    grid = None if first is None else grid_of(first[axis])
    if len(grids) > 1 or first is None or grid is None:
        return None
    front, (height, width) = grid
    front += sum(shape[axis] for _, shape in parts[:place])
    return (*first[:axis], (Part("tokens", total, front=front, grid=(height, width)),), *first[axis + 1 :])


def grid_of(axis: Axis) -> tuple[int, tuple[int, int]] | None:
    """(tokens in front, (height, width)) of an axis of all positions of a map in raster order."""
    if len(axis) == 1 and axis[0].of == "tokens":
        return axis[0].front, axis[0].grid
    kinds = [part.of for part in axis]
    if kinds not in (["rows", "columns"], ["rows"], ["columns"]) or any(part.stride > 1 for part in axis):
        return None
    sizes = {part.of: part.size for part in axis}
    return 0, (sizes.get("rows", 1), sizes.get("columns", 1))


def settled(axes: Axes) -> Axes:
    """Rows that are every second one of another map are rows of a map of their own, once nothing else is left of it."""
    for of in ("rows", "columns"):
        if sum(part.of == of for axis in axes for part in axis) == 1:
            axes = tuple(tuple(replace(p, stride=1) if p.of == of else p for p in axis) for axis in axes)
    return axes
