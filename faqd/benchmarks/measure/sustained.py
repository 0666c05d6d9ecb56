"""One network under load for minutes: what heat and the power limit leave of its speed."""

from __future__ import annotations

import statistics
import time
from typing import Any

from faqd.benchmarks.measure.clocks import Clocks
from faqd.benchmarks.measure.latency import CLOSED_LOOP, Clock, Submission

WINDOWS = 60
"""At most; each lasts a second at least."""


def sustained(
    submission: Submission, batch: int, minutes: float, clocks: Clocks, clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Queries one after the other for `minutes`, summed up window by window with the clocks at the end of each."""
    whole_s = minutes * 60
    window_s = max(1.0, whole_s / WINDOWS)
    start = clock()
    windows: list[dict[str, Any]] = []
    while (begun := clock()) - start < whole_s:
        values: list[float] = []
        while clock() - begun < window_s or not values:
            submission.submit()
            values.append(submission.collect().latency_ms)
        took = clock() - begun
        windows.append(
            {
                "start_s": begun - start,
                "duration_s": took,
                "queries": len(values),
                "median_ms": statistics.median(values),
                "max_ms": max(values),
                "throughput_images_per_s": len(values) * batch / took,
                **clocks.read(),
            }
        )
    tenth = max(1, len(windows) // 10)
    first, last = (
        statistics.fmean(window["throughput_images_per_s"] for window in part)
        for part in (windows[:tenth], windows[-tenth:])
    )
    return {
        "batch": batch,
        "submission": CLOSED_LOOP,
        "minutes": minutes,
        "clocks": clocks.to_json(),
        "throughput_kept": last / first,
        "windows": windows,
    }
