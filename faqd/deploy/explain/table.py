"""An explanation, printed for people: one line per layer, then what to change, each rule once."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from faqd.bundle import float32_in_words
from faqd.deploy.verify.table import WIDTH
from faqd.saturation import HIGHEST

PLACES = 8
"""Lines per rule; JSON has them all."""
_VERDICT = {True: "INT8", False: "float", None: "refused"}


def print_explanation(record: dict[str, Any]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH, no_color=True)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("layer", "operator", "weights", "inputs", "runs in", "rule"):
        table.add_column(column, overflow="fold")
    for row in record["layers"]:
        rule = row["rule"]
        cells = (row["module"] or row["node"], row["operator"], row["weights"], row["inputs"])
        verdict = _VERDICT[row["int8"]] + ("" if row["source"] == record["source"] else " (rule)")
        if row["contradicts_rules"]:
            verdict += " (not as the rules say)"
        table.add_row(*map(Text, (*cells, verdict, "" if rule is None else rule["name"])))
    console.print(table)
    lines = [f"{record['file']}: {_summary(record['layers'])}; source: {record['source']}."]
    lines += [f"{record['note']}."] if record["note"] else []
    for (says, cure), found in _broken(record).items():
        lines += [f"{says} {cure}", *(f"  {text}" for text in found[:PLACES])]
        lines += [f"  and {len(found) - PLACES} more"] if len(found) > PLACES else []
    lines += _saturating(record["integer_sums"])
    lines += float32_in_words([part["reason"] for part in record["float32_parts"]], PLACES)
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _saturating(sums: list[dict[str, Any]]) -> list[str]:
    """What onnxruntime makes of the file on some CPUs."""
    found = [row for row in sums if row["saturates"]]
    if not found:
        return []
    named = [f"  {row['module'] or row['node']}: {row['largest_pair']:,}" for row in found]
    more = [f"  and {len(found) - PLACES} more"] if len(found) > PLACES else []
    return [
        "On x86 CPUs with AVX2 and no VNNI, onnxruntime adds two neighbouring products in int16, which holds "
        f"{HIGHEST:,} and saturates. In {len(found)} of {len(sums)} layers of unsigned inputs and signed weights they "
        "can come to more, and the file gives other values there than elsewhere. faqd's own files stay below; with "
        "another tool use weights of 7 bits (onnxruntime's reduce_range), or unsigned ones.",
        *named[:PLACES],
        *more,
    ]


def _disproved(row: dict[str, Any]) -> bool:
    """Whether a build runs a layer in INT8 that a rule calls float or refused: there is nothing to cure."""
    return bool(row["int8"]) and row["rule"]["effect"] != "inexact"


def _summary(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "no convolution or linear layer"
    if all(row["int8"] is None for row in rows):
        return f"TensorRT takes no such file, so none of its {len(rows)} layers runs"
    return f"{sum(bool(row['int8']) for row in rows)} of {len(rows)} convolutions and linear layers run in INT8"


def _broken(record: dict[str, Any]) -> dict[tuple[str, str], list[str]]:
    """By what a rule says and how to keep to it: the places that break it, in layers first."""
    rows = [row for row in record["layers"] if row["rule"] is not None and not _disproved(row)]
    broken = [(row["rule"], f"{row['module'] or row['node']}: {row['rule']['found']}") for row in rows]
    in_layers = {row["rule"]["found"] for row in rows}
    elsewhere = [entry for entry in record["refused"] if entry["found"] not in in_layers]
    places: dict[tuple[str, str], list[str]] = {}
    for rule, text in [*broken, *((entry["rule"], entry["found"]) for entry in elsewhere)]:
        places.setdefault((rule["says"], rule["cure"]), []).append(text)
    return places
