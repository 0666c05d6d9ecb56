"""Latency: trtexec's definitions, on a clock that the test turns."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from faqd.benchmarks.latency import (
    MIN_QUERIES,
    Query,
    Times,
    interleaved,
    percentile,
    samples_needed,
    speed_up,
    summary,
)


class Clock:
    """Seconds that pass only when a query runs; remembers which ran."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def query(self, name: str, seconds: float) -> Query:
        def run() -> None:
            self.now += seconds
            self.log.append(name)

        return run


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
    record = summary(Times((tuple(float(i) for i in range(1, 20)),), 1.0), batch=1)
    assert record["samples"] == 19
    assert record["percentiles_ms"] == {"90": 18.0, "95": None, "99": None}
    record = summary(Times((tuple(float(i) for i in range(1, 101)),), 1.0), batch=1)
    assert record["percentiles_ms"] == {"90": 90.0, "95": 95.0, "99": 100.0}


def test_summary_by_the_definitions() -> None:
    record = summary(Times(((4.0, 1.0), (3.0, 2.0)), wall_s=0.02), batch=8)
    assert (record["min_ms"], record["max_ms"], record["mean_ms"]) == (1.0, 4.0, 2.5)
    assert record["median_ms"] == 2.5, "mean of the middle two for even n"
    assert record["coefficient_of_variation"] == pytest.approx(statistics.pstdev([1, 2, 3, 4]) / 2.5)
    assert record["throughput_queries_per_s"] == 200
    assert record["throughput_images_per_s"] == 1600
    assert record["round_medians_ms"] == [2.5, 2.5]
    assert len(record["distribution_ms"]) == 101


def test_networks_take_turns_in_every_round_after_a_warm_up() -> None:
    clock = Clock()
    queries = {"a": clock.query("a", 0.25), "b": clock.query("b", 0.5)}
    times = interleaved(queries, rounds=5, duration_s=5.0, warm_up_s=1.0, clock=clock)
    warm_up = ["a"] * 4 + ["b"] * 2
    one_round = ["a"] * (1 + 4) + ["b"] * (1 + 2)  # the first of each slice is not counted
    assert clock.log == warm_up + one_round * 5
    assert times["a"].rounds == ((250.0,) * 4,) * 5
    assert times["b"].rounds == ((500.0,) * 2,) * 5
    assert (times["a"].wall_s, times["b"].wall_s) == (5.0, 5.0)


def test_slow_networks_still_reach_the_least_number_of_queries() -> None:
    clock = Clock()
    times = interleaved({"slow": clock.query("slow", 100.0)}, rounds=4, duration_s=1.0, clock=clock)
    assert [len(values) for values in times["slow"].rounds] == [3, 3, 3, 3]
    assert len(times["slow"].all_ms) >= MIN_QUERIES


def test_a_latency_that_the_device_reports_is_taken_instead_of_the_host_clock() -> None:
    clock = Clock()

    def query() -> float:
        clock.now += 0.5
        return 3.0

    times = interleaved({"engine": query}, rounds=1, duration_s=5.0, clock=clock)
    assert set(times["engine"].all_ms) == {3.0}
    assert times["engine"].wall_s == 5.0


def test_speed_up_is_taken_within_the_rounds() -> None:
    """The machine slows down five times in the middle: the paired median does not see it."""
    slowness = (1, 1, 5, 5, 1)
    fast = Times(tuple((1.0 * s, 1.0 * s, 9.0 * s) for s in slowness), 1.0)
    slow = Times(tuple((2.0 * s, 2.0 * s, 2.0 * s) for s in slowness), 1.0)
    found = speed_up(fast, slow)
    assert (found.minima, found.paired, found.noisy) == (2.0, 2.0, False)


def test_a_comparison_that_disagrees_with_itself_is_noisy() -> None:
    fast = Times(((1.0,), (2.0,), (2.0,)), 1.0)
    slow = Times(((2.0,), (2.0,), (2.0,)), 1.0)
    found = speed_up(fast, slow)
    assert (found.minima, found.paired, found.noisy) == (2.0, 1.0, True)
