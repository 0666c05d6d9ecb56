"""Times and profiles in trtexec's JSON form, so that its users' scripts read ours."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from faqd.benchmarks.measure.latency import Times


def times_json(times: Times) -> list[dict[str, float]]:
    """One record per query, in ms: what `trtexec --exportTimes` writes."""
    records = []
    for begin, queries in zip(times.begins_ms, times.rounds, strict=True):
        for query in queries:
            record: dict[str, float] = {}
            for key, start, took in (
                ("Enq", query.start_enqueue_ms, query.enqueue_ms),
                ("H2d", query.start_h2d_ms, query.h2d_ms),
                ("Compute", query.start_compute_ms, query.compute_ms),
                ("D2h", query.start_d2h_ms, query.d2h_ms),
            ):
                record |= {f"start{key}Ms": begin + start, f"end{key}Ms": begin + start + took}
            record |= {"h2dMs": query.h2d_ms, "computeMs": query.compute_ms, "d2hMs": query.d2h_ms}
            records.append({**record, "latencyMs": query.latency_ms})
    return records


def profile_json(layers: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """First the number of queries, then a record per layer: what `trtexec --exportProfile` writes."""
    total = sum(sum(times) for times in layers.values())
    return [
        {"count": max((len(times) for times in layers.values()), default=0)},
        *(
            {
                "name": name,
                "timeMs": sum(times),
                "averageMs": statistics.fmean(times),
                "medianMs": statistics.median(times),
                "percentage": 100 * sum(times) / total if total else 0.0,
            }
            for name, times in layers.items()
        ),
    ]
