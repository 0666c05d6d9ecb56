"""Two records beside each other: what changed beyond noise between two runs.

Shares changed if their 95 % intervals do not overlap. Latency changed if a rank test on the medians of the rounds says
so and the medians differ by more than 2 %: rounds of one run share its conditions, so a small difference between two
runs on the same machine is no finding, whatever its p-value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from faqd.benchmarks.report.figures import Record, latency_at, processor
from faqd.errors import UserError

FORMAT = "faqd-bench-comparison"
VERSION = 1
LEAST_CHANGE = 0.02
SIGNIFICANCE = 0.01
LEAST_ROUNDS = 5
"""In each run; with fewer, the rank test can hardly reach its level whatever the times."""

CONDITIONS = ("backend", "preset", "cuda_graph", "spin_wait", "transfers", "zero_copy")
"""Switches with which a latency means something else."""


def compare(a: Record, b: Record) -> dict[str, Any]:
    """The changes from `a` to `b`, network by network. UserError where nothing in them can be compared."""
    differ = list(_differences(a, b))
    accuracy_differs = [text for text in differ if text.startswith("evaluation data")]
    latency_differs = [text for text in differ if not text.startswith("evaluation data")]
    others = _by_key(b)
    pairs = [(network, others[key]) for key, network in _by_key(a).items() if key in others]
    if not pairs:
        raise UserError("the two records have no network in common (by name, kind and bits); nothing to compare.")
    changes = []
    for before, after in pairs:
        if not accuracy_differs:
            changes += list(_accuracy(before, after))
        if not latency_differs:
            changes += list(_latency(before, after))
    if not changes:
        raise UserError(f"the two records cannot be compared: {'; '.join(differ) or 'they measured different things'}.")
    return {"format": FORMAT, "version": VERSION, "not_compared_because": differ, "changes": changes}


def worse(comparison: Mapping[str, Any]) -> list[str]:
    """A sentence for each figure that got worse beyond noise."""
    return [
        f"{in_full(change)}: {change['measure']} got worse, from {change['before']:.4g} to {change['after']:.4g}."
        for change in comparison["changes"]
        if change["verdict"] == "worse"
    ]


def in_full(change: Mapping[str, Any]) -> str:
    """The network with the file that the change is of."""
    return f"{change['network']}, {change['file']}" if change["file"] else str(change["network"])


def rank_test(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value of the Mann-Whitney test, exact; ties count half, which errs on the safe side."""
    u = sum((x > y) + 0.5 * (x == y) for x in a for y in b)
    n, m = len(a), len(b)
    u = min(u, n * m - u)
    ways = _ways(n, m)
    return min(1.0, 2 * sum(ways[: int(u + 0.5) + 1]) / sum(ways))


@cache
def _ways(n: int, m: int) -> tuple[int, ...]:
    """How many of the orders of n and m values give the statistic 0, 1, ... n m."""
    if n == 0 or m == 0:
        return (1,)
    with_largest_of_a, with_largest_of_b = _ways(n - 1, m), _ways(n, m - 1)
    total = [0] * (n * m + 1)
    for u, count in enumerate(with_largest_of_a):
        total[u + m] += count
    for u, count in enumerate(with_largest_of_b):
        total[u] += count
    return tuple(total)


def _by_key(record: Record) -> dict[tuple[Any, ...], Record]:
    """The networks by what they are called, and by how many of that name stand before them."""
    found: dict[tuple[Any, ...], Record] = {}
    for network in record["networks"]:
        made = None if network["role"].startswith("teacher") else record["bundles"][network["bundle"]]["kind"]
        name = (made, *(network[key] for key in ("role", "name", "kind", "weight_bits", "act_bits")))
        key = (*name, sum(other[:-1] == name for other in found))
        found[key] = network
    return found


def _differences(a: Record, b: Record) -> Iterator[str]:
    if a["evaluation"]["sha256"] != b["evaluation"]["sha256"]:
        yield "evaluation data differ, so accuracies are not compared"
    # A record of before names its CPU alone.
    named = all("instruction_sets" in record["environment"] for record in (a, b))
    cpus = [processor(record) if named else record["environment"]["cpu"] for record in (a, b)]
    for what, before, after in (("device", *(record["backend"]["device"] for record in (a, b))), ("CPU", *cpus)):
        if before != after:
            yield f"{what} {before} against {after}, so latencies are not compared"
    threads = [record["backend"].get("threads") for record in (a, b)]
    if threads[0] != threads[1]:
        yield f"threads {threads[0]} against {threads[1]}, so latencies are not compared"
    for name in CONDITIONS:
        before, after = (record["switches"].get(name) for record in (a, b))
        if before != after:
            yield f"{name} {before} against {after}, so latencies are not compared"


def _accuracy(a: Record, b: Record) -> Iterator[dict[str, Any]]:
    beside = [network.get("engine_file") or {"accuracy": None} for network in (a, b)]
    for old, new in ((a, b), beside):
        for measure in ("top1", "agreement"):
            before, after = ((each["accuracy"] or {}).get(measure) for each in (old, new))
            if before and after:
                apart = before["low"] > after["high"] or after["low"] > before["high"]
                values = before["value"], after["value"]
                yield _change(a, old.get("file"), measure, None, *values, apart, higher_is_better=True)


def _latency(a: Record, b: Record) -> Iterator[dict[str, Any]]:
    for before in a["latency"]:
        after = latency_at(b, before["batch"])
        if after is None:
            continue
        rounds = before["round_medians_ms"], after["round_medians_ms"]
        old, new = before["median_ms"], after["median_ms"]
        apart: bool | None = None
        if min(map(len, rounds)) >= LEAST_ROUNDS:
            apart = abs(new / old - 1) > LEAST_CHANGE and rank_test(*rounds) < SIGNIFICANCE
        yield _change(a, a.get("file"), "median_ms", before["batch"], old, new, apart, higher_is_better=False)


def _change(
    network: Record,
    file: str | None,
    measure: str,
    batch: int | None,
    before: float,
    after: float,
    apart: bool | None,
    *,
    higher_is_better: bool,
) -> dict[str, Any]:
    """file: what the figure is of; None in older records. apart: whether the two differ beyond noise; None where too
    little was measured to tell."""
    verdict = "cannot tell" if apart is None else "within noise"
    if apart:
        verdict = "better" if (after > before) == higher_is_better else "worse"
    return {
        "network": network["name"],
        "file": file,
        "measure": measure,
        "batch": batch,
        "before": before,
        "after": after,
        "relative_change": after / before - 1 if before else None,
        "verdict": verdict,
    }
