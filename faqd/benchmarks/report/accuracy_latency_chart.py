"""The report's pictures of accuracy and latency as inline SVG, coloured by the page's style sheet so that they follow
light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from faqd.benchmarks.report.figures import (
    Record,
    Unit,
    compared,
    first_batch,
    label,
    latency_at,
    percent,
    time_unit,
)
from faqd.benchmarks.report.label_layout import Box, place, text_width
from faqd.benchmarks.report.svg import (
    LOG_ABOVE,
    Axis,
    axis_name,
    colour_class,
    grid,
    mark,
    nice_ticks,
    px,
    short,
    svg,
    vertical_grid,
)

FAR_BELOW = 0.15
"""A share this far below the median one is drawn on the lower edge, so that it does not flatten the others."""
BELOW = "↓"
"""Stands before the value of such a network."""
_LABEL_PX, _SMALL_PX = 13, 12
_SIGN = 16
"""What a mark takes in front of a label."""


@dataclass(frozen=True)
class _Point:
    network: Record
    share: Record
    latency: Record


def accuracy_against_latency(result: Record, width: int) -> Markup | None:
    """Up is more accurate, left is faster; None where there is no accuracy or no latency to draw."""
    points = _points(result)
    if not points:
        return None
    height = 400 if width > 600 else 420
    left, right, top, bottom = 48.0, width - 14.0, 16.0, height - 46.0
    x = _latency_axis([point.latency for point in points], left, right)
    shown = _shown(points)
    y = _share_axis(shown, bottom, top)
    unit = time_unit(result)
    marks: list[Markup] = []
    solid: list[Box] = []
    soft: list[Box] = []
    for point in points:
        at, value = x(point.latency["median_ms"]), y.clipped(point.share["value"])
        above, under = (8, 8) if point in shown else (12, 1)
        solid.append(Box(at - 8, value - above, at + 8, value + under))
        if point in shown:
            spread = point.latency["distribution_ms"]
            soft.append(Box(x.clipped(spread[5]), value - 3, x.clipped(spread[95]), value + 3))
            soft.append(Box(at - 3, y.clipped(point.share["high"]), at + 3, y.clipped(point.share["low"])))
        marks.append(_mark(point, unit, at, value, x, y, point in shown))
    labels = [_label_lines(point, unit, 40 if width > 600 else 18, point not in shown) for point in points]
    anchors = [(x(point.latency["median_ms"]), y.clipped(point.share["value"])) for point in points]
    sizes = [
        (max(text_width(name, _LABEL_PX, bold=True), text_width(note, _SMALL_PX)) + _SIGN, _LABEL_PX + _SMALL_PX + 7)
        for name, note in labels
    ]
    kinds = [colour_class(point.network) for point in points]
    boxes = place(anchors, sizes, solid, soft, Box(left + 4, top, right, bottom - 4))
    measure = "top-1 accuracy" if result["evaluation"]["labels"] else "agreement with the teacher"
    parts = [
        grid(x, y, left, right, top, bottom, per_x=unit.per_ms),
        axis_name(x, f"median latency in {unit.name}, batch {first_batch(result)}", height - 8),
        *(_leader(*each, anchors) for each in zip(kinds, anchors, boxes, strict=True)),
        *marks,
        *(_label(*each) for each in zip(kinds, labels, boxes, anchors, strict=True)),
    ]
    return svg(parts, width, height, f"{measure} in percent against median latency in {unit.name}")


def latency_distribution(result: Record, batch: int, width: int) -> Markup | None:
    """One row per network: a tick for every percent of its queries, a bar over the middle half, the median."""
    rows = [(network, latency_at(network, batch)) for network in result["networks"]]
    measured = [(network, record) for network, record in rows if record]
    if not measured:
        return None
    step = 58
    left, right, height = 6.0, width - 10.0, step * len(measured) + 44
    x = _latency_axis([record for _, record in measured], left, right)
    bottom = float(step * len(measured) + 6)
    unit = time_unit(result)
    parts = [vertical_grid(x, 4.0, bottom, unit.per_ms)]
    for index, (network, record) in enumerate(measured):
        parts.append(_strip(network, record, unit, x, step * index + 18.0, right, width > 600))
    parts.append(axis_name(x, f"latency in {unit.name}", height - 6))
    return svg(parts, width, height, f"Distribution of latencies in {unit.name} at batch {batch}")


def _points(result: Record) -> list[_Point]:
    batch = first_batch(result)
    found = []
    for network in compared(result):
        latency, accuracy = latency_at(network, batch), network["accuracy"] or {}
        share = accuracy.get("top1") if result["evaluation"]["labels"] else accuracy.get("agreement")
        if share is None and network["role"] == "teacher" and not result["evaluation"]["labels"]:
            n = result["evaluation"]["images"]
            share = {"value": 1.0, "low": 1.0, "high": 1.0, "n": n}
        if latency and share and (result["evaluation"]["classification"]):
            found.append(_Point(network, share, latency))
    return found


def _shown(points: Sequence[_Point]) -> list[_Point]:
    """The points that the vertical axis is made for."""
    values = sorted(point.share["value"] for point in points)
    floor = values[len(values) // 2] - FAR_BELOW if len(points) > 2 else 0.0
    return [point for point in points if point.share["value"] >= floor]


def _share_axis(points: Sequence[_Point], bottom: float, top: float) -> Axis:
    low, high = min(p.share["low"] for p in points), max(p.share["high"] for p in points)
    space = max(high - low, 0.004)
    low, high = max(0.0, low - 0.15 * space), min(1.0, high + 0.1 * space)
    ticks = [tick for tick in nice_ticks(low, high, 6) if low - 1e-9 <= tick <= high + 1e-9]
    return Axis(low, high, bottom, top, tuple(ticks))


def _latency_axis(records: Iterable[Record], left: float, right: float) -> Axis:
    records = list(records)
    medians = [record["median_ms"] for record in records]
    reach = max(max(record["distribution_ms"][95], record["median_ms"] * 1.25) for record in records)
    if max(medians) / min(medians) < LOG_ABOVE:
        ticks = nice_ticks(0.0, reach, 6)
        return Axis(0.0, max(ticks[-1], reach), left, right, tuple(ticks))
    low = min(record["min_ms"] for record in records) / 1.3
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(reach)) + 1)
    candidates = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    return Axis(low, reach, left, right, tuple(t for t in candidates if low <= t <= reach), log=True)


def _mark(point: _Point, unit: Unit, at: float, value: float, x: Axis, y: Axis, shown: bool) -> Markup:
    kind = colour_class(point.network)
    title = Markup("<title>{}</title>").format(" ".join((point.network["name"], *_label_lines(point, unit)[1:])))
    if not shown:
        arrow = Markup('<path class="mark" d="M{} {}l7 -11h-14z"/>').format(px(at), px(value))
        return Markup('<g class="{}">{}{}</g>').format(kind, title, arrow)
    spread = point.latency["distribution_ms"]
    bar = Markup('<line class="bar" x1="{}" x2="{}" y1="{}" y2="{}"/>')
    bars = bar.format(px(at), px(at), px(y.clipped(point.share["low"])), px(y.clipped(point.share["high"])))
    bars += bar.format(px(x.clipped(spread[5])), px(x.clipped(spread[95])), px(value), px(value))
    return Markup('<g class="{}">{}{}{}</g>').format(kind, title, bars, mark(kind, at, value))


def _label_lines(point: _Point, unit: Unit, limit: int = 40, below: bool = False) -> tuple[str, str]:
    arrow = f"{BELOW} " if below else ""
    share = f"{percent(point.share['value'], point.share['n'])} %"
    return short(label(point.network), limit), f"{arrow}{share} · {unit.write(point.latency['median_ms'])} {unit.name}"


def _label(kind: str, lines: tuple[str, str], box: Box, anchor: tuple[float, float]) -> Markup:
    """Set against the side that faces the mark, with a small one of its kind in front."""
    at, side, inwards = (box.right, "end", -1) if box.right <= anchor[0] else (box.left, "start", 1)
    return Markup(
        '<g class="sign {5}" transform="translate({6} {7}) scale(0.62)">{8}</g>'
        '<text class="label" x="{0}" y="{1}" text-anchor="{2}">{3}'
        '<tspan class="label-note" x="{0}" dy="1.25em">{4}</tspan></text>'
    ).format(
        px(at + inwards * _SIGN),
        px(box.top + _LABEL_PX),
        side,
        *lines,
        kind,
        px(at + inwards * 6),
        px(box.top + _LABEL_PX - 4.5),
        mark(kind, 0, 0),
    )


def _leader(kind: str, anchor: tuple[float, float], box: Box, anchors: Sequence[tuple[float, float]]) -> Markup:
    """A thin line from a mark to its label, unless they are side by side and no other mark is as near."""
    x, y = box.nearest(*anchor)
    distance = box.distance(*anchor)
    others = (box.distance(*other) for other in anchors if other is not anchor)
    if distance < 18 and distance + 6 < min(others, default=math.inf):
        return Markup("")
    line = Markup('<line class="leader {}" x1="{}" y1="{}" x2="{}" y2="{}"/>')
    return line.format(kind, px(anchor[0]), px(anchor[1]), px(x), px(y))


def _strip(network: Record, record: Record, unit: Unit, x: Axis, top: float, right: float, wide: bool) -> Markup:
    spread = record["distribution_ms"]
    middle = top + 20
    ticks = " ".join(f"M{px(x(value))} {px(middle - 7)}v14" for value in spread if x.low <= value <= x.high)
    p99 = record["percentiles_ms"]["99"]
    note = f"p50 {unit.write(record['median_ms'])} {unit.name}"
    if wide:
        note += f" · p99 {unit.write(p99)} {unit.name}" if p99 else ""
        note += f" · n {record['samples']:,}"
    room = int((right - text_width(note, _SMALL_PX) - 38) / text_width("n", _LABEL_PX, bold=True))
    return Markup(
        '<g class="{0}">{15}<text class="label" x="28" y="{1}">{2}</text>'
        '<text class="label-note" x="{3}" y="{1}" text-anchor="end">{4}</text>'
        '<line class="base" x1="{5}" x2="{6}" y1="{7}" y2="{7}"/><path class="rug" d="{8}"/>'
        '<rect class="half" x="{9}" y="{10}" width="{11}" height="14" rx="2"/>'
        '<line class="median" x1="{12}" x2="{12}" y1="{13}" y2="{14}"/></g>'
    ).format(
        colour_class(network),
        px(top + 4),
        short("unquantized" if network["role"] == "float" else label(network), max(10, room)),
        px(right),
        note,
        px(x.clipped(spread[0])),
        px(x.clipped(spread[99])),
        px(middle),
        ticks,
        px(x.clipped(spread[25])),
        px(middle - 7),
        px(max(2.0, x.clipped(spread[75]) - x.clipped(spread[25]))),
        px(x.clipped(record["median_ms"])),
        px(middle - 10),
        px(middle + 10),
        mark(colour_class(network), 14, top),
    )
