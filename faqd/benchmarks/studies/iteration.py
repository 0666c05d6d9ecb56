"""What one distillation iteration costs beside the straightforward one: the same losses, timed in the same rounds.

`python -m faqd.benchmarks.studies.iteration --json FILE` first checks in float64 that both compute the same losses
and gradients, then goes round all variants (each one iteration, then all again) in one process. L2 is compared with
L2 and L1 with L1; the teacher of the straightforward iteration is always FP32.
"""

from __future__ import annotations

import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from faqd import __version__
from faqd.benchmarks.measure.environment import environment
from faqd.benchmarks.studies.iteration_baseline import Mark
from faqd.benchmarks.studies.iteration_pair import BITS, PIXELS, Pair, pair_of
from faqd.benchmarks.studies.speed_up import speed_up
from faqd.command import emit_json, json_option, run
from faqd.errors import UserError
from faqd.train.networks.zoo import check_architecture
from faqd.train.recipes import TeacherDtype

VERSION = 1
SAME = 1e-4
"""Largest relative difference of losses and gradients, in float64, for both to count as the same computation.

It is 1e-14, but for L1 on sparse maps: |D| has no slope at 0, and rounding gives some zeros of D a sign.
"""
CHECKED_IMAGES = 4
LABELS: dict[TeacherDtype, str] = {"fp32": "FP32", "bf16": "bf16"}
TARGETS = {"l2": 4.0, "l1": 2.5}
"""How many times faster with an FP32 teacher on two CPU threads, ResNet-110 to ResNet-20 at batch 100."""
USUAL = ("resnet110", "resnet20", 100)


@dataclass
class Variant:
    """One way to do an iteration, and what it took: seconds per round, seconds per part of separate rounds."""

    name: str
    against: str | None
    step: Callable[[Mark], object]
    seconds: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)


def difference(pair: Pair) -> dict[str, float]:
    """Relative differences of losses and gradients after one iteration each, from the same weights and images."""
    ours, plain = pair.ours["fp32"](lambda part: None), pair.straightforward(lambda part: None)
    wanted = torch.stack([plain.last[name] for name in ours.sums])
    found = torch.stack([value.to(wanted) for value in ours.sums.values()])
    decayed = {id(parameter) for parameter in ours.job.decayed}
    result = {"losses": _relative(found, wanted)}
    for name, chosen in (("weight gradients", True), ("other gradients", False)):
        both = [
            (a.grad, b.grad)
            for a, b in zip(ours.job.network.parameters(), plain.parameters, strict=True)
            if (id(a) in decayed) == chosen
        ]
        result[name] = _relative(
            *(torch.cat([g.flatten() for g in side if g is not None]) for side in zip(*both, strict=True))
        )
    return result


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def checked(form: str, teacher: str, student: str, device: torch.device, folder: Path) -> dict[str, float]:
    """The differences in float64; UserError where both do not compute the same."""
    found = difference(pair_of(form, teacher, student, CHECKED_IMAGES, device, folder, torch.float64))
    if max(found.values()) > SAME:
        raise UserError(f"{form}: the two iterations differ, {found}: their times cannot be compared.", exit_code=1)
    return found


def measure(
    forms: Sequence[str], teacher: str, student: str, batch_size: int, rounds: int, device: torch.device
) -> dict[str, Any]:
    """Check and time every variant with the affinities `forms`: the record of `python -m`, all but its command."""
    variants: list[Variant] = []
    same = {}
    with tempfile.TemporaryDirectory() as folder:
        for form in forms:
            same[form] = checked(form, teacher, student, device, Path(folder))
            pair = pair_of(form, teacher, student, batch_size, device, Path(folder), torch.float32)
            baseline = f"{form}, straightforward"
            variants.append(Variant(baseline, None, pair.straightforward))
            variants += [Variant(f"{form}, {LABELS[kind]} teacher", baseline, step) for kind, step in pair.ours.items()]
        timed(variants, rounds, device)
    return {
        "version": VERSION,
        "what": f"one distillation iteration, {teacher} to {student}, {BITS}W{BITS}A, batch {batch_size}, "
        f"{PIXELS}-pixel images, random weights",
        "environment": environment(),
        "versions": {"faqd": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "relative_difference_in_float64": same,
        "variants": record(variants),
    }


def timed(variants: Sequence[Variant], rounds: int, device: torch.device) -> None:
    """Go round the variants `rounds` times after a warm-up, then once more in parts."""
    for number in range(rounds + 1):
        for variant in variants:
            start = _now(device)
            variant.step(lambda part: None)
            if number:
                variant.seconds.append(_now(device) - start)
    for variant in variants:
        last = _now(device)

        def mark(part: str, variant: Variant = variant) -> None:
            nonlocal last
            now = _now(device)
            variant.parts[part] = variant.parts.get(part, 0.0) + now - last
            last = now

        variant.step(mark)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def record(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """One entry per variant: milliseconds, share per part, and how often faster than the straightforward one."""
    by_name = {variant.name: variant for variant in variants}
    rows = []
    for variant in variants:
        whole = sum(variant.parts.values())
        row: dict[str, Any] = {
            "variant": variant.name,
            "min_ms": min(variant.seconds) * 1e3,
            "median_ms": statistics.median(variant.seconds) * 1e3,
            "rounds": len(variant.seconds),
            "share": {part: value / whole for part, value in variant.parts.items()},
        }
        if variant.against is not None:
            row["against"] = variant.against
            row["speed_up"] = speed_up(variant.seconds, by_name[variant.against].seconds)
        rows.append(row)
    return rows


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = {row["variant"]: row["speed_up"]["ratio_of_minima"] for row in rows if "speed_up" in row}
    claims = []
    for form, bound in TARGETS.items():
        if f"{form}, FP32 teacher" in found:
            fp32, bf16 = found[f"{form}, FP32 teacher"], found[f"{form}, bf16 teacher"]
            claims.append((f"{form}: times faster, FP32 teacher", bound, fp32))
            claims.append((f"{form}: times faster, bf16 teacher, more than FP32", fp32, bf16))
    return [{"claim": claim, "bound": bound, "found": value, "met": value >= bound} for claim, bound, value in claims]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    result.add_column("iteration")
    parts = list(rows[0]["share"])
    for title in ("min ms", "median ms", "×\nminima", "×\npaired", *(f"%\n{part}" for part in parts)):
        result.add_column(title, justify="right")
    for row in rows:
        gain = row.get("speed_up")
        result.add_row(
            row["variant"],
            f"{row['min_ms']:.0f}",
            f"{row['median_ms']:.0f}",
            f"{gain['ratio_of_minima']:.2f}" + (" ~" if gain["noisy"] else "") if gain else "",
            f"{gain['paired_median']:.2f}" if gain else "",
            *(f"{100 * row['share'][part]:.1f}" for part in parts),
        )
    return result


@click.command(help=(__doc__ or "").splitlines()[0])
@json_option
@click.option("--rounds", default=8, show_default=True, type=click.IntRange(1), help="How often all variants run.")
@click.option(
    "--loss", "forms", multiple=True, type=click.Choice(["l2", "l1"]), help="Only this affinity; may be repeated."
)
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1), help="CPU threads for torch.")
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]), help="Iterate here.")
@click.option("--teacher", default=USUAL[0], show_default=True, help="The teacher, a network of the zoo.")
@click.option("--student", default=USUAL[1], show_default=True, help="The student, a network of the zoo.")
@click.option("--batch-size", default=USUAL[2], show_default=True, type=click.IntRange(2), help="Images per iteration.")
def command(
    json_target: str | None,
    rounds: int,
    forms: tuple[str, ...],
    threads: int,
    device: str,
    teacher: str,
    student: str,
    batch_size: int,
) -> None:
    for name in (teacher, student):
        check_architecture(name)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU here; use --device cpu.")
    torch.set_num_threads(threads)
    console = Console(stderr=json_target == "-", width=None if sys.stdout.isatty() else 140)
    words = shlex.join(["python", "-m", "faqd.benchmarks.studies.iteration", *sys.argv[1:]])
    measured = measure(forms or tuple(TARGETS), teacher, student, batch_size, rounds, torch.device(device))
    usual = (teacher, student, batch_size) == USUAL and threads == 2 and device == "cpu"
    result = {"command": words, **measured, "targets": targets(measured["variants"]) if usual else []}
    console.print(table(result["variants"]))
    for target in result["targets"]:
        verdict = "met" if target["met"] else "MISSED"
        console.print(f"{verdict}: {target['claim']}: {target['found']:.2f} (bound >= {target['bound']:.2f})")
    emit_json(json_target, result)


def main() -> None:
    run(command)


if __name__ == "__main__":
    main()
