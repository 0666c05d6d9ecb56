"""What students compute in float, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table
from rich.text import Text

from faqd.benchmarks.report.figures import Record, all_int8, label, line_of, partly_float
from faqd.bundle import floats_in_words

SHOWN_ISLANDS = 10


def new_table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def island_tables(result: Record) -> Iterator[Table]:
    """What students compute in float; one table for those that are equal in this, as of one network in several bits."""
    students = [(network, bundle["islands"]) for network, bundle in partly_float(result) if bundle["islands"]]
    for i, (_, islands) in enumerate(students):
        if islands in [others for _, others in students[:i]]:
            continue
        table = new_table()
        table.add_column("float island", justify="right", no_wrap=True)
        names = ", ".join(label(network) for network, others in students if others == islands)
        table.add_column(f"operators in float of {names}", overflow="fold")
        table.add_column("line", overflow="fold")
        for number, island in enumerate(islands[:SHOWN_ISLANDS], 1):
            operators = ", ".join(f"{place} ({operator})" for place, operator in island["operators"].items())
            table.add_row(str(number), Text(operators), Text(line_of(island)))
        if len(islands) > SHOWN_ISLANDS:
            table.add_row(
                "…", f"{len(islands) - SHOWN_ISLANDS} more, in the record (--json) and the page (--report)", ""
            )
        yield table


def what_is_float(result: Record) -> list[str]:
    lines = [f"{label(network)}: {'; '.join(floats_in_words(bundle))}" for network, bundle in partly_float(result)]
    return [*lines, *filter(None, [all_int8(result)])]
