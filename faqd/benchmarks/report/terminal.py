"""The record of a bench run as tables for a terminal, at most 100 columns wide."""

from __future__ import annotations

from typing import IO, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from faqd.benchmarks.record.compare import in_full
from faqd.benchmarks.report.figures import (
    NONE,
    Record,
    Unit,
    bits,
    bootstrap_in_words,
    compared,
    complaint,
    device,
    difference_of,
    first_batch,
    in_words,
    judged_by_metric,
    judged_files,
    kib,
    kind,
    label,
    latency_at,
    number,
    of_source,
    percent,
    points,
    significant,
    speed_up_at,
    time_unit,
    times,
    unit_for,
)
from faqd.benchmarks.report.terminal_floats import island_tables, new_table, what_is_float

WIDTH = 100


def console_for(stream: IO[str]) -> Console:
    """Colours on a terminal; plain text of a fixed width elsewhere."""
    console = Console(file=stream, highlight=False)
    return console if console.is_terminal else Console(file=stream, highlight=False, width=WIDTH, no_color=True)


def print_result(result: Record, console: Console) -> None:
    for network in result["networks"]:
        files = judged_files(result, network) if network["role"] == "student" else []
        if any(file.kept for file in files):  # older records know no fidelity
            console.print(Text(f"{label(network)}, proof and what is kept of its teacher:"))
            for judged in files:
                console.print(Text(f"  {in_words(judged)}"))
    console.print(_main_table(result))
    if any(network["latency"] for network in result["networks"]):
        console.print(_latency_table(result))
    more = (_device_table(result), _energy_table(result), _sweep_table(result), _layer_table(result))
    for table in (*more, *island_tables(result)):
        if table is not None:
            console.print(table)
    for line in (*_metrics(result), *what_is_float(result)):
        console.print(Text(line))
    for note in (_legend(result), *result["notes"]):
        console.print(Text(note), style="dim", soft_wrap=False)


def print_comparison(comparison: Record, console: Console) -> None:
    table = new_table()
    table.add_column("network", overflow="fold")
    for title in ("measure", "batch", "before", "after", "change %", "verdict"):
        table.add_column(title, justify="right", no_wrap=True)
    for change in comparison["changes"]:
        relative = change["relative_change"]
        cells = [
            in_full(change),
            change["measure"],
            str(change["batch"] or NONE),
            *(f"{change[key]:.4g}" for key in ("before", "after")),
            NONE if relative is None else f"{100 * relative:+.1f}",
            change["verdict"],
        ]
        table.add_row(*map(Text, cells))
    console.print(table)
    for reason in comparison["not_compared_because"]:
        console.print(Text(f"{reason}."), style="dim")


def _main_table(result: Record) -> Table:
    batch = first_batch(result)
    table = new_table()
    table.add_column("network\nkind", overflow="fold", min_width=14)
    table.add_column("bits\nw/a", justify="right", no_wrap=True)
    for title in (
        "top-1 %\n95 %",
        "gap to\nteacher",
        "agreement %\n95 %",
        "KiB int8/\npacked, f32",
        f"p50 {time_unit(result).name}\np99, b{batch}",
        "× float\n× teacher",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for network in compared(result):
        table.add_row(*(Text(cell) for cell in _cells(result, network, batch)))
    return table


def _cells(result: Record, network: Record, batch: int) -> list[str]:
    accuracy = network["accuracy"] or {}
    latency, unit = latency_at(network, batch), time_unit(result)
    over = [times(speed_up_at(network, batch, baseline)) for baseline in ("own_float", "teacher")]
    return [
        "\n".join(filter(None, (network["name"], kind(network), complaint(result, network)))),
        bits(network),
        _share(accuracy.get("top1")),
        _gap(accuracy.get("gap_to_teacher")),
        _share(accuracy.get("agreement")),
        _size(network),
        f"{unit.write(latency['median_ms'])}\n{unit.write(latency['percentiles_ms']['99'])}" if latency else NONE,
        "\n".join(over) if network["role"] == "student" else NONE,
    ]


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
    table = new_table()
    unit = time_unit(result)
    table.add_column(f"latency in {unit.name}", overflow="fold")
    percentiles = (f"p{p:g}" for p in result["switches"]["percentiles"])
    for title in ("batch", "queries", "min", "p50", *percentiles, "images/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for batch in result["switches"]["batch"]:
        for network in result["networks"]:
            record = latency_at(network, batch)
            if record:
                table.add_row(*(Text(cell) for cell in _latency_cells(network, record, unit)))
    return table


def _latency_cells(network: Record, record: Any, unit: Unit) -> list[str]:
    percentiles = [unit.write(value) for value in record["percentiles_ms"].values()]
    return [
        _name(network),
        str(record["batch"]),
        f"{record['samples']:,}",
        unit.write(record["min_ms"]),
        unit.write(record["median_ms"]),
        *percentiles,
        significant(record["throughput_images_per_s"]),
    ]


def _device_table(result: Record) -> Table | None:
    """The parts of a query on a GPU, and both ways to submit."""
    rows = [(network, latency) for network in result["networks"] for latency in network["latency"] if latency["parts"]]
    if not rows:
        return None
    table = new_table()
    unit = time_unit(result)
    table.add_column(f"medians in {unit.name}", overflow="fold")
    titles = ("batch", "enqueue", "H2D", "compute", "D2H", "queries/s\nclosed loop", "queries/s\none ahead")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for network, latency in rows:
        cells = [
            _name(network),
            str(latency["batch"]),
            *(unit.write(latency["parts"][part]["median_ms"]) for part in ("enqueue", "h2d", "compute", "d2h")),
            significant(latency["throughput_queries_per_s"]),
            significant(latency["one_ahead"]["throughput_queries_per_s"]),
        ]
        table.add_row(*map(Text, cells))
    return table


def _energy_table(result: Record) -> Table | None:
    rows = [network for network in result["networks"] if network["energy"]]
    if not rows:
        return None
    table = new_table()
    table.add_column(f"energy, {result['energy']['rail']} ({result['energy']['source']})", overflow="fold")
    for title in ("batch", "images", "idle W", "load W", "mJ/image above idle"):
        table.add_column(title, justify="right", no_wrap=True)
    for network in rows:
        energy = network["energy"]
        numbers = (energy["idle_w"], energy["load_w"], energy["energy_per_image_mj"])
        images = f"{energy['queries'] * energy['batch']:,}"
        cells = [_name(network), str(energy["batch"]), images, *map(number, numbers)]
        table.add_row(*map(Text, cells))
    return table


def _sweep_table(result: Record) -> Table | None:
    rows = [network for network in result["networks"] if network["sweep"]]
    if not rows:
        return None
    table = new_table()
    table.add_column("throughput against batch", overflow="fold")
    for title in ("saturated at", "best images/s", "at batch", "images/s at batch 1"):
        table.add_column(title, justify="right", no_wrap=True)
    for network in rows:
        sweep = network["sweep"]
        points = sweep["points"]
        if not points:
            continue
        best = max(points, key=lambda point: float(point["throughput_images_per_s"]))
        cells = [
            _name(network),
            str(sweep["saturated_at_batch"] or NONE),
            significant(best["throughput_images_per_s"]),
            str(best["batch"]),
            significant(points[0]["throughput_images_per_s"]),
        ]
        table.add_row(*map(Text, cells))
    return table


SHOWN_LAYERS = 10


def _layer_table(result: Record) -> Table | None:
    """The slowest layers of the first student."""
    student = next(network for network in result["networks"] if network["role"] == "student")
    if not student["layers"]:
        return None
    layers = sorted(student["layers"]["layers"], key=lambda layer: -float(layer["share"]))
    table = new_table()
    table.add_column(f"slowest of {len(layers)} layers of {label(student)}", overflow="fold")
    unit = unit_for(float(layers[0]["mean_ms"]))
    for title in ("kind", f"mean {unit.name}", "share %"):
        table.add_column(title, justify="right", no_wrap=True)
    for layer in layers[:SHOWN_LAYERS]:
        cells = [layer["name"], layer["kind"], unit.write(layer["mean_ms"]), f"{100 * layer['share']:.1f}"]
        table.add_row(*map(Text, cells))
    return table


def _metrics(result: Record) -> list[str]:
    judged = judged_by_metric(result)
    lines = [f"{result['metric']['source']}:"] if judged else []
    for network, file, source in judged:
        figures = ", ".join(
            f"{name} {value:.4g}{f', {difference}' if (difference := difference_of(source, name)) else ''}"
            for name, value in source["metric"].items()
        )
        lines.append(f"  {label(network)}{f', {file}' if file else ''}: {figures}")
    if explained := bootstrap_in_words(result):
        lines.append(explained)
    for network in result["networks"]:
        if network["sustained"]:
            sustained = network["sustained"]
            lines.append(
                f"{label(network)}: after {sustained['minutes']:g} minutes under load "
                f"{100 * sustained['throughput_kept']:.1f} % of the throughput at the beginning"
            )
    return lines


def _name(network: Record) -> str:
    return "  unquantized" if network["role"] == "float" else label(network)


def _legend(result: Record) -> str:
    images = f"{result['evaluation']['images']:,} images{of_source(result)}"
    if not result["evaluation"]["labels"]:
        stands = "agreement with" if result["evaluation"]["classification"] else "fidelity to"
        images += f" without labels: {stands} the teacher stands for accuracy"
    if result["switches"]["skip_latency"]:
        return f"{images}; latency was not measured."
    return (
        f"{images}; latency on {device(result)}{_how(result['switches'])}, closed loop, all networks in turn within "
        f"each of {result['switches']['rounds']} rounds; speed-ups (×), over the same graph in float and "
        "over the teacher, are paired medians."
    )


def _how(switches: Record) -> str:
    """The three switches that a latency on a GPU means nothing without."""
    if switches["preset"] is None:
        return ""
    named = {"cuda_graph": "CUDA graph", "spin_wait": "spin wait", "transfers": "transfers"}
    states = ", ".join(f"{name} {'on' if switches[key] else 'off'}" for key, name in named.items())
    if switches.get("zero_copy"):
        states += ", zero copy"
    streams = switches.get("inf_streams") or 1  # Records of before had one.
    return f" ({switches['preset']}: {states}{f', {streams} streams ahead' if streams > 1 else ''})"
