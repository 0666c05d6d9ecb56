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
from itertools import chain
from typing import Any, Protocol

from faqd.benchmarks.measure.percentiles import band, percentile, spread
from faqd.deploy.runtime.pipeline import QueryTimes

PERCENTILES = (90.0, 95.0, 99.0)
WARM_UP_MS = 200.0
DURATION_S = 3.0
ITERATIONS = 10
AVERAGE_RUNS = 10
"""trtexec's defaults."""
ROUNDS = 10
NOISY_ABOVE = 0.10
"""Relative distance of the two speed-ups from which a comparison is called noisy."""

UNSTABLE_ABOVE = 0.025
HOST_BOUND_ABOVE = 0.8
"""trtexec's limits: coefficient of variation of the compute time; median enqueue over median compute time."""

PARTS = ("enqueue", "h2d", "compute", "d2h")
CLOSED_LOOP, ONE_AHEAD = "closed_loop", "one_ahead"
Clock = Callable[[], float]


class Submission(Protocol):
    """Queries of one network at one batch size. slots: how many can be in flight; one is a closed loop."""

    slots: int

    def begin(self) -> None: ...

    def submit(self) -> None: ...

    def collect(self) -> QueryTimes: ...


@dataclass(frozen=True)
class Length:
    """How long to measure. duration_s: per network; the timed queries go on until both it and `iterations` are
    reached. rounds: in which all networks take turns."""

    duration_s: float = DURATION_S
    warm_up_ms: float = WARM_UP_MS
    iterations: int = ITERATIONS
    rounds: int = ROUNDS


@dataclass(frozen=True)
class Times:
    """The queries of one network, round by round, each round's begin in ms since that of the first, and the host time
    in s from the first submission of each round to its last completion, summed."""

    rounds: tuple[tuple[QueryTimes, ...], ...]
    begins_ms: tuple[float, ...]
    wall_s: float

    @property
    def queries(self) -> list[QueryTimes]:
        return list(chain.from_iterable(self.rounds))

    @property
    def all_ms(self) -> list[float]:
        return sorted(query.latency_ms for query in self.queries)

    @property
    def round_medians_ms(self) -> list[float]:
        return [statistics.median(query.latency_ms for query in queries) for queries in self.rounds]

    @property
    def queries_per_s(self) -> float:
        return len(self.queries) / self.wall_s


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
    networks: Mapping[str, Submission], length: Length, clock: Clock = time.perf_counter
) -> dict[str, Times]:
    """Time every network for about `length.duration_s`, in rounds A, B, C, A, B, C, ...

    Each network warms up once; then each of its slices begins with one query that is not counted, because the
    network before it has just emptied the caches. clock: seconds; given by tests.
    """
    for submission in networks.values():
        end = clock() + length.warm_up_ms / 1e3
        _one(submission)
        while clock() < end:
            _one(submission)
    slices: dict[str, list[tuple[QueryTimes, ...]]] = {name: [] for name in networks}
    begins_ms: dict[str, list[float]] = {name: [] for name in networks}
    wall_s = dict.fromkeys(networks, 0.0)
    zero = clock()
    at_least = math.ceil(length.iterations / length.rounds)
    for _ in range(length.rounds):
        for name, submission in networks.items():
            _one(submission)
            submission.begin()
            begins_ms[name].append((clock() - zero) * 1e3)
            times, took_s = _slice(submission, length.duration_s / length.rounds, at_least, clock)
            slices[name].append(times)
            wall_s[name] += took_s
    return {name: Times(tuple(slices[name]), tuple(begins_ms[name]), wall_s[name]) for name in networks}


def in_succession(measured: Sequence[Times]) -> Times:
    """The rounds of several measurements of one network, each round's begin still that since its own first."""
    return Times(
        tuple(queries for times in measured for queries in times.rounds),
        tuple(begin for times in measured for begin in times.begins_ms),
        sum(times.wall_s for times in measured),
    )


def _one(submission: Submission) -> None:
    submission.submit()
    submission.collect()


def _slice(
    submission: Submission, duration_s: float, at_least: int, clock: Clock
) -> tuple[tuple[QueryTimes, ...], float]:
    """The queries and the host time in s, until both the duration and the number of queries are reached."""
    times: list[QueryTimes] = []
    ahead = submission.slots - 1
    start = clock()
    for _ in range(ahead):
        submission.submit()
    while clock() - start < duration_s or len(times) + ahead < at_least:
        submission.submit()
        times.append(submission.collect())
    for _ in range(ahead):
        times.append(submission.collect())
    return tuple(times), clock() - start


def speed_up(network: Times, baseline: Times) -> SpeedUp:
    pairs = list(zip(baseline.round_medians_ms, network.round_medians_ms, strict=True))
    minima = min(slow for slow, _ in pairs) / min(fast for _, fast in pairs)
    paired = statistics.median(slow / fast for slow, fast in pairs)
    return SpeedUp(minima, paired, abs(minima / paired - 1) > NOISY_ABOVE)


def summary(
    times: Times,
    batch: int,
    percentiles: Sequence[float] = PERCENTILES,
    average_runs: int = AVERAGE_RUNS,
    *,
    parts: bool = False,
) -> dict[str, Any]:
    """The record of one network at one batch size; a percentile that the samples cannot carry is None.

    parts: whether enqueue, copies and kernels were told apart.
    """
    values = times.all_ms
    per_s = times.queries_per_s
    limits = {f"{p:g}": list(band(values, p)) for p in percentiles}
    found = spread(values, percentiles)
    for p, value in found["percentiles_ms"].items():
        limits[p] = limits[p] if value is not None else [None, None]
    return {
        "batch": batch,
        "samples": len(values),
        **found,
        "percentile_bands_ms": limits,
        "averages": _averages(times, average_runs),
        "throughput_queries_per_s": per_s,
        "throughput_images_per_s": per_s * batch,
        "wall_s": times.wall_s,
        "round_medians_ms": times.round_medians_ms,
        "distribution_ms": [percentile(values, p) for p in range(101)],
        "parts": {part: _part(times, part, percentiles) for part in PARTS} if parts else None,
    }


def _part(times: Times, part: str, percentiles: Sequence[float]) -> dict[str, Any]:
    return spread([getattr(query, f"{part}_ms") for query in times.queries], percentiles)


def _averages(times: Times, runs: int) -> dict[str, Any]:
    """trtexec averages so many queries in turn; the least and the largest of those averages."""
    values = [query.latency_ms for query in times.queries]
    means = [statistics.fmean(values[i : i + runs]) for i in range(0, len(values) - runs + 1, runs)]
    return {"runs": runs, "min_ms": min(means, default=None), "max_ms": max(means, default=None)}


def stability_warnings(record: Mapping[str, Any]) -> list[str]:
    """What trtexec warns of, for one record of `summary` whose parts were told apart."""
    parts = record["parts"]
    if parts is None:
        return []
    compute = parts["compute"]
    warnings = []
    if compute["coefficient_of_variation"] > UNSTABLE_ABOVE:
        warnings.append(
            f"its GPU compute time is unstable (it varies by {100 * compute['coefficient_of_variation']:.1f} %, above "
            f"{100 * UNSTABLE_ABOVE:g} %): lock the clocks (jetson_clocks, nvidia-smi -lgc) and repeat."
        )
    if parts["enqueue"]["median_ms"] > HOST_BOUND_ABOVE * compute["median_ms"]:
        warnings.append(
            "it is bound by the host (the median enqueue time is above 0.8 of the compute time): use a CUDA graph or a "
            "larger batch."
        )
    for part, copies in (("h2d", "into"), ("d2h", "out of")):
        if parts[part]["median_ms"] >= compute["median_ms"]:
            warnings.append(f"it is bound by copies {copies} the GPU, which take as long as computing.")
    return warnings
