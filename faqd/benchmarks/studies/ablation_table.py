"""Means over seeds, paired differences with their intervals, and the table in markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

# Two-sided 95 % points of Student's t by degrees of freedom; beyond the last the normal's would be 5 % too narrow.
T_95 = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228,
    11: 2.201, 12: 2.179, 13: 2.160, 14: 2.145, 15: 2.131, 16: 2.120, 17: 2.110, 18: 2.101, 19: 2.093, 20: 2.086,
}  # fmt: skip


def summary(cells: Sequence[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """One row per method and bits, in the order of `cells`, with the difference to the baseline at the same bits.

    Accuracies as fractions. std: of the sample. difference: its mean over seeds and the 95 % interval of that mean
    (Student's t over the seeds); None for the baseline itself and at bits that it does not have.
    """
    by_row: dict[tuple[str, str], dict[int, float]] = {}
    for cell in cells:
        by_row.setdefault((cell["method"], cell["bits"]), {})[cell["seed"]] = cell["accuracy"]
    rows = []
    for (method, bits), found in by_row.items():
        against = by_row.get((baseline, bits), {})
        pairs = [(value, against[seed]) for seed, value in found.items() if seed in against]
        rows.append(
            {
                "method": method,
                "bits": bits,
                "n": len(found),
                "mean": statistics.mean(found.values()),
                "std": statistics.stdev(found.values()),
                "difference": paired([a - b for a, b in pairs]) if pairs and method != baseline else None,
            }
        )
    return rows


def paired(differences: Sequence[float]) -> dict[str, float]:
    """Mean of at least two paired differences and its 95 % interval."""
    mean = statistics.mean(differences)
    t = T_95[min(len(differences) - 1, max(T_95))]
    half = t * statistics.stdev(differences) / math.sqrt(len(differences))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def markdown(result: dict[str, Any]) -> str:
    """Two tables: accuracy in percent, and points above or below the baseline. The float student has one column."""
    rows = {(row["method"], row["bits"]): row for row in result["table"]}
    methods = list(dict.fromkeys(method for method, _ in rows))
    bits = list(dict.fromkeys(pair for _, pair in rows))
    count = max(row["n"] for row in result["table"])
    accuracy = [[name, *[_mean(rows.get((name, pair))) for pair in bits]] for name in methods]
    differences = [[name, *[_difference(rows.get((name, pair))) for pair in bits]] for name in methods]
    return "\n".join(
        [
            f"Accuracy in %, mean ± std over {count} seeds, {result['images']} test images; teacher "
            f"{100 * result['teacher_accuracy']:.2f}.",
            "",
            *_table(["", *bits], accuracy),
            "",
            f"Points against {result['baseline']}, paired by seed, with the 95 % interval over seeds.",
            "",
            *_table(["", *bits], [row for row in differences if any(row[1:])]),
        ]
    )


def _mean(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{100 * row['mean']:.2f} ± {100 * row['std']:.2f}"


def _difference(row: dict[str, Any] | None) -> str:
    if row is None or row["difference"] is None:
        return ""
    mean, low, high = (100 * row["difference"][key] for key in ("mean", "low", "high"))
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
