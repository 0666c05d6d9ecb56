"""How much of its teacher a student has kept, without labels and whatever the task. The proof is another matter: it
says that files compute the student, however good or bad that is.

1 - squared error / variance of the teacher's output: 1 for equal outputs, 0 for ones that tell no more of an image than
a constant. `faqd.train.losses.heads` has the same distance with a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from faqd.schema import COUNT, Each, Maybe
from faqd.share import Share

Array = NDArray[Any]
Outputs = Mapping[str, Array]
"""A network's outputs by name, images first."""
Verdict = Literal["kept", "lost something", "ruined"]
VERDICTS: tuple[Verdict, ...] = ("ruined", "lost something", "kept")
"""From the worst to the best."""

_SHARE = {"value": float, "low": float, "high": float, "count": float, "n": COUNT}
RECORD = {
    "images": COUNT,
    "fidelity": Each(float),
    "least": float,
    "verdict": VERDICTS,
    "top1_agreement": Maybe(_SHARE),
}
"""What `compared_with_teacher` makes, for whoever reads it back."""

KEPT = 0.97
"""From here on a student has kept its teacher's task. Of those in results/defaults, of published networks, the ones
with more lost at most 1.1 % of the teacher's accuracy, AP or IoU, the ones down to 0.82 lost 1 to 5 %, from 0.4 to 0.8
9 to 23 %, and below from 32 % to all."""
RUINED = 0.5
"""Below, more than half of what an output tells of an image is gone."""
LEAST_SHARE = 0.1
"""Of a branch's mean variance: what one of its channels counts with at least, so that none that hardly moves rules."""


@dataclass(frozen=True)
class Branch:
    """Channels `start` up to `end` of an output, which one layer made. probability: a sigmoid or a softmax was last.

    variance: of each channel in the teacher, where it is known. Probabilities have one in common: a rare class hardly
    varies and is no more important for it.
    """

    start: int
    end: int
    probability: bool
    variance: tuple[float, ...] = ()

    @property
    def gate(self) -> bool:
        """A single probability, such as objectness: it must be right everywhere, where it is low above all."""
        return self.probability and self.end - self.start == 1

    def to_json(self) -> dict[str, Any]:
        return {"channels": [self.start, self.end], "probability": self.probability}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Branch:
        start, end = map(int, record["channels"])
        return cls(start, end, record["probability"], tuple(record.get("variance", ())))


def all_probabilities(branches: Sequence[Branch]) -> bool:
    """Whether an output is what comes out of a sigmoid or a softmax, as a whole."""
    return bool(branches) and all(branch.probability for branch in branches)


Branches = Mapping[str, Sequence[Branch]]
"""By the name of the output. One that is not there is a single branch, of no probabilities."""


def fidelity(found: Outputs, teacher: Outputs, branches: Branches) -> dict[str, float]:
    """0 to 1 by output of the teacher. Outputs (N, C, ...) or (N,); `found` may have more images than were stored of
    the teacher."""
    return {name: kept_at(distance) for name, distance in distances(found, teacher, branches).items()}


def kept_at(distance: float) -> float:
    """The fidelity at a distance: nothing is left from 1 on."""
    return max(0.0, 1 - distance)


def distances(found: Outputs, teacher: Outputs, branches: Branches) -> dict[str, float]:
    """1 - fidelity by output, which may be far above 1 and infinite.

    The mean over branches of the mean over channels, images and places, where a place, or an image that has none,
    counts by the teacher's certainty there; a gate counts everywhere alike.
    """
    parts = {name: _fitting(branches.get(name, ()), _channels(values)) for name, values in teacher.items()}
    sure = _certainties(teacher, parts)
    result = {}
    for name, wanted in teacher.items():
        with np.errstate(over="ignore", invalid="ignore"):
            weight = sure.get(_places(wanted))
            each = [
                _distance(found[name][: len(wanted)], wanted, branch, None if branch.gate else weight)
                for branch in parts[name]
            ]
            distance = float(np.mean(each))
        result[name] = math.inf if math.isnan(distance) else distance
    return result


def _fitting(branches: Sequence[Branch], channels: int) -> Sequence[Branch]:
    """The branches where they are those of an output with so many channels, else a single one."""
    ends = [0, *(branch.end for branch in branches)]
    whole = [branch.start for branch in branches] == ends[:-1] and ends == sorted(set(ends))
    return branches if whole and ends[-1] == channels else (Branch(0, channels, False),)


def _distance(found: Array, wanted: Array, branch: Branch, weight: Array | None) -> float:
    """Squared error over variance: the mean over the branch's channels."""
    ours, theirs = (_by_channel(values)[branch.start : branch.end].astype(np.float64) for values in (found, wanted))
    square = np.square(ours - theirs)
    error = square.mean(1) if weight is None else (square * weight.reshape(-1)).mean(1) / weight.mean()
    variance = theirs.var(1)
    mean = variance.mean()
    if mean == 0:  # the teacher always says the same: errors are measured by how large that is
        mean = np.square(theirs).mean()
        variance = np.full_like(variance, mean)
    if not error.any():
        return 0.0
    if mean == 0:
        return math.inf
    return float((error / (mean if branch.probability else np.maximum(variance, LEAST_SHARE * mean))).mean())


def _certainties(teacher: Outputs, branches: Branches) -> dict[tuple[int, ...], Array]:
    """How sure the teacher is that there is something, (N, 1, ...) by the size of the places: the geometric mean over
    all branches of probabilities of the greatest of each."""
    greatest: dict[tuple[int, ...], list[Array]] = {}
    for name, parts in branches.items():
        for branch in (branch for branch in parts if branch.probability):
            values = teacher[name][:, branch.start : branch.end].max(1, keepdims=True)
            greatest.setdefault(_places(teacher[name]), []).append(np.maximum(values.astype(np.float64), 0))
    with np.errstate(divide="ignore"):
        sure = {size: np.exp(np.mean(np.log(each), axis=0)) for size, each in greatest.items() if _same_length(each)}
    return {size: each for size, each in sure.items() if each.mean() > 0}


def _same_length(arrays: Sequence[Array]) -> bool:
    return len({len(array) for array in arrays}) == 1


def _channels(values: Array) -> int:
    return values.shape[1] if values.ndim > 1 else 1


def _places(values: Array) -> tuple[int, ...]:
    """The size of an output but for images and channels."""
    return values.shape[2:]


def _by_channel(values: Array) -> Array:
    """(C, all images and places)."""
    return np.moveaxis(values.reshape(len(values), _channels(values), -1), 1, 0).reshape(_channels(values), -1)


def compared_with_teacher(found: Outputs, teacher: Outputs, branches: Branches) -> dict[str, Any]:
    """A record: `fidelity` by output, their `least` with its `verdict`, and for class scores `top1_agreement`, the
    share of images of which both name the same class, with a 95 % interval."""
    by_output = fidelity(found, teacher, branches)
    least = min(by_output.values())
    scores = classification_output(teacher)
    agreed = None
    if scores is not None:
        agreed = agreement(found[scores][: len(teacher[scores])], teacher[scores]).to_json()
    return {
        "images": max(map(len, teacher.values())),
        "fidelity": by_output,
        "least": least,
        "verdict": verdict(least),
        "top1_agreement": agreed,
    }


def verdict(value: float) -> Verdict:
    if value >= KEPT:
        return "kept"
    return "lost something" if value >= RUINED else "ruined"


def classification_output(outputs: Outputs) -> str | None:
    """The first output of shape (N, K) with more than one column: the one that argmax is asked of."""
    return next((name for name, values in outputs.items() if values.ndim == 2 and values.shape[1] > 1), None)


def agreement(scores_NK: Array, teacher_NK: Array) -> Share:
    """Images on which the network and the teacher name the same class."""
    return Share(int((scores_NK.argmax(1) == teacher_NK.argmax(1)).sum()), len(scores_NK))


def in_words(records: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Lines on the files of a bundle. records: by file, as `compared_with_teacher` makes them."""
    worst = min(records.values(), key=lambda record: float(record["least"]))
    images = worst["images"]
    yield (
        f"fidelity: {worst['verdict']}. Of the teacher's outputs (1: equal, 0: no better than a constant), on {images} "
        f"evaluation image{'' if images == 1 else 's'}:"
    )
    for file, record in records.items():
        outputs = record["fidelity"]
        named = (f"{name} {rounded(value)}" if len(outputs) > 1 else rounded(value) for name, value in outputs.items())
        figures = ", ".join(named)
        yield f"  {file}: {figures}{_agreement_in_words(record['top1_agreement'])}"


def advice(kind: str) -> str:
    """What to try where something was lost. kind: of the bundle, `distilled` or `ptq`."""
    rest = "`faqd-train recover` with the same teacher and data, which keeps few layers float or trains"
    first = rest if kind == "ptq" else "more iterations, more bits"
    return f"Try {first}; `faqd-deploy sensitivity` says what to keep float (--exclude)."


def rounded(value: float) -> str:
    """With the digits that tell it from 1."""
    if value == 1:
        return "1"
    digits = max(3, math.ceil(-math.log10(1 - value)) + 1)
    return f"{value:.{min(digits, 6)}f}"


def _agreement_in_words(share: Mapping[str, Any] | None) -> str:
    if share is None:
        return ""
    value, low, high = (100 * share[key] for key in ("value", "low", "high"))
    return f"; the same class on {value:.1f} % (95 %: {low:.1f} to {high:.1f})"
