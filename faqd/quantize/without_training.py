"""The best student that needs no training: what is cheap is tried, and judged on images that nothing was chosen on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, fx

from faqd.calib.ranges import Method
from faqd.fidelity import KEPT, kept_at, rounded
from faqd.quantize import nodes
from faqd.quantize.calibrate import calibrate
from faqd.quantize.config import QuantConfig
from faqd.quantize.equalize import Equalized, equalized
from faqd.quantize.output_distance import OutputDistance
from faqd.quantize.prepare import insert_quantizers
from faqd.quantize.student import Student

Equalize = Literal["auto", "always", "never"]
Asymmetric = Literal["auto", "always", "never"]
CalibrationMethod = Literal["auto", "mse", "percentile", "max", "entropy"]
METHODS: tuple[Method, ...] = ("mse", "percentile")
"""Tried unasked. `entropy` was between the two, or worse, on three detectors; `max` is for outliers that count."""


JUDGED_IMAGES = 32
"""Of the validation split, on which what is tried is compared."""
EXACT = 1e-6
"""The distance of an equalized network in float; sums in another order make 1e-10."""


@dataclass(frozen=True)
class Untrained:
    """student: calibrated, in evaluation mode. method: of its scales. equalized: None where nothing was multiplied.
    distance: of its worst output on the images that it was judged on."""

    student: Student
    method: Method
    equalized: Equalized | None
    distance: float

    @property
    def fidelity(self) -> float:
        return kept_at(self.distance)

    @property
    def asymmetric(self) -> bool:
        return self.student.config.asymmetric

    def made_in_words(self) -> str:
        """How it came about, without what it is worth."""
        count = 0 if self.equalized is None else len(self.equalized.tensors)
        made = f"{count} tensor{'' if count == 1 else 's'} equalized" if count else "not equalized"
        ranges = ", asymmetric" if self.asymmetric else ""
        return f"{self.method} scales{ranges}, {made}"

    def in_words(self) -> str:
        return f"{self.made_in_words()}: fidelity {rounded(self.fidelity)}"


def best_without_training(
    traced: fx.GraphModule,
    bits: QuantConfig,
    batches: Sequence[Tensor],
    images: Tensor,
    calibration: CalibrationMethod = "mse",
    equalize: Equalize = "never",
    tried: Callable[[Untrained], None] = lambda one: None,
    keep: Collection[str] = (),
    enough: float = KEPT,
    asymmetric: Asymmetric = "never",
) -> Untrained:
    """batches: network input for scales. images: on which the tried ones are compared, where there are several; the
    first of that fidelity ends the search. keep: nodes whose values equalization must not change. asymmetric: of
    `bits` either way."""
    distance = OutputDistance(traced, images)
    bits = replace(bits, asymmetric=asymmetric == "always")

    def candidate(student: Student, method: Method, made: Equalized | None) -> Untrained:
        calibrate(student, batches, method)
        one = Untrained(student, method, made, distance.of(student.network))
        tried(one)
        return one

    best: Untrained | None = None
    for each in _candidates(distance, traced, bits, batches, calibration, equalize, keep):
        one = candidate(*each)
        best = one if best is None or one.distance < best.distance else best
        if best.fidelity >= enough:
            return best
    assert best is not None
    if asymmetric == "auto":
        network = traced if best.equalized is None else best.equalized.network
        student = _student(network, replace(bits, asymmetric=True), batches)
        best = min(best, candidate(student, best.method, best.equalized), key=lambda tried: tried.distance)
    return best


def _candidates(
    distance: OutputDistance,
    traced: fx.GraphModule,
    bits: QuantConfig,
    batches: Sequence[Tensor],
    calibration: CalibrationMethod,
    equalize: Equalize,
    keep: Collection[str],
) -> Iterator[tuple[Student, Method, Equalized | None]]:
    """What is asked for, the plainest first; students that are not calibrated yet."""
    methods = METHODS if calibration == "auto" else (calibration,)
    if equalize != "always":
        for method in methods[:1] if equalize == "auto" else methods:
            yield _student(traced, bits, batches), method, None
    if equalize != "never":
        made = equalized(traced, bits, batches, keep)
        # Exact by construction; whatever nobody thought of is not taken.
        if made.tensors and distance.of(made.network) < EXACT:
            for method in methods:
                yield _student(made.network, bits, batches), method, made
        elif equalize == "always":
            yield _student(traced, bits, batches), methods[0], None
        if equalize == "auto":
            for method in methods[1:]:
                yield _student(traced, bits, batches), method, None


def _student(traced: fx.GraphModule, bits: QuantConfig, batches: Sequence[Tensor]) -> Student:
    student = insert_quantizers(traced, bits, nodes.two_of(batches[0]))
    student.network.eval()
    return student
