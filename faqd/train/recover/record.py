"""recover.json: what a recovery was asked for, what each step of it gave, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from faqd import __version__
from faqd.errors import UserError
from faqd.fidelity import kept_at
from faqd.files import leftovers, read_json, refuse_unmakeable, write_json
from faqd.train.run.folder import differences

FORMAT = "faqd-recovery"
VERSION = 1
RECORD = "recover.json"
BUNDLE = "bundle"
"""In the same folder: that of the best so far."""
RUNS = {"distilled": "run", "distilled-float": "run-float"}
"""In the same folder, by the step that trains into it."""

StepName = Literal["ptq", "keep-float", "distilled", "distilled-float"]
Taken = Literal["taken", "no better", "not worth it"]


@dataclass(frozen=True)
class Step:
    """One step, or one of the candidates of the first. what: it was, in words. distance: of the outputs on the images
    that all steps are judged on. int8_share: of the multiply-accumulates. seconds: with its bundle, where it is taken.
    exclude: what stays float. start: how a student without training was made. trials: of the search for what stays
    float."""

    name: StepName
    what: str
    distance: float
    int8_share: float
    seconds: float
    taken: Taken
    exclude: tuple[str, ...] = ()
    start: dict[str, Any] | None = None
    candidates: tuple[Step, ...] = ()
    trials: tuple[dict[str, Any], ...] = ()

    @property
    def fidelity(self) -> float:
        return kept_at(self.distance)

    def to_json(self) -> dict[str, Any]:
        """JSON knows no infinity: an infinite distance is null."""
        found = {**asdict(self), "distance": self.distance if math.isfinite(self.distance) else None}
        return {**found, "fidelity": self.fidelity, "candidates": [each.to_json() for each in self.candidates]}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Step:
        values = {name: value for name, value in record.items() if name != "fidelity"}
        distance = math.inf if record["distance"] is None else record["distance"]
        exclude, trials = tuple(record["exclude"]), tuple(record["trials"])
        candidates = tuple(map(cls.from_json, record["candidates"]))
        return cls(**{**values, "distance": distance, "exclude": exclude, "trials": trials, "candidates": candidates})


def refuse_other_folder(out: Path, resume: bool) -> None:
    """Before any work: UserError where `out` holds something else than a recovery that is to go on."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give another --out, the folder of the recovery.")
    if (out / RECORD).is_file():
        if not resume:
            raise UserError(f"{out}: already holds a recovery. Give another --out, or --resume to go on with this one.")
        return
    if out.is_dir() and set(out.iterdir()) > set(leftovers(out)):
        raise UserError(f"{out}: is not empty and holds no recovery; give another --out.")
    refuse_unmakeable(out)


def begun(out: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The record in `out`, a new one where there is none. UserError where it is of something else."""
    if not (out / RECORD).is_file():
        begin = {"format": FORMAT, "version": VERSION, "faqd": __version__, "asked": asked, "steps": []}
        write_json(out / RECORD, begin)
    record = read_record(out)
    if other := differences(asked, record["asked"]):
        raise UserError(
            f"{out}: holds a recovery with other options ({'; '.join(other)}); --resume needs the same ones. "
            "Give another --out for a new one."
        )
    return record


def read_record(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = read_json(out / RECORD)
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("version") != VERSION:
        raise UserError(f"{out / RECORD}: not the record of a recovery of version {VERSION}; give another --out.")
    if missing := [name for name in ("asked", "steps") if name not in record]:
        raise UserError(f"{out / RECORD}: has no '{missing[0]}', it was changed; give another --out.")
    return record


def steps_of(record: dict[str, Any]) -> list[Step]:
    return [Step.from_json(each) for each in record["steps"]]


def best_of(steps: Sequence[Step]) -> Step | None:
    """The last that was taken."""
    return next((step for step in reversed(steps) if step.taken == "taken"), None)
