"""The verdict of a recovery, with its reason and what would help, and the table of its steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from faqd.bundle import WORTH_INT8
from faqd.fidelity import RUINED, rounded
from faqd.sweep import table
from faqd.train.recover.record import RUNS, Step, best_of, steps_of


def verdict_of(record: dict[str, Any], verified: dict[str, Any]) -> dict[str, Any]:
    """By the worst file of the bundle, on the evaluation images, as its proof measured it. verified: verify.json.

    `accepted` from the fidelity that was asked for on, `hopeless` where most of the teacher is gone, else `regressed`.
    """
    worst = min(verified["fidelity"].values(), key=lambda each: float(each["least"]))
    least, images, enough = float(worst["least"]), worst["images"], record["asked"]["enough"]
    recipe, steps = record["asked"]["recipe"], steps_of(record)
    best = best_of(steps)
    assert best is not None
    found = f"fidelity {rounded(least)} on {images} evaluation image{'' if images == 1 else 's'}"
    if not verified["passed"]:
        reason = f"{found}, and the files are not proved: {verified['failures'][0]}."
        return {"word": "regressed", "fidelity": least, "reason": reason, "help": ""}
    if least >= enough:
        share = f"{100 * best.int8_share:.1f} % of its multiply-accumulates are in INT8"
        return {"word": "accepted", "fidelity": least, "reason": f"{found}, {enough:g} is enough; {share}.", "help": ""}
    word, lost = "regressed", "something is lost"
    if least < RUINED:
        word, lost = "hopeless", "more than half of what the teacher tells of an image is gone"
    bits, plain = f"{recipe['weight_bits']}/{recipe['act_bits']}", rounded(steps[0].candidates[0].fidelity)
    reason = f"{found}, {enough:g} was asked for: {lost} at {bits} bits. Plain rounding began with {plain}."
    return {"word": word, "fidelity": least, "reason": reason, "help": _help(record, best)}


def _help(record: dict[str, Any], best: Step) -> str:
    """What to try next, the likeliest first."""
    recipe, steps = record["asked"]["recipe"], steps_of(record)
    if best.fidelity >= record["asked"]["enough"]:
        margin = f"{(1 + best.fidelity) / 2:.3g}"
        return (
            f"On the validation split it is {rounded(best.fidelity)}, so the search ended: ask for more with "
            f"--min-fidelity {margin}, or give more images."
        )
    floats = next((step for step in steps if step.name == "keep-float"), None)
    half_float = floats is not None and floats.taken == "not worth it" and floats.int8_share < WORTH_INT8
    advice = []
    if recipe["weight_bits"] < 8 or recipe["act_bits"] < 8:
        advice.append("more bits (--weight-bits, --act-bits)")
    if not half_float:
        advice.append(f"more layers float (--keep-float {2 * record['asked']['keep_float'] or 5})")
    if any(step.name in RUNS and step.taken == "taken" for step in steps):
        advice.append("a longer training (--epochs)")
    advice.append("more images, like those of the task")
    told = (
        f"What would help, in another --out: {'; '.join(advice)}. `faqd-deploy sensitivity` says what each layer costs."
    )
    if floats is None or not half_float:
        return told
    reached = f"{floats.what} would reach {rounded(floats.fidelity)} and leave {100 * floats.int8_share:.1f} % in INT8"
    return f"{told} {reached}, where the float network is the better choice."


def lines(record: dict[str, Any]) -> Iterator[str]:
    """The table, a row for each step and those of the candidates of the first, and the verdict."""
    steps, verdict = steps_of(record), record["verdict"]
    yield from table(list(_rows(steps)))
    yield f"{sum(step.seconds for step in steps):.0f} s in all, with the bundles and their proofs."
    yield f"{verdict['word']}: {verdict['reason']}{' ' * bool(verdict['help'])}{verdict['help']}"


def _rows(steps: Sequence[Step]) -> Iterator[dict[str, str]]:
    """change: from the best before; in the first step, from the plainest."""
    best, *others = steps
    taken = min(range(len(best.candidates)), key=lambda index: best.candidates[index].distance)
    before = best.candidates[0].fidelity
    for index, each in enumerate(best.candidates):
        yield _row(each, each.fidelity - before if index else None, "taken" if index == taken else "no better")
    before = best.fidelity
    for step in others:
        yield _row(step, step.fidelity - before, step.taken)
        before = step.fidelity if step.taken == "taken" else before


def _row(step: Step, change: float | None, taken: str) -> dict[str, str]:
    return {
        "step": step.what,
        "fidelity": rounded(step.fidelity),
        "change": "" if change is None else f"{change:+.3f}",
        "INT8": f"{100 * step.int8_share:.1f} %",
        "seconds": f"{step.seconds:.0f}",
        "": taken,
    }
