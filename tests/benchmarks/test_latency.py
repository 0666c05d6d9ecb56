"""Latency: trtexec's definitions, on a clock that the test turns."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from faqd.benchmarks.measure.latency import (
    ITERATIONS,
    Length,
    Times,
    interleaved,
    speed_up,
    stability_warnings,
    summary,
)
from faqd.benchmarks.measure.percentiles import band, percentile, samples_needed
from faqd.benchmarks.report.trtexec_json import times_json
from faqd.deploy.runtime.pipeline import QueryTimes


class Clock:
    """Seconds that pass only when a query runs; remembers which ran."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now


class Turns:
    """Takes `seconds` of the clock per query. slots: 2 submits one ahead."""

    def __init__(self, clock: Clock, name: str, seconds: float, slots: int = 1) -> None:
        self.clock, self.name, self.seconds, self.slots = clock, name, seconds, slots
        self.in_flight = self.most = 0
        self.zero = 0.0

    def begin(self) -> None:
        assert self.in_flight == 0
        self.zero = self.clock.now

    def submit(self) -> None:
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        assert self.in_flight <= self.slots

    def collect(self) -> QueryTimes:
        assert self.in_flight
        self.in_flight -= 1
        start = (self.clock.now - self.zero) * 1e3
        self.clock.now += self.seconds
        self.clock.log.append(self.name)
        return query(self.seconds * 1e3, start)


def query(compute: float, start: float = 0.0, enqueue: float = 0.125, h2d: float = 0.0, d2h: float = 0.0) -> QueryTimes:
    return QueryTimes(start, enqueue, start, h2d, start + h2d, compute, start + h2d + compute, d2h)


def taken(*rounds: tuple[float, ...], wall_s: float = 1.0) -> Times:
    """The times of queries that took so many ms."""
    return Times(tuple(tuple(map(query, values)) for values in rounds), (0.0,) * len(rounds), wall_s)


@pytest.mark.parametrize(
    ("p", "n", "index"),
    [
        (90, 1, 0),
        (90, 9, 8),
        (90, 10, 8),  # float64 would say 9
        (90, 100, 89),
        (95, 20, 18),
        (99, 100, 99),  # float64 would say 98
        (99, 101, 99),
        (99, 1000, 990),  # float64 would say 989
        (50, 4, 1),
        (100, 7, 6),
        (0, 7, 0),
    ],
)
def test_percentile_takes_the_index_that_trtexec_takes_in_float32(p: float, n: int, index: int) -> None:
    assert percentile(range(n), p) == index


def test_percentile_never_interpolates_and_never_leaves_the_samples() -> None:
    generator = np.random.default_rng(0)
    for n in range(1, 400):
        values = sorted(generator.exponential(size=n).tolist())
        found = [percentile(values, p) for p in range(101)]
        assert found == sorted(found)
        assert set(found) <= set(values)


@pytest.mark.parametrize(("p", "n"), [(50, 2), (90, 10), (95, 20), (99, 100), (99.9, 1000)])
def test_samples_that_a_percentile_needs(p: float, n: int) -> None:
    assert samples_needed(p) == n


def test_a_percentile_that_the_samples_cannot_carry_is_left_out() -> None:
    record = summary(taken(tuple(float(i) for i in range(1, 20))), batch=1)
    assert record["samples"] == 19
    assert record["percentiles_ms"] == {"90": 18.0, "95": None, "99": None}
    record = summary(taken(tuple(float(i) for i in range(1, 101))), batch=1)
    assert record["percentiles_ms"] == {"90": 90.0, "95": 95.0, "99": 100.0}


def test_summary_by_the_definitions() -> None:
    record = summary(taken((4.0, 1.0), (3.0, 2.0), wall_s=0.02), batch=8, average_runs=2)
    assert (record["min_ms"], record["max_ms"], record["mean_ms"]) == (1.0, 4.0, 2.5)
    assert record["median_ms"] == 2.5, "mean of the middle two for even n"
    assert record["coefficient_of_variation"] == pytest.approx(statistics.pstdev([1, 2, 3, 4]) / 2.5)
    assert record["throughput_queries_per_s"] == 200
    assert record["throughput_images_per_s"] == 1600
    assert record["round_medians_ms"] == [2.5, 2.5]
    assert record["averages"] == {"runs": 2, "min_ms": 2.5, "max_ms": 2.5}
    assert len(record["distribution_ms"]) == 101


def test_networks_take_turns_in_every_round_after_a_warm_up() -> None:
    clock = Clock()
    networks = {"a": Turns(clock, "a", 0.25), "b": Turns(clock, "b", 0.5)}
    times = interleaved(networks, Length(5.0, 1000.0, rounds=5), clock)
    warm_up = ["a"] * 4 + ["b"] * 2
    one_round = ["a"] * (1 + 4) + ["b"] * (1 + 2)  # the first of each slice is not counted
    assert clock.log == warm_up + one_round * 5
    assert [[found.compute_ms for found in values] for values in times["a"].rounds] == [[250.0] * 4] * 5
    assert [[found.compute_ms for found in values] for values in times["b"].rounds] == [[500.0] * 2] * 5
    assert (times["a"].wall_s, times["b"].wall_s) == (5.0, 5.0)


def test_slow_networks_still_reach_the_least_number_of_queries() -> None:
    clock = Clock()
    times = interleaved({"slow": Turns(clock, "slow", 100.0)}, Length(1.0, rounds=4), clock)
    assert [len(values) for values in times["slow"].rounds] == [3, 3, 3, 3]
    assert len(times["slow"].all_ms) >= ITERATIONS
    times = interleaved({"slow": Turns(clock, "slow", 100.0)}, Length(1.0, iterations=20, rounds=4), clock)
    assert [len(values) for values in times["slow"].rounds] == [5, 5, 5, 5]


def test_one_query_ahead_is_in_flight_and_every_one_is_counted() -> None:
    clock = Clock()
    ahead = Turns(clock, "ahead", 0.5, slots=2)
    times = interleaved({"ahead": ahead}, Length(5.0, 0.0, rounds=2), clock)["ahead"]
    assert ahead.most == 2 and ahead.in_flight == 0
    assert [len(values) for values in times.rounds] == [6, 6], "5 within the slice and the one in flight at its end"
    assert times.queries_per_s == 12 / 6.0


def test_exported_times_are_trtexecs_and_run_on_over_the_rounds() -> None:
    clock = Clock()
    times = interleaved({"a": Turns(clock, "a", 0.5)}, Length(2.0, 0.0, rounds=2, iterations=1), clock)["a"]
    records = times_json(times)
    keys = "startEnqMs endEnqMs startH2dMs endH2dMs startComputeMs endComputeMs startD2hMs endD2hMs "
    assert list(records[0]) == (keys + "h2dMs computeMs d2hMs latencyMs").split()
    starts = [record["startComputeMs"] for record in records]
    assert starts == [500, 1000, 2000, 2500], "the query that opens a round is not counted"
    assert all(r["endComputeMs"] - r["startComputeMs"] == r["computeMs"] == r["latencyMs"] for r in records)


def test_latency_is_the_copies_and_the_kernels_but_not_the_enqueue() -> None:
    assert query(2.0, enqueue=9.0, h2d=0.5, d2h=0.25).latency_ms == 2.75
    times = Times(((query(2.0, enqueue=9.0, h2d=0.5, d2h=0.25),) * 10,), (0.0,), 1.0)
    parts = summary(times, 1, parts=True)["parts"]
    assert {name: part["median_ms"] for name, part in parts.items()} == {
        "enqueue": 9.0,
        "h2d": 0.5,
        "compute": 2.0,
        "d2h": 0.25,
    }
    assert summary(times, 1)["parts"] is None


@pytest.mark.parametrize(
    ("queries", "said"),
    [
        ([query(2.0)] * 10, []),
        ([query(2.0), query(2.2)] * 5, ["unstable"]),
        ([query(2.0, enqueue=1.7)] * 10, ["bound by the host"]),
        ([query(2.0, h2d=2.0, d2h=2.5)] * 10, ["copies into", "copies out of"]),
    ],
)
def test_warnings_are_trtexecs(queries: list[QueryTimes], said: list[str]) -> None:
    found = stability_warnings(summary(Times((tuple(queries),), (0.0,), 1.0), 1, parts=True))
    assert len(found) == len(said) and all(word in text for word, text in zip(said, found, strict=True))


@pytest.mark.parametrize(("n", "p"), [(200, 50), (500, 90), (1000, 99)])
def test_the_band_of_a_percentile_covers_it_95_times_in_100(n: int, p: float) -> None:
    generator = np.random.default_rng(n)
    missed = 0
    for _ in range(2000):
        low, high = band(sorted(generator.uniform(size=n).tolist()), p)
        assert low is not None and high is not None
        missed += not low <= p / 100 <= high
    assert 0.02 < missed / 2000 < 0.06, "conservative by the steps of the binomial"


def test_a_limit_that_no_sample_can_give_is_none() -> None:
    low, high = band([float(i) for i in range(100)], 99)
    assert low is not None and high is None, "P(no sample beyond p99) is 0.37"
    assert band([1.0], 50) == (None, None)
    record = summary(taken(tuple(float(i) for i in range(50))), batch=1)
    assert record["percentile_bands_ms"]["99"] == [None, None] and record["percentiles_ms"]["99"] is None


def test_speed_up_is_taken_within_the_rounds() -> None:
    """The machine slows down five times in the middle: the paired median does not see it."""
    slowness = (1, 1, 5, 5, 1)
    fast = taken(*((1.0 * s, 1.0 * s, 9.0 * s) for s in slowness))
    slow = taken(*((2.0 * s, 2.0 * s, 2.0 * s) for s in slowness))
    found = speed_up(fast, slow)
    assert (found.minima, found.paired, found.noisy) == (2.0, 2.0, False)


def test_a_comparison_that_disagrees_with_itself_is_noisy() -> None:
    fast = taken((1.0,), (2.0,), (2.0,))
    slow = taken((2.0,), (2.0,), (2.0,))
    found = speed_up(fast, slow)
    assert (found.minima, found.paired, found.noisy) == (2.0, 1.0, True)
