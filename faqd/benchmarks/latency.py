"""How long a query takes, by trtexec's definitions, with all compared networks interleaved in one run.

A shared CPU can slow down several times for minutes, and a GPU changes its clocks: two runs are never
comparable, two networks measured in turn within the same rounds are.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any

import numpy as np

PERCENTILES = (90.0, 95.0, 99.0)
WARM_UP_S = 0.2
DURATION_S = 3.0
MIN_QUERIES = 10
"""trtexec's defaults: 200 ms, 3 s, at least 10 queries."""
ROUNDS = 10
NOISY_ABOVE = 0.10
"""Relative distance of the two speed-ups from which a comparison is called noisy."""

Query = Callable[[], float | None]
"""Run one query to its end. Returns its latency in ms as the device saw it, or None: then the host clock counts."""


@dataclass(frozen=True)
class Times:
    """The latencies of one network in ms, round by round, and the host time in s that its timed queries took."""

    rounds: tuple[tuple[float, ...], ...]
    wall_s: float

    @property
    def all_ms(self) -> list[float]:
        return sorted(chain.from_iterable(self.rounds))

    @property
    def round_medians_ms(self) -> list[float]:
        return [statistics.median(times) for times in self.rounds]


@dataclass(frozen=True)
class SpeedUp:
    """How many times faster a network is than a baseline measured in the same rounds.

    minima: ratio of the fastest round medians. paired: median of the per-round ratios.
    noisy: the two disagree by more than 10 %, so the machine was not quiet and the run should be repeated.
    """

    minima: float
    paired: float
    noisy: bool

    def to_json(self) -> dict[str, Any]:
        return {"paired_median": self.paired, "ratio_of_minima": self.minima, "noisy": self.noisy}


def interleaved(
    networks: Mapping[str, Query],
    *,
    rounds: int = ROUNDS,
    duration_s: float = DURATION_S,
    warm_up_s: float = WARM_UP_S,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Time every network for about `duration_s`, in rounds A, B, C, A, B, C, ...

    Each network warms up once; then each of its slices begins with one query that is not counted, because the
    network before it has just emptied the caches. clock: seconds; given by tests.
    """
    for query in networks.values():
        end = clock() + warm_up_s
        query()
        while clock() < end:
            query()
    slices: dict[str, list[tuple[float, ...]]] = {name: [] for name in networks}
    wall_s = dict.fromkeys(networks, 0.0)
    at_least = math.ceil(MIN_QUERIES / rounds)
    for _ in range(rounds):
        for name, query in networks.items():
            query()
            times, took_s = _slice(query, duration_s / rounds, at_least, clock)
            slices[name].append(times)
            wall_s[name] += took_s
    return {name: Times(tuple(slices[name]), wall_s[name]) for name in networks}


def _slice(
    query: Query, duration_s: float, at_least: int, clock: Callable[[], float]
) -> tuple[tuple[float, ...], float]:
    """Latencies in ms and the host time in s, until both the duration and the number of queries are reached."""
    times: list[float] = []
    start = now = clock()
    while now - start < duration_s or len(times) < at_least:
        before = now
        device_ms = query()
        now = clock()
        times.append((now - before) * 1e3 if device_ms is None else device_ms)
    return tuple(times), now - start


def speed_up(network: Times, baseline: Times) -> SpeedUp:
    pairs = list(zip(baseline.round_medians_ms, network.round_medians_ms, strict=True))
    minima = min(slow for slow, _ in pairs) / min(fast for _, fast in pairs)
    paired = statistics.median(slow / fast for slow, fast in pairs)
    return SpeedUp(minima, paired, abs(minima / paired - 1) > NOISY_ABOVE)


def percentile(sorted_ms: Sequence[float], p: float) -> float:
    """trtexec's percentile: no interpolation, index max(n - 1 - floor((1 - p / 100) n), 0).

    trtexec evaluates the index in float32; float64 gives another one at every multiple of 10 for p90 and of 100
    for p99.
    """
    excluded = int((np.float32(1) - np.float32(p) / np.float32(100)) * np.float32(len(sorted_ms)))
    return sorted_ms[max(len(sorted_ms) - 1 - excluded, 0)]


def samples_needed(p: float) -> int:
    """Queries that a percentile needs so that, on average, one lies beyond it: p90 10, p99 100, p99.9 1000."""
    return math.ceil(100 / (100 - Fraction(str(p))))


def summary(times: Times, batch: int) -> dict[str, Any]:
    """The record of one network at one batch size; a percentile that the samples cannot carry is None."""
    values = times.all_ms
    mean = statistics.fmean(values)
    per_s = len(values) / times.wall_s
    return {
        "batch": batch,
        "samples": len(values),
        "min_ms": values[0],
        "median_ms": statistics.median(values),
        "mean_ms": mean,
        "max_ms": values[-1],
        "coefficient_of_variation": statistics.pstdev(values, mean) / mean,
        "percentiles_ms": {f"{p:g}": _carried(values, p) for p in PERCENTILES},
        "throughput_queries_per_s": per_s,
        "throughput_images_per_s": per_s * batch,
        "round_medians_ms": times.round_medians_ms,
        "distribution_ms": [percentile(values, p) for p in range(101)],
    }


def _carried(values: Sequence[float], p: float) -> float | None:
    return percentile(values, p) if len(values) >= samples_needed(p) else None
