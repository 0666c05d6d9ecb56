"""What the feature-affinity losses cost beside the direct form of the same loss: time and memory, both exact.

`python -m faqd.benchmarks.studies.affinity --json FILE` times forward + backward of every form in one process,
round by round (all variants in a random order, then all again), and takes the peak memory of each in a process of
its own. FILE is written after every map; a direct form whose (N, N) matrices cannot be held is left out, which FILE
says.
"""

from __future__ import annotations

import itertools
import multiprocessing
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from faqd import __version__
from faqd.benchmarks.measure.environment import environment
from faqd.benchmarks.studies.affinity_baseline import direct_affinity
from faqd.benchmarks.studies.speed_up import speed_up
from faqd.command import emit_json, json_option, run
from faqd.train.losses.distillation import AffinityForm, affinity_loss

VERSION = 1
FORMS: tuple[AffinityForm, ...] = get_args(AffinityForm)
# What each form is compared with; fast estimates its counterpart, the others are equal to theirs.
DIRECT = {"l1": "direct l1", "l2": "direct l2", "l2_squared": "direct l2_squared", "fast": "direct l2_squared"}
COLUMNS = 15
SLOW_S = 4.0
RESNET20 = ("resnet20-1", "resnet20-2", "resnet20-3")
SIDES = ("side-32", "side-64", "side-128", "side-256")
MAPS: dict[str, tuple[int, int, int]] = {
    "resnet20-1": (100, 16, 32),
    "resnet20-2": (100, 32, 16),
    "resnet20-3": (100, 64, 8),
    "resnet18-1": (8, 64, 56),
    "resnet18-2": (8, 128, 28),
    "resnet18-3": (8, 256, 14),
    "resnet18-4": (8, 512, 7),
    "side-32": (1, 64, 32),
    "side-64": (1, 64, 64),
    "side-128": (1, 64, 128),
    "side-256": (1, 64, 256),
}


@dataclass
class Variant:
    """Forward + backward of one form, direct or ours, and what it took: seconds per round, peak MB."""

    name: str
    call: Callable[[], Tensor]
    student: Tensor
    seconds: list[float] = field(default_factory=list)
    peak_mb: float | None = None

    def once(self) -> float:
        self.student.grad = None
        start = time.perf_counter()
        torch.autograd.backward(self.call())
        return time.perf_counter() - start


def variants(shape: tuple[int, int, int]) -> dict[str, Variant]:
    """Every variant that fits the memory of this machine, on unrelated maps after a ReLU."""
    batch, channels, side = shape
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(batch, channels, side, side, generator=generator).relu_() for _ in range(2))
    student.requires_grad_()
    calls: dict[str, Callable[[], Tensor]] = {}
    if direct_fits(shape):
        for form in ("l1", "l2", "l2_squared"):
            calls[f"direct {form}"] = lambda form=form: direct_affinity(student, teacher, form)  # type: ignore[misc]
    draws = torch.Generator().manual_seed(1)
    for ours in FORMS:
        calls[ours] = lambda form=ours: affinity_loss(  # type: ignore[misc]
            student, teacher, form, columns=COLUMNS, generator=draws
        )
    return {name: Variant(name, call, student) for name, call in calls.items()}


def direct_fits(shape: tuple[int, int, int]) -> bool:
    """Whether the matrices of the direct forms are at most half of the memory that is free."""
    return direct_gb(shape) <= _kib("/proc/meminfo", "MemAvailable") * 1024 / 2e9


def direct_gb(shape: tuple[int, int, int]) -> float:
    """What the direct forms hold at their peak: six float32 (N, N) matrices per sample."""
    batch, _, side = shape
    return 6 * 4 * batch * side**4 / 1e9


def timed(shape: tuple[int, int, int], rounds: int) -> dict[str, Variant]:
    """Time all variants round by round, after a warm-up that is not counted.

    What ran before leaves the caches warm or cold, so each round has an order of its own. A variant that has taken
    `SLOW_S` in all sits out the rounds after the second.
    """
    found = variants(shape)
    for variant in found.values():
        variant.once()
    shuffle = random.Random(0).shuffle
    order = list(found.values())
    for _ in range(rounds):
        shuffle(order)
        for variant in order:
            if len(variant.seconds) < 2 or sum(variant.seconds) < SLOW_S:
                variant.seconds.append(variant.once())
    return found


def peak_mb(shape: tuple[int, int, int], name: str, threads: int) -> float:
    """Highest resident memory of one forward + backward, in MB, less what was resident before the call."""
    torch.set_num_threads(threads)
    variants((2, 4, 6))[name].once()
    variant = variants(shape)[name]
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _kib("/proc/self/status", "VmRSS")
    variant.once()
    return (_kib("/proc/self/status", "VmHWM") - before) * 1024 / 1e6


def apart(shape: tuple[int, int, int], name: str, threads: int) -> float:
    # The server imports torch once and has not used it; each child of it starts with the same memory.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faqd.train.losses.distillation"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak_mb, shape, name, threads).result()


def _kib(path: str, key: str) -> int:
    for line in Path(path).read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"{path} has no {key}.")


def record(name: str, found: dict[str, Variant]) -> dict[str, Any]:
    """One map's JSON: milliseconds, MB, and how often faster and leaner than direct, same loss, same rounds."""
    batch, channels, side = MAPS[name]
    rows = []
    for variant in found.values():
        row: dict[str, Any] = {
            "variant": variant.name,
            "min_ms": min(variant.seconds) * 1e3,
            "median_ms": statistics.median(variant.seconds) * 1e3,
            "rounds": len(variant.seconds),
            "peak_mb": variant.peak_mb,
        }
        baseline = found.get(DIRECT.get(variant.name, ""))
        if baseline is not None:
            row["against"] = baseline.name
            row["speed_up"] = speed_up(variant.seconds, baseline.seconds)
            if variant.peak_mb and baseline.peak_mb:
                row["memory_ratio"] = baseline.peak_mb / variant.peak_mb
        rows.append(row)
    result: dict[str, Any] = {"map": name, "batch": batch, "channels": channels, "side": side, "variants": rows}
    if not any(variant.name.startswith("direct") for variant in found.values()):
        result["left_out"] = (
            f"direct: its matrices take {direct_gb(MAPS[name]):.3g} GB, more than half of the free memory"
        )
    return result


def targets(found: dict[str, dict[str, Variant]]) -> list[dict[str, Any]]:
    """Each claim, its bound and what came out, where the maps it speaks of were measured."""
    minima = {name: {v.name: min(v.seconds) for v in measured.values()} for name, measured in found.items()}
    claims: list[tuple[str, str, float, float]] = []
    if set(RESNET20) <= set(minima) and all("direct l2" in minima[name] for name in RESNET20):
        for form, bound in (("l2", 20.0), ("l1", 5.0)):
            ratio = sum(minima[n][f"direct {form}"] for n in RESNET20) / sum(minima[n][form] for n in RESNET20)
            claims.append((f"{form}: times faster than direct, three ResNet-20 maps", ">=", bound, ratio))
    stage1 = found.get("resnet20-1", {})
    for form in ("l2", "l1"):
        lean, wide = (stage1[key].peak_mb if key in stage1 else None for key in (form, f"direct {form}"))
        if lean and wide:
            claims.append((f"{form}: times less memory than direct, ResNet-20 stage 1", ">=", 20.0, wide / lean))
    for form in ("l2", "l1"):
        times = [m[form] / m[f"direct {form}"] for m in minima.values() if f"direct {form}" in m]
        if times:
            claims.append((f"{form}: time of direct, worst map", "<=", 1.1, max(times)))
    narrow = [m["l2"] / m["fast"] for name, m in minima.items() if MAPS[name][1] <= 64]
    if narrow:
        claims.append(
            (f"l2: time of fast ({COLUMNS} columns), worst map of at most 64 channels", "<=", 1.25, max(narrow))
        )
    growth = [minima[b]["l2"] / minima[a]["l2"] for a, b in itertools.pairwise(SIDES) if {a, b} <= set(minima)]
    if growth:
        claims.append(("l2: time per doubling of the side, worst", "<=", 4.5, max(growth)))
    return [
        {"claim": claim, "sense": sense, "bound": bound, "found": value, "met": (value >= bound) == (sense == ">=")}
        for claim, sense, bound, value in claims
    ]


def table(maps: list[dict[str, Any]]) -> Table:
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    result.add_column("map")
    result.add_column("loss")
    for title in ("min ms", "median ms", "× direct\nminima", "× direct\npaired", "peak MB", "direct MB\n/ MB"):
        result.add_column(title, justify="right", no_wrap=True)
    for entry in maps:
        label = f"{entry['map']} {entry['batch']}x{entry['channels']}x{entry['side']}"
        for row in entry["variants"]:
            gain = row.get("speed_up")
            absent = "does not fit" if "left_out" in entry else ""
            result.add_row(
                label,
                row["variant"],
                f"{row['min_ms']:.2f}",
                f"{row['median_ms']:.2f}",
                f"{gain['ratio_of_minima']:.2f}" + (" ~" if gain["noisy"] else "") if gain else absent,
                f"{gain['paired_median']:.2f}" if gain else "",
                "" if row["peak_mb"] is None else f"{row['peak_mb']:.1f}",
                f"{row['memory_ratio']:.1f}" if "memory_ratio" in row else "",
            )
            label = ""
        result.add_section()
    return result


@click.command(help=(__doc__ or "").splitlines()[0])
@json_option
@click.option("--rounds", default=10, show_default=True, type=click.IntRange(1), help="How often all variants run.")
@click.option("--maps", multiple=True, type=click.Choice(list(MAPS)), help="Measure only this map; may be repeated.")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1), help="CPU threads for torch.")
@click.option("--memory/--no-memory", default=True, help="Also take the peak memory, one process per variant.")
def command(json_target: str | None, rounds: int, maps: tuple[str, ...], threads: int, memory: bool) -> None:
    torch.set_num_threads(threads)
    console = Console(stderr=json_target == "-", width=None if sys.stdout.isatty() else 100)
    names = maps or tuple(MAPS)
    found: dict[str, dict[str, Variant]] = {}
    for name in names:
        click.echo(f"{name} ({len(found) + 1} of {len(names)})", err=True)
        found[name] = timed(MAPS[name], rounds)
        for variant in found[name].values() if memory else ():
            variant.peak_mb = apart(MAPS[name], variant.name, threads)
        result = summary(found, threads, complete=len(found) == len(names))
        if json_target != "-":
            emit_json(json_target, result)
    console.print(table(result["maps"]))
    for target in result["targets"]:
        verdict = "met" if target["met"] else "MISSED"
        console.print(
            f"{verdict}: {target['claim']}: {target['found']:.2f} (bound {target['sense']} {target['bound']})"
        )
    if json_target == "-":
        emit_json(json_target, result)


def summary(found: dict[str, dict[str, Variant]], threads: int, complete: bool) -> dict[str, Any]:
    """The JSON of the maps measured so far; complete: whether they are all that was asked for."""
    return {
        "version": VERSION,
        "what": "feature affinity, forward + backward, float32, unrelated maps after a ReLU",
        "complete": complete,
        "command": shlex.join(["python", "-m", "faqd.benchmarks.studies.affinity", *sys.argv[1:]]),
        "environment": environment(),
        "versions": {"faqd": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "threads": threads,
        "columns": COLUMNS,
        "maps": [record(name, measured) for name, measured in found.items()],
        "targets": targets(found),
    }


def main() -> None:
    run(command)


if __name__ == "__main__":
    main()
