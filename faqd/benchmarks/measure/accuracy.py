"""What a network's outputs are worth: against labels where there are any, and against the float teacher.

Legend: N images, K classes. Intervals are 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.errors import UserError
from faqd.fidelity import Branches, agreement, classification_output, fidelity, verdict
from faqd.share import Share

Array = NDArray[Any]
TOP_5_ABOVE = 5
"""Top-5 says nothing with five classes or fewer."""
TIERS = (0.99, 0.999)
"""MLPerf's."""


@dataclass(frozen=True)
class PairedGap:
    """Accuracy of a network minus the teacher's on the same images.

    The four cells of the paired table: images that both, only the network (`gained`), only the teacher (`lost`)
    or neither got right. The interval is Newcombe's square-and-add (Statistics in Medicine 17 (1998) 2635-2650,
    method 10): the two Wilson intervals joined by their correlation.
    """

    both: int
    gained: int
    lost: int
    neither: int

    @property
    def n(self) -> int:
        return self.both + self.gained + self.lost + self.neither

    @property
    def value(self) -> float:
        return (self.gained - self.lost) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        mine, theirs = Share(self.both + self.gained, self.n), Share(self.both + self.lost, self.n)
        (low_m, high_m), (low_t, high_t) = mine.interval, theirs.interval
        below, above = mine.value - low_m, high_m - mine.value
        below_t, above_t = theirs.value - low_t, high_t - theirs.value
        phi = self._correlation(mine, theirs)
        down = below**2 - 2 * phi * below * above_t + above_t**2
        up = above**2 - 2 * phi * above * below_t + below_t**2
        return self.value - math.sqrt(max(down, 0.0)), self.value + math.sqrt(max(up, 0.0))

    def _correlation(self, mine: Share, theirs: Share) -> float:
        margins = mine.count * (self.n - mine.count) * theirs.count * (self.n - theirs.count)
        product = float(self.both * self.neither - self.gained * self.lost)
        if product > 0:  # Newcombe's continuity correction, for positive association only.
            product = max(product - self.n / 2, 0.0)
        return product / math.sqrt(margins) if margins else 0.0

    def to_json(self) -> dict[str, Any]:
        low, high = self.interval
        cells = {"gained": self.gained, "lost": self.lost, "n": self.n}
        return {"value": self.value, "low": low, "high": high, **cells}


def judge(
    outputs: Mapping[str, Array],
    teacher: Mapping[str, Array],
    labels: NDArray[np.int64] | None,
    name: str,
    branches: Branches | None = None,
) -> dict[str, Any]:
    """The record of one network: every figure that its outputs can carry, the others None.

    Classification figures come from the first output of shape (N, K), K > 1; outputs of another rank (dense ones)
    have only their SNR and their fidelity (`faqd.fidelity`, of which `branches` says what outputs are made of). A
    teacher output stored for fewer images is compared on those. name: for messages.
    """
    for output, reference in teacher.items():
        if output not in outputs:
            raise UserError(f"{name}: has no output {output!r}, only {', '.join(outputs)}; export it again.")
        _check(outputs[output], reference, f"{name}, output {output}")
    found = {output: outputs[output][: len(reference)] for output, reference in teacher.items()}
    kept = fidelity(found, teacher, branches or {})
    record: dict[str, Any] = {
        "top1": None,
        "top5": None,
        "gap_to_teacher": None,
        "ratio_to_teacher": None,
        "tiers": None,
        "agreement": None,
        "kl_to_teacher_nats": None,
        "snr_db": {output: snr_db(found[output], reference) for output, reference in teacher.items()},
        "fidelity": {"by_output": kept, "least": min(kept.values()), "verdict": verdict(min(kept.values()))},
    }
    logits = classification_output(teacher)
    if logits is None:
        return record
    record["agreement"] = agreement(found[logits], teacher[logits]).to_json()
    record["kl_to_teacher_nats"] = kl_to_teacher(found[logits], teacher[logits])
    if labels is not None:
        record |= _against_labels(found[logits], teacher[logits], labels[: len(teacher[logits])], name)
    return record


def _against_labels(logits_NK: Array, teacher_NK: Array, labels_N: NDArray[np.int64], name: str) -> dict[str, Any]:
    classes = logits_NK.shape[1]
    if len(labels_N) != len(logits_NK) or labels_N.min() < 0 or labels_N.max() >= classes:
        raise UserError(
            f"{name}: {len(labels_N)} labels from {labels_N.min()} to {labels_N.max()} do not fit "
            f"{len(logits_NK)} outputs of {classes} classes; export the run again with the right data."
        )
    right, teacher_right = correct(logits_NK, labels_N), correct(teacher_NK, labels_N)
    teacher_top1 = Share(int(teacher_right.sum()), len(labels_N))
    top1 = Share(int(right.sum()), len(labels_N))
    gap = paired_gap(right, teacher_right)
    return {
        "top1": top1.to_json(),
        "top5": top_k(logits_NK, labels_N, 5).to_json() if classes > TOP_5_ABOVE else None,
        "gap_to_teacher": gap.to_json(),
        "ratio_to_teacher": top1.value / teacher_top1.value if teacher_top1.count else None,
        "tiers": tiers(gap, teacher_top1.value) if teacher_top1.count else None,
    }


def tiers(gap: PairedGap, teacher_top1: float) -> list[dict[str, Any]]:
    """MLPerf's accuracy targets as shares of the float teacher's. certain: the whole interval of the paired gap lies
    on the same side of the target as the figure itself."""
    found = []
    for ratio in TIERS:
        reached = [1 + value / teacher_top1 >= ratio for value in (gap.value, *gap.interval)]
        found.append({"ratio": ratio, "met": reached[0], "certain": len(set(reached)) == 1})
    return found


def correct(logits_NK: Array, labels_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.asarray(logits_NK.argmax(1) == labels_N)


def top_k(logits_NK: Array, labels_N: NDArray[np.int64], k: int) -> Share:
    """Images whose label is among the k largest outputs; a tie with the k-th counts for lower class numbers, as
    argmax has it."""
    best = np.argsort(-logits_NK, axis=1, kind="stable")[:, :k]
    return Share(int((best == labels_N[:, None]).any(1).sum()), len(labels_N))


def paired_gap(right_N: NDArray[np.bool_], teacher_right_N: NDArray[np.bool_]) -> PairedGap:
    return PairedGap(
        both=int((right_N & teacher_right_N).sum()),
        gained=int((right_N & ~teacher_right_N).sum()),
        lost=int((~right_N & teacher_right_N).sum()),
        neither=int((~right_N & ~teacher_right_N).sum()),
    )


def kl_to_teacher(logits_NK: Array, teacher_NK: Array) -> float:
    """Mean over images of KL(teacher ‖ network) between their softmax outputs, in nats."""
    log_teacher, log_network = _log_softmax(teacher_NK), _log_softmax(logits_NK)
    divergence = (np.exp(log_teacher) * (log_teacher - log_network)).sum(1).mean()
    return max(0.0, float(divergence))  # Rounding may leave -1e-17 for equal outputs.


def snr_db(values: Array, reference: Array) -> float | None:
    """10 log10 of the reference's power over the difference's; None where they are equal or the reference is zero."""
    exact = reference.astype(np.float64)
    noise = float(((values.astype(np.float64) - exact) ** 2).sum())
    signal = float((exact**2).sum())
    return 10 * math.log10(signal / noise) if noise and signal else None


def _log_softmax(logits_NK: Array) -> NDArray[np.float64]:
    shifted = logits_NK.astype(np.float64) - logits_NK.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))


def _check(values: Array, reference: Array, where: str) -> None:
    if values.shape[1:] != reference.shape[1:] or len(values) < len(reference):
        raise UserError(
            f"{where}: shape {values.shape}, the teacher's is {reference.shape}; the bundle's files do not "
            "belong together: export the run again."
        )
    broken = int(values.size - np.isfinite(values).sum())
    if broken:
        raise UserError(f"{where}: {broken} values are not finite; the network is broken.", exit_code=1)
