"""How long an iteration takes on many devices, of what its parts take on one: a model, and its table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

HEAPS = {"1.3 M": 1_300_000, "100 M": 100_000_000}
HOUR = 3600.0


@dataclass(frozen=True)
class Parts:
    """CPU seconds of one process of one thread. decode, teacher, student, affinity: of an image, forward and backward.
    fixed: of an iteration, whatever its images: weights are projected, and stepped. gradient_bytes: of all weights."""

    decode: float
    teacher: float
    student: float
    affinity: float
    fixed: float
    gradient_bytes: int

    @property
    def network(self) -> float:
        return self.teacher + self.student + self.affinity


@dataclass(frozen=True)
class Assumed:
    """What nobody measured here, of machines with GPUs.

    speed: of a GPU, in threads of the CPU that the parts were measured on. launch_s: of an iteration, what the host
    takes to start some thousands of kernels, below which no share of a batch is faster. decoders: CPU threads for each
    GPU. gpus: of one machine. within, between: bytes a second of a link in a machine and to the next. latency_s: of
    each of the 2 (P - 1) steps of a ring.
    """

    speed: float = 100.0
    launch_s: float = 0.03
    decoders: int = 8
    gpus: int = 8
    within: float = 50e9
    between: float = 10e9
    latency_s: float = 20e-6


def of_process(parts: Parts, batch: int, processes: int) -> float:
    """CPU seconds that each of several processes with a thread each takes for its share of a batch, decoding too."""
    return (parts.decode + parts.network) * batch / processes + parts.fixed


def on_cores(parts: Parts, batch: int, processes: int, cores: int, exchange: float) -> float:
    """Seconds of an iteration of `processes` on so many cores that do nothing else. exchange: measured, of all
    gradients among them."""
    return of_process(parts, batch, processes) * max(1.0, processes / cores) + exchange


def on_gpus(parts: Parts, assumed: Assumed, batch: int, gpus: int) -> dict[str, float]:
    """Seconds of an iteration of a batch that so many GPUs share, and of what it is made. Decoding runs beside."""
    share = math.ceil(batch / gpus)
    decode = parts.decode * share / assumed.decoders
    compute = max(assumed.launch_s, (parts.network * share + parts.fixed) / assumed.speed)
    link = assumed.within if gpus <= assumed.gpus else assumed.between
    steps = 2 * (gpus - 1)
    exchange = steps * assumed.latency_s + steps / gpus * parts.gradient_bytes / link
    return {
        "decode": decode,
        "compute": compute,
        "exchange": exchange,
        "iteration": max(decode, compute + exchange),
    }


def hours(iteration: float, batch: int, images: int) -> float:
    """Of one pass over so many images."""
    return images / batch * iteration / HOUR


def tables(record: Mapping[str, Any]) -> str:
    """In markdown: the parts, what was measured, held against the model, and what it predicts for GPUs."""
    parts, assumed = Parts(**record["parts"]), Assumed(**record["assumed"])
    batch, found = record["batch"], record["measured"]
    shown = {
        "decoding an image": parts.decode,
        "teacher, of an image": parts.teacher,
        "student, of an image": parts.student,
        "affinity, of an image": parts.affinity,
        "what no image takes, of an iteration": parts.fixed,
    }
    lines = ["| part | CPU ms |", "| --- | --- |"]
    lines += [f"| {name} | {1000 * seconds:.1f} |" for name, seconds in shown.items()]
    lines += [
        "",
        "| processes | CPU s of each | model | apart | model on idle cores, s | beside other work, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found:
        processes, cpu, wall = row["processes"], row["cpu_s"]["least"], row["wall_s"]["least"]
        model = of_process(parts, batch, processes)
        idle = on_cores(parts, batch, processes, record["cores"], row["exchange_s"])
        apart = f"{100 * (model / cpu - 1):+.0f} %"
        lines.append(f"| {processes} | {cpu:.2f} | {model:.2f} | {apart} | {idle:.2f} | {wall:.2f} |")
    lines += [
        "",
        "| GPUs | batch | decode, ms | compute, ms | exchange, ms | iteration, ms | 1.3 M images, h | 100 M, h |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for gpus, size in record["asked"]:
        each = on_gpus(parts, assumed, size, gpus)
        cells = [f"{1000 * each[name]:.1f}" for name in ("decode", "compute", "exchange", "iteration")]
        passes = [f"{hours(each['iteration'], size, images):.2f}" for images in HEAPS.values()]
        lines.append(f"| {gpus} | {size} | {' | '.join([*cells, *passes])} |")
    return "\n".join(lines)


def to_json(parts: Parts, assumed: Assumed) -> dict[str, Any]:
    return {"parts": asdict(parts), "assumed": asdict(assumed)}
