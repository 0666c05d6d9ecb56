"""The report's picture of time per layer, coloured by what a layer computes in."""

from __future__ import annotations

from markupsafe import Markup

from faqd.benchmarks.report.figures import Record, unit_for
from faqd.benchmarks.report.label_layout import text_width
from faqd.benchmarks.report.svg import px, short, svg

KINDS = {
    "int8": "product in INT8",
    "float": "product in float",
    "conversion": "change of type or layout",
    "other": "anything else",
    "unknown": "not named in the engine's record",
}
MOST = 20
"""Layers that are drawn, the slowest; the others are summed up in one bar."""
_STEP, _LABEL_PX, _SMALL_PX = 34, 13, 12


def kinds_in(network: Record) -> list[str]:
    """The kinds of its layers, in the order of KINDS."""
    return [kind for kind in KINDS if any(layer["kind"] == kind for layer in network["layers"]["layers"])]


def time_per_layer(network: Record, path: str, width: int) -> Markup:
    """A bar per layer in the order of execution, with its mean in ms. path: of `network` in the JSON."""
    layers = network["layers"]["layers"]
    slowest = sorted(range(len(layers)), key=lambda index: -layers[index]["mean_ms"])[:MOST]
    drawn = sorted(slowest)
    most = max(layers[index]["mean_ms"] for index in drawn) or 1.0
    unit = unit_for(most)
    left, right = 6.0, width - 10.0
    parts = []
    for row, index in enumerate(drawn):
        layer, top = layers[index], row * _STEP + 6.0
        number = unit.write(layer["mean_ms"])
        room = int(
            (right - left - text_width(f"{number} {unit.name}", _SMALL_PX) - 20) / text_width("n", _LABEL_PX, bold=True)
        )
        parts.append(
            Markup(
                '<g class="kind-{0}"><title>{1}: {2}</title><text class="layer" x="{3}" y="{4}">{5}</text>'
                '<text class="label-note" x="{6}" y="{4}" text-anchor="end">'
                '<tspan data-json="{7}/layers/layers/{8}/mean_ms" data-scale="{12:g}">{9}</tspan> {13}</text>'
                '<rect class="time" x="{3}" y="{10}" width="{11}" height="8" rx="2"/></g>'
            ).format(
                layer["kind"],
                layer["name"],
                KINDS[layer["kind"]],
                px(left),
                px(top + 12),
                short(layer["name"], max(10, room)),
                px(right),
                path,
                index,
                number,
                px(top + 17),
                px(max(1.5, (right - left) * layer["mean_ms"] / most)),
                unit.per_ms,
                unit.name,
            )
        )
    return svg(parts, width, _STEP * len(drawn) + 10, f"Time per layer of {network['name']} in {unit.name}")
