"""Throughput against batch size, doubled until it no longer pays, with all networks in turn at every size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from faqd.benchmarks.measure.latency import Clock, Length, interleaved
from faqd.benchmarks.measure.networks import Array, Network
from faqd.errors import UserError

GROWS_ABOVE = 1.05
"""Throughput over the best so far, from which a larger batch still pays."""
FLAT = 2
"""Sizes in a row that do not pay, after which a network is saturated: one alone may be noise."""
SATURATED = 0.95
"""Share of the best throughput that the smallest sufficient batch reaches."""
MOST_BYTES = 1 << 29
"""Of the images of one batch."""


def sweep(
    networks: Mapping[str, Network],
    feeds: Callable[[int], Mapping[str, Array]],
    image_bytes: int,
    slots: int,
    length: Length,
    clock: Clock,
    progress: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """The record of every network: `points`, the batch from which it is saturated, and why the sweep ended."""
    points: dict[str, list[dict[str, Any]]] = {name: [] for name in networks}
    ended: dict[str, str] = {}
    batch = 1
    while going := [name for name in networks if name not in ended]:
        if batch * image_bytes > MOST_BYTES:
            ended |= dict.fromkeys(going, f"the images of batch {batch} would take more than {MOST_BYTES >> 20} MiB")
            break
        progress(f"sweep: {len(going)} networks at batch {batch}")
        with ExitStack() as stack:
            opened = {}
            for name in going:
                try:
                    opened[name] = stack.enter_context(networks[name].submission(feeds(batch), slots))
                except UserError as error:
                    ended[name] = f"at batch {batch}: {error}"
            for name, times in interleaved(opened, length, clock).items():
                point = {"batch": batch, "samples": len(times.queries), "median_ms": _median(times.all_ms)}
                points[name].append({**point, "throughput_images_per_s": times.queries_per_s * batch})
                if _flat(points[name]):
                    ended[name] = "saturated"
        batch *= 2
    return {name: {"points": points[name], **_saturation(points[name], ended[name])} for name in networks}


def _median(ordered: list[float]) -> float:
    return ordered[len(ordered) // 2]


def _flat(points: list[dict[str, Any]]) -> bool:
    rates = [point["throughput_images_per_s"] for point in points]
    before, last = rates[:-FLAT], rates[-FLAT:]
    return bool(before) and max(last) < GROWS_ABOVE * max(before)


def _saturation(points: list[dict[str, Any]], ended: str) -> dict[str, Any]:
    """saturated_at_batch: None where the sweep ended while throughput still grew."""
    best = max((point["throughput_images_per_s"] for point in points), default=0.0)
    enough = (point["batch"] for point in points if point["throughput_images_per_s"] >= SATURATED * best)
    return {"saturated_at_batch": next(enough, None) if ended == "saturated" else None, "ended": ended}
