"""The picture of `faqd-deploy sensitivity`: what every rounding costs by itself, an SVG file of its own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from markupsafe import Markup

from faqd.fidelity import KEPT, RUINED
from faqd.files import written_beside
from faqd.quantize.sensitivity import KINDS, Kind

MOST = 40
"""Roundings that are drawn, the most expensive."""
LEAST = 1e-4
"""The left end of the axis: smaller distances are none that anybody sees."""
LIMITS = {1 - KEPT: "lost something", 1 - RUINED: "ruined"}
"""From these distances on, one rounding alone gives the outputs such a verdict."""
_WIDTH, _LEFT, _RIGHT, _TOP, _STEP, _NAME = 900, 330, 870, 64, 20, 44
_STYLE = Markup(
    "text{font:13px sans-serif;fill:#222}.small{font-size:11px;fill:#666}.grid{stroke:#ddd}"
    ".limit{stroke:#b33;stroke-dasharray:4 3}.activations{fill:#1565c0}.weights{fill:#e07b00}"
)


def write_chart(path: Path, record: dict[str, Any]) -> None:
    with written_beside(path) as temporary:
        temporary.write_text(chart(record), encoding="utf-8")


def chart(record: dict[str, Any]) -> str:
    """record: what `sensitivity` found. A row for a rounding, the most expensive first; the axis is logarithmic, and
    what is not finite stands at its right end."""
    parts = record["parts"][:MOST]
    largest = max([1.0, *(part["distance"] for part in parts if part["distance"] is not None)])
    first, last = round(math.log10(LEAST)), math.ceil(math.log10(largest))
    bottom = _TOP + _STEP * len(parts)

    def at(distance: float | None) -> float:
        power = last if distance is None else math.log10(max(distance, LEAST))
        return round(_LEFT + (power - first) / (last - first) * (_RIGHT - _LEFT), 1)

    drawn = [_sign(kind, _LEFT + 120 * index, 38, kind) for index, kind in enumerate(KINDS)]
    for power in range(first, last + 1):
        drawn.append(_upright("grid", at(10.0**power), bottom, f"{10.0**power:g}", bottom + 16))
    for limit, verdict in LIMITS.items():
        drawn.append(_upright("limit", at(limit), bottom, verdict, _TOP - 4))
    for row, part in enumerate(parts):
        y, place = _TOP + _STEP * row + _STEP // 2, part["place"]
        name = place if len(place) <= _NAME else f"…{place[1 - _NAME :]}"
        drawn.append(Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(_LEFT - 12, y + 4, name))
        drawn.append(_sign(part["kind"], at(part["distance"]), y))
    title = f"{record['network']} {record['bits']}: distance of the outputs with one rounding alone"
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img">'
        '<title>{2}</title><style>{3}</style><rect width="{0}" height="{1}" fill="#fff"/>'
        '<text x="10" y="20">{2}</text>{4}</svg>\n'
    ).format(_WIDTH, bottom + 28, title, _STYLE, Markup("").join(drawn))


def _sign(kind: Kind, x: float, y: float, name: str = "") -> Markup:
    """A disc or a square: a colour alone tells nothing on paper."""
    disc, square = '<circle class="{0}" cx="{1}" cy="{2}" r="5"/>', '<path class="{0}" d="M{1} {2}m-5 -5h10v10h-10z"/>'
    beside = '<text x="{3}" y="{4}">{5}</text>' if name else ""
    return Markup((disc if kind == "activations" else square) + beside).format(kind, x, y, x + 10, y + 4, name)


def _upright(kind: str, x: float, bottom: float, name: str, y: float) -> Markup:
    return Markup(
        '<line class="{0}" x1="{1}" x2="{1}" y1="{2}" y2="{3}"/>'
        '<text class="small" x="{1}" y="{5}" text-anchor="middle">{4}</text>'
    ).format(kind, x, _TOP, bottom, name, y)
