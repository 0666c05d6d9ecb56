"""The record of a bench run as tables for a terminal, at most 100 columns wide."""

from __future__ import annotations

from typing import IO, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from faqd.benchmarks.figures import (
    KIND,
    NONE,
    Record,
    bits,
    compared,
    device,
    first_batch,
    kib,
    latency_at,
    milliseconds,
    percent,
    points,
    significant,
    speed_up_at,
    times,
)

WIDTH = 100


def console_for(stream: IO[str]) -> Console:
    """Colours on a terminal; plain text of a fixed width elsewhere."""
    console = Console(file=stream, highlight=False)
    return console if console.is_terminal else Console(file=stream, highlight=False, width=WIDTH, no_color=True)


def print_result(result: Record, console: Console) -> None:
    console.print(_main_table(result))
    if any(network["latency"] for network in result["networks"]):
        console.print(_latency_table(result))
    for note in (_legend(result), *result["notes"]):
        console.print(Text(note), style="dim", soft_wrap=False)


def _main_table(result: Record) -> Table:
    batch = first_batch(result)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("network\nkind", overflow="fold", min_width=14)
    table.add_column("bits\nw/a", justify="right", no_wrap=True)
    for title in (
        "top-1 %\n95 %",
        "gap to\nteacher",
        "agrees %\n95 %",
        "KiB int8/\npacked, f32",
        f"p50 ms\np99, b{batch}",
        "× float\n× teacher",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for network in compared(result):
        table.add_row(*(Text(cell) for cell in _cells(network, batch)))
    return table


def _cells(network: Record, batch: int) -> list[str]:
    accuracy = network["accuracy"] or {}
    latency = latency_at(network, batch)
    over = [times(speed_up_at(network, batch, baseline)) for baseline in ("own_float", "teacher")]
    return [
        f"{network['name']}\n{_kind(network)}",
        bits(network),
        _share(accuracy.get("top1")),
        _gap(accuracy.get("gap_to_teacher")),
        _share(accuracy.get("agreement")),
        _size(network),
        f"{milliseconds(latency['median_ms'])}\n{milliseconds(latency['percentiles_ms']['99'])}" if latency else NONE,
        NONE if network["role"] == "teacher" else "\n".join(over),
    ]


def _kind(network: Record) -> str:
    return "float teacher" if network["role"] == "teacher" else KIND.get(network["kind"], str(network["kind"]))


def _share(share: Record | None) -> str:
    if share is None:
        return NONE
    low, high = (percent(share[key], share["n"]) for key in ("low", "high"))
    return f"{percent(share['value'], share['n'])}\n{low}–{high}"


def _gap(gap: Record | None) -> str:
    if gap is None:
        return NONE
    low, high = (points(gap[key], gap["n"]) for key in ("low", "high"))
    return f"{points(gap['value'], gap['n'])}\n{low} … {high}"


def _size(network: Record) -> str:
    size = network["size"]
    if size is None:
        return f"{NONE}\n≈{kib(network['file_bytes'])}" if network["file_bytes"] else NONE
    if network["role"] == "teacher":
        return f"{NONE}\n{kib(size['float32_bytes'])}"
    return f"{kib(size['int8_bytes'])}/{kib(size['packed_bytes'])}\n{kib(size['float32_bytes'])}"


def _latency_table(result: Record) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("latency in ms", overflow="fold")
    for title in ("batch", "queries", "min", "p50", "p90", "p95", "p99", "variation %", "images/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for batch in result["switches"]["batch"]:
        for network in result["networks"]:
            record = latency_at(network, batch)
            if record:
                table.add_row(*(Text(cell) for cell in _latency_cells(network, record)))
    return table


def _latency_cells(network: Record, record: Any) -> list[str]:
    percentiles = [milliseconds(value) for value in record["percentiles_ms"].values()]
    return [
        "  its float graph" if network["role"] == "float" else network["name"],
        str(record["batch"]),
        f"{record['samples']:,}",
        milliseconds(record["min_ms"]),
        milliseconds(record["median_ms"]),
        *percentiles,
        f"{100 * record['coefficient_of_variation']:.1f}",
        significant(record["throughput_images_per_s"]),
    ]


def _legend(result: Record) -> str:
    images = f"{result['evaluation']['images']:,} images"
    if not result["evaluation"]["labels"]:
        images += " without labels: agreement with the teacher stands for accuracy"
    if result["switches"]["skip_latency"]:
        return f"{images}; latency was not measured."
    return (
        f"{images}; latency on {device(result)}, all networks in turn within each of "
        f"{result['switches']['rounds']} rounds; speed-ups (×), over the same graph in float and "
        "over the teacher, are paired medians."
    )
