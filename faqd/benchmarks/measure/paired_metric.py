"""The user's metric of several networks on the same images, and how far its differences depend on the choice of images.

A paired bootstrap: images are drawn with repeats, as many as there are, and the teacher and the others are judged on
the same ones. The interval of a difference is the middle 95 % of what it comes to (Efron and Tibshirani, An
Introduction to the Bootstrap (1993), section 13.3).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from faqd.benchmarks.measure.user_metric import Array, Metric, images_judged
from faqd.bundle import Bundle, Evaluation
from faqd.errors import UserError

SEED = 0
LEAST_RESAMPLES = 100
"""Of fewer, the ends of 95 % are one or two."""
ENDS = (0.025, 0.975)

Figures = dict[str, float]


@dataclass(frozen=True)
class PairedMetric:
    """teacher: its figures. drawn: the images of each resample, (resamples, N). teacher_drawn: its figures on them."""

    metric: Metric
    data: Evaluation
    teacher: Figures
    drawn: Array
    teacher_drawn: list[Figures]

    def judge(self, outputs: Mapping[str, Array], bundle: Bundle, who: str) -> dict[str, Any]:
        """A network's figures, `metric`, and `metric_difference`: by name, that to the teacher with its interval; None
        without resamples. UserError where the user's function fails, or names other figures on a resample."""
        figures = self.metric.of(outputs, self.data, bundle, who)
        if not len(self.drawn):
            return {"metric": figures, "metric_difference": None}
        found = _on_resamples(self.metric, outputs, self.data, bundle, who, self.drawn)
        both = [name for name in figures if name in self.teacher]
        return {"metric": figures, "metric_difference": {name: self._difference(figures, found, name) for name in both}}

    def _difference(self, figures: Figures, found: list[Figures], name: str) -> Figures:
        try:
            differences = [mine[name] - its[name] for mine, its in zip(found, self.teacher_drawn, strict=True)]
        except KeyError:
            raise UserError(
                f"--metric {self.metric.spec}: returned no {name} on images drawn with repeats; return the same names "
                "whatever the images are, or leave --bootstrap out."
            ) from None
        low, high = np.quantile(differences, ENDS)
        return {"value": figures[name] - self.teacher[name], "low": float(low), "high": float(high)}


def paired_metric(
    metric: Metric, data: Evaluation, bundle: Bundle, resamples: int, who: str, progress: Callable[[str], None]
) -> PairedMetric:
    """Judges the teacher, with so many resamples. who: the teacher's name, for messages."""
    teacher = metric.of(data.teacher, data, bundle, who)
    images = images_judged(data)
    drawn = np.random.default_rng(SEED).integers(images, size=(resamples, images))
    start = time.monotonic()
    found = _on_resamples(metric, data.teacher, data, bundle, who, drawn[:1])
    if resamples:  # the first call of all may have read annotations, which the others need not
        seconds = resamples * (time.monotonic() - start)
        progress(f"{resamples:,} resamples of {images:,} images, about {seconds:.0f} s for each network that is judged")
    found += _on_resamples(metric, data.teacher, data, bundle, who, drawn[1:])
    return PairedMetric(metric, data, teacher, drawn, found)


def _on_resamples(
    metric: Metric, outputs: Mapping[str, Array], data: Evaluation, bundle: Bundle, who: str, drawn: Array
) -> list[Figures]:
    name = f"{who}, images drawn with repeats"
    return [metric.of(outputs, data, bundle, name, images) for images in drawn]
