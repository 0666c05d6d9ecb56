"""Places labels beside points so that they cover neither each other nor the points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_GAPS = (12.0, 20.0, 32.0, 48.0, 68.0, 92.0, 120.0, 160.0)
_DIRECTIONS = ((1, 0), (-1, 0), (1, -1), (1, 1), (-1, -1), (-1, 1), (0, -1), (0, 1))
_WIDE, _WIDE_BOLD = 0.61, 0.7
"""Mean width of a character over the font size in DejaVu Sans, the widest of the usual interface fonts."""


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The common area."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return width * height if width > 0 and height > 0 else 0.0

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The point of the rectangle that is nearest."""
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)

    def distance(self, x: float, y: float) -> float:
        return math.dist(self.nearest(x, y), (x, y))

    def within(self, other: Box) -> bool:
        return (
            self.left >= other.left
            and self.top >= other.top
            and self.right <= other.right
            and self.bottom <= other.bottom
        )


def text_width(text: str, font_px: float, bold: bool = False) -> float:
    return (_WIDE_BOLD if bold else _WIDE) * font_px * len(text)


def place(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    solid: Sequence[Box],
    soft: Sequence[Box],
    frame: Box,
) -> list[Box]:
    """One box of the given size per anchor, inside `frame`, the nearest that covers nothing and stands beside no other
    anchor; if there is none, the one that covers least, where the `soft` boxes count a fiftieth of the solid ones and
    of other labels, and a place beside another anchor a fiftieth of the box. The points with the least room, those on
    the right, go first."""
    placed: dict[int, Box] = {}
    for index in sorted(range(len(anchors)), key=lambda i: (-anchors[i][0], anchors[i][1])):
        taken = [*solid, *placed.values()]
        best: tuple[float, Box] | None = None
        for box in _candidates(anchors[index], sizes[index], frame):
            cost = sum(map(box.overlap, taken)) + sum(map(box.overlap, soft)) / 50
            own = box.distance(*anchors[index])
            if any(box.distance(*other) < own for other in anchors):
                cost += math.prod(sizes[index]) / 50
            if best is None or cost < best[0]:
                best = cost, box
            if cost == 0:
                break
        assert best is not None
        placed[index] = best[1]
    return [placed[index] for index in range(len(anchors))]


def _candidates(anchor: tuple[float, float], size: tuple[float, float], frame: Box) -> list[Box]:
    (x, y), (width, height) = anchor, size
    found = []
    for gap in _GAPS:
        for right, down in _DIRECTIONS:
            reach = gap / math.sqrt(abs(right) + abs(down))
            left = x + reach if right > 0 else x - reach - width if right < 0 else x - width / 2
            top = y + reach if down > 0 else y - reach - height if down < 0 else y - height / 2
            box = Box(left, top, left + width, top + height)
            found.append(box if box.within(frame) else _moved_into(box, frame))
    inside_first = [box for box in found if box.within(frame)]
    return inside_first or found


def _moved_into(box: Box, frame: Box) -> Box:
    across = max(frame.left - box.left, 0.0) - max(box.right - frame.right, 0.0)
    down = max(frame.top - box.top, 0.0) - max(box.bottom - frame.bottom, 0.0)
    return Box(box.left + across, box.top + down, box.right + across, box.bottom + down)
