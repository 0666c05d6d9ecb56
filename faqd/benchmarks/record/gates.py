"""Bounds that a student must keep, such as in CI, judged on a record and on nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from faqd.benchmarks.report.figures import first_batch, latency_at
from faqd.errors import UserError


@dataclass(frozen=True)
class Gates:
    """None asks for nothing. Shares such as 0.99; p99 of the closed loop at the first batch size, in ms; energy above
    idle per image at that batch, in mJ."""

    min_accuracy_ratio: float | None = None
    min_agreement: float | None = None
    max_p99_ms: float | None = None
    max_energy_mj: float | None = None


@dataclass(frozen=True)
class _Gate:
    option: str
    measure: str
    unit: str
    least: bool
    """Whether the bound is the least that is good, else the most."""


_GATES = {
    "min_accuracy_ratio": _Gate("--min-accuracy-ratio", "accuracy_ratio", "", True),
    "min_agreement": _Gate("--min-agreement", "agreement", "", True),
    "max_p99_ms": _Gate("--max-p99-ms", "p99_ms", " ms", False),
    "max_energy_mj": _Gate("--max-energy-mj", "energy_per_image_mj", " mJ", False),
}


def judged(result: Mapping[str, Any], gates: Gates) -> list[dict[str, Any]]:
    """A record per gate, student and file that was judged: `found` is None where the figure does not exist, with the
    reason."""
    records = []
    for network in result["networks"]:
        if network["role"] != "student":
            continue
        for name, gate in _GATES.items():
            wanted = getattr(gates, name)
            for judged_file in _files(network, gate) if wanted is not None else ():
                found, reason = _figure(result, judged_file, gate.measure)
                passed = found is not None and (found >= wanted if gate.least else found <= wanted)
                record = {"option": gate.option, "measure": gate.measure, "network": network["name"]}
                record["file"] = judged_file.get("file")
                records.append({**record, "wanted": wanted, "found": found, "passed": passed, "reason": reason})
    return records


def _files(network: Mapping[str, Any], gate: _Gate) -> Iterator[Mapping[str, Any]]:
    """The file that was run, and for what outputs are worth the one that an engine is built from."""
    yield network
    if gate.least and network.get("engine_file"):
        yield network["engine_file"]


def check(records: list[dict[str, Any]]) -> None:
    """UserError with one sentence per gate that was not met (exit code 1), or whose figure does not exist (2)."""
    failed = [record for record in records if not record["passed"]]
    if failed:
        code = 2 if any(record["found"] is None for record in failed) else 1
        raise UserError(" ".join(map(_sentence, failed)), exit_code=code)


def _sentence(record: Mapping[str, Any]) -> str:
    gate = next(gate for gate in _GATES.values() if gate.option == record["option"])
    measure = record["measure"].removesuffix("_ms").removesuffix("_mj").replace("_", " ")
    who = f"{record['network']}, {record['file']}" if record["file"] else record["network"]
    if record["found"] is None:
        return f"{record['option']}: {who} has no {measure}: {record['reason']}."
    side = "below" if gate.least else "above"
    return (
        f"{who}: {measure} {record['found']:.4f}{gate.unit} is {side} the "
        f"{record['wanted']:g}{gate.unit} that {gate.option} asks for."
    )


def _figure(result: Mapping[str, Any], network: Mapping[str, Any], measure: str) -> tuple[float | None, str | None]:
    accuracy = network["accuracy"]
    if measure == "accuracy_ratio":
        ratio = accuracy["ratio_to_teacher"]
        return ratio, None if ratio is not None else "it takes labels and an output of shape (images, classes)"
    if measure == "agreement":
        share = accuracy["agreement"]
        return (share["value"], None) if share else (None, "it takes an output of shape (images, classes)")
    if measure == "p99_ms":
        latency = latency_at(network, first_batch(result))
        if latency is None:
            return None, "latency was not measured"
        p99 = latency["percentiles_ms"].get("99")
        return p99, None if p99 is not None else f"{latency['samples']} queries cannot carry a p99, 100 can"
    energy = network["energy"]
    if energy is None:
        return None, result["energy"]["reason"] or "it was not measured"
    return energy["energy_per_image_mj"], energy["reason"]
