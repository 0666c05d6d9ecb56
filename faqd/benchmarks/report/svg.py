"""Axes, text and frames that the report's pictures share.

Every picture is drawn for one width in CSS pixels: the page shows a wide and a narrow one, because scaling a wide
one down to a phone makes its text unreadable. All text goes through Markup.format, which escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from markupsafe import Markup

from faqd.benchmarks.report.figures import Record

LOG_ABOVE = 8.0
"""Ratio of medians from which a latency axis is logarithmic; below, it is linear and starts at zero."""


@dataclass(frozen=True)
class Axis:
    """Value to pixel along one axis, with the ticks it shows."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        warp: Callable[[float], float] = math.log if self.log else float
        share = (warp(value) - warp(self.low)) / (warp(self.high) - warp(self.low))
        return self.start + share * (self.end - self.start)

    def clipped(self, value: float) -> float:
        return self(min(max(value, self.low), self.high))


def colour_class(network: Record) -> str:
    """The style sheet's class for a network; an unknown kind is drawn as a student."""
    if network["role"] != "student":
        return "float" if network["role"] == "float" else "teacher"
    return "ptq" if network["kind"] == "ptq" else "distilled"


SHAPES = {
    "teacher": "M{0} {1}m0 -8l8 8l-8 8l-8 -8z",
    "ptq": "M{0} {1}m-6 -6h12v12h-12z",
    "float": "M{0} {1}m0 -7l7 13h-14z",
    "distilled": "M{0} {1}m-6.5 0a6.5 6.5 0 1 0 13 0a6.5 6.5 0 1 0 -13 0z",
}
"""By `colour_class`: a diamond, a square, a triangle, a circle. A colour alone tells nothing on paper."""


def mark(kind: str, x: float, y: float) -> Markup:
    """What stands for a network of this `colour_class`, 16 pixels wide at most around (x, y)."""
    return Markup('<path class="mark" d="{}"/>').format(SHAPES[kind].format(px(x), px(y)))


def inline_mark(kind: str) -> Markup:
    """The same for a line of text; whoever reads the page aloud leaves it out."""
    return Markup('<svg class="sign {}" width="12" height="12" viewBox="0 0 17 17" aria-hidden="true">{}</svg>').format(
        kind, mark(kind, 8.5, 8.5)
    )


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten that cover low..high."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def percents(tick: float) -> str:
    return f"{100 * tick:.6g} %"


def grid(
    x: Axis,
    y: Axis,
    left: float,
    right: float,
    top: float,
    bottom: float,
    write: Callable[[float], str] = percents,
    per_x: float = 1.0,
) -> Markup:
    """write: a value of the vertical axis as its label. per_x: what the labels of the other axis are multiplied by."""
    lines = [vertical_grid(x, top, bottom, per_x)]
    line = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>')
    text = Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>')
    for tick in y.ticks:
        lines.append(line.format(px(left), px(right), px(y(tick)), px(y(tick))))
        lines.append(text.format(px(left - 6), px(y(tick) + 4), write(tick)))
    return Markup("").join(lines)


def vertical_grid(x: Axis, top: float, bottom: float, per_x: float = 1.0) -> Markup:
    line = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>')
    text = Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>')
    parts = []
    for tick in x.ticks:
        at = x(tick)
        anchor = "start" if at < 14 else "end" if at > x.end - 8 else "middle"
        parts.append(line.format(px(at), px(at), px(top), px(bottom)))
        parts.append(text.format(px(at), px(bottom + 16), anchor, f"{tick * per_x:g}"))
    return Markup("").join(parts)


def axis_name(x: Axis, name: str, at: float) -> Markup:
    text = Markup('<text class="axis-name" x="{}" y="{}" text-anchor="end">{}</text>')
    return text.format(px(x.end), px(at), f"{name}, log scale" if x.log else name)


def short(name: str, limit: int) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def svg(parts: Iterable[Markup], width: int, height: float, title: str) -> Markup:
    return Markup('<svg viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img" aria-label="{2}">{3}</svg>').format(
        width, px(height), title, Markup("").join(parts)
    )


def px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
