"""Figures with intervals: networks that judged the same images, compared by resampling those images for all at once.

Legend: N images (or scenes), F counts of one image, B resamples.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.benchmarks.studies.ablation_table import paired

RESAMPLES = 2000
FLOAT, PTQ, DISTILLED = "float", "ptq", "distilled"

Figure = Callable[[NDArray[Any]], NDArray[np.float64]]
"""Sums of counts (..., F) over as many images as there are -> the figure (...)."""


@dataclass(frozen=True)
class Judged:
    """What one network made of every image. counts: (N, F); the teacher has bits 32/32 and is its own seed 0."""

    method: str
    bits: str
    seed: int
    counts: NDArray[np.int64]


def rows(judged: Sequence[Judged], figures: dict[str, Figure]) -> list[dict[str, Any]]:
    """One row per method and bits, in the order of `judged`: every figure, mean over seeds.

    low, high: the 95 % interval of that mean over resampled images, the seeds as they are. to_teacher, to_ptq: the
    difference of the means with its interval; both networks judge the same resampled images. to_ptq also has the mean
    and interval of the difference paired by seed (`over_seeds`, Student's t).
    """
    weights = resamples(len(judged[0].counts))
    found: dict[tuple[str, str], list[Judged]] = {}
    for each in judged:
        found.setdefault((each.method, each.bits), []).append(each)
    made = {
        (key, name): _means([each.counts for each in group], figure, weights)
        for key, group in found.items()
        for name, figure in figures.items()
    }
    (teacher,) = (key for key in found if key[0] == FLOAT)
    table = []
    for key, group in found.items():
        method, bits = key
        row: dict[str, Any] = {"method": method, "bits": bits, "n": len(group)}
        for name in figures:
            mean, drawn, by_seed = made[key, name]
            entry: dict[str, Any] = {"mean": mean, **_interval(drawn), "by_seed": by_seed}
            entry["std"] = statistics.stdev(by_seed) if len(by_seed) > 1 else None
            if key != teacher:
                entry["to_teacher"] = _difference(made[key, name], made[teacher, name])
            if method == DISTILLED:
                base = made[(PTQ, bits), name]
                pairs = [a - b for a, b in zip(by_seed, base[2], strict=True)]
                over_seeds = paired(pairs) if len(pairs) > 1 else None
                entry["to_ptq"] = {**_difference(made[key, name], base), "over_seeds": over_seeds}
            row[name] = entry
        table.append(row)
    return table


def resamples(images: int) -> NDArray[np.float64]:
    """(B, N): how often each image is in each resample; always the same ones. In float64 for BLAS, which is exact:
    sums of counts stay far below 2^53."""
    drawn = np.random.RandomState(0).multinomial(images, np.full(images, 1 / images), size=RESAMPLES)
    return drawn.astype(np.float64)


_Means = tuple[float, NDArray[np.float64], list[float]]


def _means(counts: list[NDArray[np.int64]], figure: Figure, weights: NDArray[np.float64]) -> _Means:
    """Mean over seeds: of the images as they are, of every resample; and each seed's own figure."""
    by_seed = [float(figure(each.sum(0))) for each in counts]
    drawn = np.mean([figure(weights @ each.astype(np.float64)) for each in counts], axis=0)
    return statistics.mean(by_seed), drawn, by_seed


def _difference(mine: _Means, other: _Means) -> dict[str, Any]:
    return {"mean": mine[0] - other[0], **_interval(mine[1] - other[1])}


def _interval(drawn: NDArray[np.float64]) -> dict[str, float]:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}


def markdown(result: dict[str, Any]) -> str:
    """A table for every figure, in percent and points."""
    blocks = []
    for name in result["figures"]:
        lines = [
            f"{name.replace('_', ' ')} in %, mean of {result['seeds']} seeds [95 % over {result['images']} "
            f"{result['unit']}] ± std over seeds",
            "",
            "| network | bits | " + name.replace("_", " ") + " | to teacher | to PTQ |",
            "| --- | --- | --- | --- | --- |",
        ]
        for row in result["table"]:
            entry = row[name]
            spread = "" if entry["std"] is None else f" ± {100 * entry['std']:.2f}"
            value = f"{100 * entry['mean']:.2f} [{100 * entry['low']:.2f}, {100 * entry['high']:.2f}]{spread}"
            gaps = [_points(entry.get(other)) for other in ("to_teacher", "to_ptq")]
            lines.append(f"| {row['method']} | {row['bits']} | {value} | {gaps[0]} | {gaps[1]} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _points(gap: dict[str, Any] | None) -> str:
    return "" if gap is None else f"{100 * gap['mean']:+.2f} [{100 * gap['low']:+.2f}, {100 * gap['high']:+.2f}]"
