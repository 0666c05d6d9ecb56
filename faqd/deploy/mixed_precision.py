"""What commands say of the search for what stays float, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from faqd.fidelity import rounded, verdict
from faqd.quantize.config import QuantConfig
from faqd.quantize.mixed_precision import SHORTLIST, mixed_precision
from faqd.quantize.sensitivity import Trial
from faqd.quantize.without_training import Equalize, Untrained

if TYPE_CHECKING:
    from torch import Tensor

TIMED_PARTS = 5
"""After so many the rest is estimated."""


def kept_float(
    best_of: Callable[[QuantConfig, Equalize], Untrained],
    bits: QuantConfig,
    equalize: Equalize,
    batches: Sequence[Tensor],
    images: Tensor,
    most: int,
    enough: float,
    say: Callable[[str], None],
) -> tuple[QuantConfig, tuple[Trial, ...]]:
    """`mixed_precision`, said aloud: the bits with what it excludes, and what it tried."""
    begun = time.monotonic()
    trials: list[tuple[float, Trial]] = []

    def tried(trial: Trial) -> None:
        trials.append((time.monotonic(), trial))
        say(f"tried: {trial_in_words(trial)}" + f": {trial.exclude}" * bool(trial.exclude))

    def rest(seconds: float) -> float:
        """What comes after a ranking of so many seconds for each rounding."""
        return most * (SHORTLIST * seconds + 2 * (trials[0][0] - begun))  # each is put in, and tried without

    say(f"at most {places_in_words(most)}, as few as keep {enough:g} on {len(images)} images without a say in scales:")
    best = mixed_precision(
        best_of, bits, equalize, batches, images, most, enough, tried, estimating("places", say, rest)
    )
    config = best.student.config
    chosen = config.exclude[len(bits.exclude) :]
    say(f"kept float: --exclude '{chosen[0]}'" if chosen else "kept float: nothing.")
    return config, tuple(trial for _, trial in trials)


def estimating(
    what: str, say: Callable[[str], None], rest: Callable[[float], float] = lambda seconds: 0.0
) -> Callable[[int, int], None]:
    """The progress of a ranking. rest: the seconds of what comes after it, of those for a single one."""
    start = time.monotonic()

    def told(done: int, total: int) -> None:
        nonlocal start
        if done == 1:
            start = time.monotonic()
        if done == TIMED_PARTS < total:
            each = (time.monotonic() - start) / (done - 1)
            after = f", then {rest(each):.0f} s at most" if rest(each) else ""
            say(f"{total} {what}, each alone: about {max(1, round(each * (total - done)))} s{after}")

    return told


def trial_in_words(trial: Trial) -> str:
    floats, share = places_in_words(trial.floats), f"{100 * trial.int8_share:.1f} %"
    kept = f"fidelity {rounded(trial.fidelity)} ({verdict(trial.fidelity)})"
    return f"{floats}, {share} of the multiply-accumulates in INT8, {kept}"


def places_in_words(count: int) -> str:
    return f"{count} place{'s' if count > 1 else ''} float" if count else "nothing float"
