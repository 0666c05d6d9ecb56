"""What to keep float: the roundings of a network that is quantized without training, by what each costs its outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from faqd import __version__
from faqd.bundle import WORTH_INT8
from faqd.deploy.mixed_precision import estimating, trial_in_words
from faqd.deploy.write_bundle import Calibration, quantized_float
from faqd.errors import UserError
from faqd.fidelity import VERDICTS, kept_at, rounded, verdict
from faqd.quantize.config import QuantConfig
from faqd.quantize.sensitivity import KINDS, Part, Sensitivity, Trial

SHOWN_PARTS = 10


def sensitivity(
    teacher: str,
    teacher_weights: Path | None,
    data: dict[str, Any],
    bits: QuantConfig,
    calibration: Calibration,
    images: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The record: every rounding alone, then the student with ever more of them left out.

    data: fields of DataOptions. images: how many of the validation split are looked at; no scale is chosen on them.
    docs/commands.md says what each key holds.
    """
    made = quantized_float(teacher, teacher_weights, data, bits, calibration, say)
    seen = made.select_images(images)
    if len(seen) < 2:
        raise UserError("two images of the validation split are needed at least; give more data.")
    asked = Sensitivity(made.untrained.student, seen, made.batches, made.untrained.method)
    parts = asked.parts(estimating("roundings", say))
    if not parts:
        raise UserError(f"{bits.label}: nothing is rounded; give weights or activations 1 to 8 bits.")
    trials = []
    for trial in asked.trials(parts):
        trials.append(trial)
        say(f"tried: {trial_in_words(trial)}")
    return {
        "what": "every quantizer alone, by the distance of the outputs, and what stays with the worst left float",
        "faqd": __version__,
        "network": made.teacher.source.name,
        "bits": bits.label,
        "calibration": made.untrained.method,
        "equalized": [] if made.untrained.equalized is None else list(made.untrained.equalized.tensors),
        "asymmetric": made.untrained.asymmetric,
        "images": len(seen),
        "alone": {kind: kept_at(asked.all_of(kind)) for kind in KINDS},
        "parts": [_part_to_json(part) for part in parts],
        "trials": [vars(trial) | {"verdict": verdict(trial.fidelity)} for trial in trials],
    }


def lines(record: dict[str, Any]) -> Iterator[str]:
    """What a terminal shows of it."""
    parts = record["parts"]
    yield f"{record['network']} {record['bits']}: {len(parts)} roundings, each alone, on {record['images']} images."
    alone = (f"all {kind} and nothing else: fidelity {rounded(kept)}" for kind, kept in record["alone"].items())
    yield f"Rounded are {'; '.join(alone)}."
    yield "Distance of the outputs, 0: equal, 1: no better than a constant; what has to stay float for a rounding to go"
    yield "(and its share of the multiply-accumulates); channels of which the rounding leaves zeros:"
    width = max(len(part["place"]) for part in parts[:SHOWN_PARTS])
    for part in parts[:SHOWN_PARTS]:
        distance = "not finite" if part["distance"] is None else f"{part['distance']:.4f}"
        channels = part["channels"]
        lost = f", {channels['lost']} of {channels['count']} channels lost" if channels and channels["lost"] else ""
        yield (
            f"  {part['place']:{width}}  {distance:>10}  {part['kind']:11}  {', '.join(part['readers'])} "
            f"({100 * part['int8_share']:.1f} %){lost}"
        )
    trials = [Trial(**{key: value for key, value in each.items() if key != "verdict"}) for each in record["trials"]]
    yield f"All rounded: {trial_in_words(trials[0])}."
    best = cure(trials)
    if best is not None:
        yield f"Better: {trial_in_words(best)}:"
        yield f"  --exclude '{best.exclude}'"
    elif verdict(trials[0].fidelity) != "kept":
        yield "No few layers are to blame: train it (`faqd-train distill`), or give it more bits."


def cure(trials: Sequence[Trial]) -> Trial | None:
    """Of those with a better verdict than the first, in which nothing is float, and INT8 is worth it, the best with the
    fewest places float; None where there is none."""
    worth = [trial for trial in trials if trial.int8_share >= WORTH_INT8]
    better = [trial for trial in worth if _rank(trial) > _rank(trials[0])]
    return max(better, key=lambda trial: (_rank(trial), -trial.floats), default=None)


def _rank(trial: Trial) -> int:
    return VERDICTS.index(verdict(trial.fidelity))


def _part_to_json(part: Part) -> dict[str, Any]:
    return asdict(part) | {"distance": part.distance if math.isfinite(part.distance) else None}
