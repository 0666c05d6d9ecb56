"""Energy per inference: power over a run long against the sensor's update interval, less the idle power before it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from faqd.benchmarks.measure import hwmon, nvml
from faqd.benchmarks.measure.latency import CLOSED_LOOP, Clock, Submission
from faqd.errors import UserError

ENERGY_S = 5.0
IDLE_S = 2.0
UPDATES = 20
"""Updates of the sensor that a measurement spans at least."""
ASSUMED_INTERVAL_S = 0.1
"""Of a sensor that does not tell."""

LEAST_ABOVE_IDLE = 0.01
"""Share of the power under load: less than that is within the error of such sensors."""

WHOLE = (("VIN",), ("VDD_IN",), ("VDD_GPU_SOC", "VDD_CPU_CV"))
"""Rails that stand for the module, best first: system input of Thor; whole module of Orin Nano and NX; on AGX Orin,
which has no such rail, the sum of what computes (VIN_SYS_5V0 feeds inputs and outputs)."""

Read = Callable[[], "float | None"]


class Meter(Protocol):
    """name: the rail. kind: where it is read. interval_s: how often its value is new."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def interval_s(self) -> float: ...

    def watts(self) -> float | None: ...

    def joules(self) -> float | None:
        """A counter of energy, where there is one: exact between two readings; else None."""
        ...


@dataclass(frozen=True)
class RailMeter:
    """One or several rails of a Jetson, added."""

    rails: tuple[hwmon.Rail, ...]

    @property
    def name(self) -> str:
        return " + ".join(rail.name for rail in self.rails)

    @property
    def kind(self) -> str:
        return f"hwmon {self.rails[0].sensor}"

    @property
    def interval_s(self) -> float:
        return max(rail.interval_s or ASSUMED_INTERVAL_S for rail in self.rails)

    def watts(self) -> float | None:
        values = [rail.watts() for rail in self.rails]
        known = [value for value in values if value is not None]
        return sum(known) if len(known) == len(values) else None

    def joules(self) -> float | None:
        return None


class NvmlMeter:
    """The board power of a desktop GPU."""

    name = "GPU board"
    kind = "NVML"
    interval_s = ASSUMED_INTERVAL_S

    def __init__(self, gpu: nvml.Gpu) -> None:
        self.watts = gpu.power_w
        self.joules = gpu.energy_j


def find_meter(gpu: str | None, rail: str | None = None, root: Path = Path("/")) -> tuple[Meter | None, str]:
    """What measures power here, or None and the reason. gpu: the name of the one that computes; None for the CPU, whose
    power only a Jetson's rails tell. rail: the one to take instead of the module's. UserError where it is not there."""
    found = {each.name: each for each in hwmon.rails(root)}
    if rail is not None:
        if rail not in found:
            there = f"here are {', '.join(found)}" if found else "no power rail is to be seen here"
            raise UserError(f"--power-rail {rail}: no such rail; {there}.")
        return RailMeter((found[rail],)), ""
    for names in WHOLE:
        if all(name in found for name in names):
            return RailMeter(tuple(found[name] for name in names)), ""
    if found:
        return (
            None,
            f"none of the rails {', '.join(found)} is known to stand for the module: choose one by --power-rail",
        )
    if gpu is None:
        return None, "no power rail under /sys/class/hwmon (a Jetson has some), and NVML measures GPUs only"
    try:
        meter = NvmlMeter(nvml.open_gpu(gpu))
    except nvml.NoNvml as reason:
        return None, f"no power rail under /sys/class/hwmon; {reason}"
    if meter.watts() is None and meter.joules() is None:
        return None, f"NVML does not tell the power of {gpu} (it answers NotSupported), and there is no hwmon rail"
    return meter, ""


def not_measured(reason: str) -> dict[str, Any]:
    return {"status": "no energy data", "reason": reason, "rail": None, "source": None}


def meter_json(meter: Meter) -> dict[str, Any]:
    return {"status": "measured", "reason": None, "rail": meter.name, "source": meter.kind}


def measure(
    submission: Submission,
    batch: int,
    meter: Meter,
    duration_s: float = ENERGY_S,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """The record of one network: joules above idle over the number of images. Idle is taken just before, with the
    network loaded and nothing submitted."""
    least = UPDATES * meter.interval_s
    idle = _watched(lambda: sleep(meter.interval_s), max(IDLE_S, least), meter, clock)
    queries = 0

    def query() -> None:
        nonlocal queries
        submission.submit()
        submission.collect()
        queries += 1

    query()
    queries = 0
    load = _watched(query, max(duration_s, least), meter, clock)
    record = {
        "batch": batch,
        "submission": CLOSED_LOOP,
        "queries": queries,
        "duration_s": load.seconds,
        "samples": load.samples,
        "idle_w": idle.watts,
        "load_w": load.watts,
        "energy_per_query_mj": None,
        "energy_per_image_mj": None,
        "total_energy_per_image_mj": None,
        "reason": None,
    }
    if load.joules is None or load.watts is None or idle.watts is None:
        return record | {"reason": f"{meter.name} gave no value while the network ran"}
    record["total_energy_per_image_mj"] = 1e3 * load.joules / (queries * batch)
    above = load.joules - idle.watts * load.seconds
    if above < LEAST_ABOVE_IDLE * load.joules:
        return record | {"reason": f"the power of {meter.name} under load is not above its idle power"}
    return record | {
        "energy_per_query_mj": 1e3 * above / queries,
        "energy_per_image_mj": 1e3 * above / (queries * batch),
    }


@dataclass(frozen=True)
class _Watched:
    seconds: float
    joules: float | None
    samples: int

    @property
    def watts(self) -> float | None:
        return None if self.joules is None else self.joules / self.seconds


def _watched(step: Callable[[], None], duration_s: float, meter: Meter, clock: Clock) -> _Watched:
    """Repeat `step` for that long and follow the power beside it: by the counter of energy where there is one, else by
    samples no closer than the sensor's interval."""
    counted = meter.joules()
    start = clock()
    samples = [(start, meter.watts())]
    while (now := clock()) - start < duration_s:
        step()
        if counted is None and (now := clock()) - samples[-1][0] >= meter.interval_s:
            samples.append((now, meter.watts()))
    end = clock()
    if counted is not None:
        after = meter.joules()
        return _Watched(end - start, None if after is None else after - counted, 2)
    samples.append((end, meter.watts()))
    known = [(at, value) for at, value in samples if value is not None]
    return _Watched(end - start, _integral(known), len(known))


def _integral(samples: Sequence[tuple[float, float]]) -> float | None:
    """Joules by the trapezoidal rule; a sample that failed is bridged."""
    if len(samples) < 2:
        return None
    pairs = pairwise(samples)
    return sum((later - sooner) * (a + b) / 2 for (sooner, a), (later, b) in pairs)
