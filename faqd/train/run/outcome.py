"""What a finished distillation was good for, in one sentence."""

from __future__ import annotations

from typing import Any

from faqd.fidelity import kept_at, rounded, verdict

HARDLY = 0.1
"""Of the measure before training: the least gain for which training is said to have helped; less is about what another
calibration or another seed makes."""
HARDLY_OF_ALL = 0.005
"""The same as a distance of the outputs: half a percent of what the teacher tells of an image."""


def outcome(record: dict[str, Any]) -> str | None:
    """record: of a run, finished. None for a student from scratch, which began with nothing that it could be held
    against."""
    kept = record.get("kept")
    if kept is None or kept["measure"] is None or kept["untrained"] is None:
        return None
    before, after = kept["untrained"], kept["measure"]
    if kept["iteration"] == 0:
        told = "training did not help, and the untrained student is kept"
    elif before - after < max(HARDLY * before, HARDLY_OF_ALL if _by_distance(record["recipe"]) else 0.0):
        told = "training hardly helped"
    else:
        told = "training helped"
    same = "" if told == "training helped" else "; `faqd-deploy ptq`, which takes a minute, does as well"
    return f"{told}: {_figures(record['recipe'], before, after)}{same}."


def _by_distance(recipe: dict[str, Any]) -> bool:
    return recipe["select"] is None and not recipe["label_weight"]


def _figures(recipe: dict[str, Any], before: float, after: float) -> str:
    if recipe["select"] is not None:
        return f"{recipe['select']} gives {abs(before):.4g} untrained and {abs(after):.4g} for what is kept"
    if recipe["label_weight"]:
        return f"a loss of {before:.4g} untrained and {after:.4g} for what is kept"
    first, last = map(kept_at, (before, after))
    figures = rounded(last) if after == before else f"{rounded(first)} before, {rounded(last)} after"
    return f"on the validation split fidelity {figures} (of its teacher: {verdict(last)})"
