"""The report's pictures of throughput against batch size and over time."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from faqd.benchmarks.report.figures import Record, significant
from faqd.benchmarks.report.svg import Axis, axis_name, colour_class, grid, mark, nice_ticks, px, svg

LEFT, RIGHT, TOP, BOTTOM, HEIGHT = 62.0, 14.0, 18.0, 46.0, 320


def throughput_against_batch(result: Record, width: int) -> Markup | None:
    """One line per network over the batch sizes of the sweep; None where there was none."""
    rows = [network for network in result["networks"] if network["sweep"] and network["sweep"]["points"]]
    if not rows:
        return None
    batches = sorted({point["batch"] for network in rows for point in network["sweep"]["points"]})
    most = max(point["throughput_images_per_s"] for network in rows for point in network["sweep"]["points"])
    x = Axis(0.8, max(batches) * 1.25, LEFT, width - RIGHT, tuple(_thinned(batches, width)), log=True)
    y = _up_from_zero(most)
    lines = [
        _line(
            network,
            [(x(p["batch"]), y(p["throughput_images_per_s"])) for p in network["sweep"]["points"]],
        )
        for network in rows
    ]
    parts = [_frame(x, y, width), axis_name(x, "batch size", HEIGHT - 8), _title("images per second"), *lines]
    return svg(parts, width, HEIGHT, "Images per second against batch size")


def sustained_throughput(result: Record, width: int) -> Markup | None:
    """Throughput of the one network that was kept under load, window by window; None where none was."""
    network = next((network for network in result["networks"] if network["sustained"]), None)
    if network is None:
        return None
    windows = network["sustained"]["windows"]
    end = max(window["start_s"] + window["duration_s"] for window in windows)
    x = Axis(0.0, end, LEFT, width - RIGHT, tuple(tick for tick in nice_ticks(0.0, end, 6) if tick <= end))
    y = _up_from_zero(max(window["throughput_images_per_s"] for window in windows))
    middle = [(x(w["start_s"] + w["duration_s"] / 2), y(w["throughput_images_per_s"])) for w in windows]
    parts = [_frame(x, y, width), axis_name(x, "seconds", HEIGHT - 8), _title("images per second")]
    return svg([*parts, _line(network, middle)], width, HEIGHT, "Images per second over time under load")


def _thinned(batches: Sequence[int], width: int) -> list[int]:
    """As many tick labels as there is room for."""
    step = 1 if width > 600 else 2
    return list(batches[::step])


def _up_from_zero(most: float) -> Axis:
    ticks = nice_ticks(0.0, most, 5)
    return Axis(0.0, max(ticks[-1], most), HEIGHT - BOTTOM, TOP + 10, tuple(ticks))


def _frame(x: Axis, y: Axis, width: int) -> Markup:
    return grid(x, y, LEFT, width - RIGHT, TOP + 10, HEIGHT - BOTTOM, _amount)


def _amount(value: float) -> str:
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.4g} {unit}"
    return f"{value:.4g}" if value < 100 else significant(value)


def _title(text: str) -> Markup:
    return Markup('<text class="axis-name" x="6" y="12">{}</text>').format(text)


def _line(network: Record, points: Sequence[tuple[float, float]]) -> Markup:
    path = " ".join(f"{'L' if index else 'M'}{px(x)} {px(y)}" for index, (x, y) in enumerate(points))
    kind = colour_class(network)
    marks = Markup("").join(mark(kind, x, y) for x, y in points) if len(points) <= 20 else Markup("")
    return Markup('<g class="{}"><title>{}</title><path class="curve" d="{}"/>{}</g>').format(
        kind, network["name"], path, marks
    )
