"""What a finished distillation was good for, in one sentence."""

from __future__ import annotations

from typing import Any

from faqd.fidelity import rounded, verdict

HARDLY = 0.9
"""Of the measure before training: what is left of it where training was worth its time. Less of a gain than a tenth of
the error is about what another calibration or another seed makes."""


def outcome(record: dict[str, Any]) -> str | None:
    """record: of a run, finished. None for a student from scratch, which began with nothing that it could be held
    against."""
    kept = record.get("kept")
    if kept is None or kept["measure"] is None or kept["untrained"] is None:
        return None
    before, after = kept["untrained"], kept["measure"]
    if kept["iteration"] == 0:
        told = "training did not help, and the untrained student is kept"
    elif before > 0 and after > HARDLY * before:
        told = "training hardly helped"
    else:
        told = "training helped"
    same = "" if told == "training helped" else "; `faqd-deploy ptq`, which takes a minute, does as well"
    return f"{told}: {_figures(record['recipe'], before, after)}{same}."


def _figures(recipe: dict[str, Any], before: float, after: float) -> str:
    if recipe["select"] is not None:
        return f"{recipe['select']} gives {abs(before):.4g} untrained and {abs(after):.4g} for what is kept"
    if recipe["label_weight"]:
        return f"a loss of {before:.4g} untrained and {after:.4g} for what is kept"
    first, last = (max(0.0, 1 - distance) for distance in (before, after))
    figures = rounded(last) if after == before else f"{rounded(first)} before, {rounded(last)} after"
    return f"on the select split fidelity {figures} (of its teacher: {verdict(last)})"
