"""How much faster the lowered students run on onnxruntime's CPU kernels than the same graphs in FP32.

`python -m faqd.benchmarks.studies.onnxruntime_cpu --json FILE` times, on one thread and in turn in one process: the
unquantized student, what onnxruntime's own `quantize_static` makes of it with three settings, our students at 8/8 and
4/4 bits, and at 8/8 trained for onnxruntime alone, whose codes 0..255 need no limit. A setting whose sums saturate on
the CPU here is fast and wrong; the students are held against the fastest of the others. Weights and images are random:
speed does not depend on them. Where a session comes to lie in memory does change its speed, by one or two per cent for
as long as it lives: every round opens all of them anew.
"""

from __future__ import annotations

import platform
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from faqd import __version__
from faqd.benchmarks.backends.sessions import ClosedLoop
from faqd.benchmarks.measure.environment import environment
from faqd.benchmarks.measure.latency import Length, Submission, Times, in_succession, interleaved, speed_up
from faqd.benchmarks.studies.own_networks_models import MobileNet
from faqd.command import Finite, emit_json, json_option, run
from faqd.cpu import adds_pairs_in_int16, instruction_sets
from faqd.deploy.export.torch_to_onnx import onnx_from_deployed, save
from faqd.deploy.onnx_model.integer_sums import integer_sums
from faqd.deploy.onnx_model.load import load_model
from faqd.deploy.onnx_model.session import OnnxSession, version
from faqd.quantize.calibrate import calibrate
from faqd.quantize.capture.capture import capture
from faqd.quantize.config import QuantConfig
from faqd.quantize.convert import collect_output_scales, convert
from faqd.quantize.outputs import INPUT
from faqd.quantize.prepare import insert_quantizers
from faqd.train.networks.source import NetworkSource

VERSION = 2
SIDES = {"resnet20": 32, "resnet18": 224, "mobilenet": 64}
"""Network -> pixels per side."""
FLOAT = "float"
STATIC: dict[str, dict[str, Any]] = {
    "quantize_static, defaults": {},
    "quantize_static, u8s8": {"activation_type": QuantType.QUInt8, "per_channel": True},
    "quantize_static, u8s8, reduce_range": {
        "activation_type": QuantType.QUInt8,
        "per_channel": True,
        "reduce_range": True,
    },
}
"""Settings of onnxruntime's own quantizer; weights are int8 and ranges those of minimum and maximum in all."""
STUDENTS = {
    "8/8": QuantConfig(8, 8),
    "4/4": QuantConfig(4, 4),
    "8/8 --target onnxruntime": QuantConfig(8, 8, "onnxruntime"),
}
TARGETS = {("resnet20", 1): 2.0, ("resnet20", 32): 2.2, ("resnet18", 1): 3.2, ("resnet18", 32): 3.2}
"""Least speed-up over the unquantized student on a CPU with VNNI, by network and batch size."""
NOT_BEHIND = 0.98
"""A ratio of the rounds' medians from which two networks are called equally fast."""
BATCHES = (1, 32)
CALIBRATION_IMAGES = 16
WARM_UP_MS = 20.0
"""Of every session, in every round."""


def write_variants(name: str, folder: Path) -> dict[str, Path]:
    """The ONNX files of one network: variant -> file."""
    side = SIDES[name]
    torch.manual_seed(0)
    network = MobileNet() if name == "mobilenet" else NetworkSource(3, (side, side), 10, architecture=name).build()
    images = torch.randn(CALIBRATION_IMAGES, 3, side, side)
    _settle_norms(network, images)
    files = {label: folder / f"{label.translate(_FILE_NAME)}.onnx" for label in LABELS}
    for label, bits in STUDENTS.items():
        student = insert_quantizers(capture(network, images[:2]), bits, images[:2])
        student.network.eval()
        calibrate(student, [images], "max")
        scales = collect_output_scales(student, [images])
        save(onnx_from_deployed(convert(student, "onnxruntime", scales), images[:2], {}), files[label])
    save(onnx_from_deployed(convert(student, "float"), images[:2], {}), files[FLOAT])
    quant_pre_process(files[FLOAT], folder / "prepared.onnx")
    for label, setting in STATIC.items():
        quantize_static(folder / "prepared.onnx", files[label], _Images(images), QuantFormat.QDQ, **setting)
    return files


LABELS = (*STUDENTS, FLOAT, *STATIC)
_FILE_NAME = str.maketrans({"/": "-", " ": None, ",": "-"})


class _Images(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: Tensor) -> None:
        self._batches = iter([{INPUT: images.numpy()}])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)


@torch.no_grad()
def _settle_norms(network: torch.nn.Module, images: Tensor) -> None:
    """Running statistics as a trained network has them, so that no layer clips everything."""
    network.train()
    for _ in range(20):
        network(images)
    network.eval()


def saturating(files: dict[str, Path]) -> list[str]:
    """The variants that give other values here than elsewhere: sums that can saturate, on a CPU that saturates."""
    if not adds_pairs_in_int16(instruction_sets()):
        return []
    return [label for label, path in files.items() if any(found.saturates for found in integer_sums(load_model(path)))]


def measure(name: str, batch: int, length: Length, threads: int) -> tuple[dict[str, Times], list[str]]:
    """All variants of one network in turn, opened anew and in another order in each round of `length`; and which of
    them are wrong here."""
    side = SIDES[name]
    images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1)).numpy()
    draw = random.Random(0)
    once = Length(length.duration_s / length.rounds, WARM_UP_MS, 1, rounds=1)
    found: list[dict[str, Times]] = []
    with tempfile.TemporaryDirectory() as folder:
        written = write_variants(name, Path(folder))
        files, wrong = list(written.items()), saturating(written)
        for _ in range(length.rounds):
            draw.shuffle(files)
            submissions: dict[str, Submission] = {}
            for label, path in files:
                session = OnnxSession(path, threads=threads)
                submissions[label] = ClosedLoop(session, {session.inputs[0]: images}, time.perf_counter)
            found.append(interleaved(submissions, once))
    return {label: in_succession([times[label] for times in found]) for label in LABELS}, wrong


def record(name: str, batch: int, times: dict[str, Times], wrong: Sequence[str] = ()) -> dict[str, Any]:
    """wrong: variants that the students are not held against."""
    rows = []
    rivals = [label for label in STATIC if label not in wrong]
    rival = min(rivals, key=lambda label: min(times[label].round_medians_ms))
    for label, found in times.items():
        row: dict[str, Any] = {
            "variant": label,
            "samples": len(found.queries),
            "min_ms": min(found.all_ms),
            "round_medians_ms": found.round_medians_ms,
        }
        if label != FLOAT:
            row["speed_up_over_float"] = speed_up(found, times[FLOAT]).to_json()
        if label in STUDENTS:
            row["speed_up_over_quantize_static"] = speed_up(found, times[rival]).to_json()
        row["right_here"] = label not in wrong
        rows.append(row)
    return {"network": name, "pixels": SIDES[name], "batch": batch, "rival": rival, "variants": rows}


def targets(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the students were to reach, and what was found: medians of the ratios of the rounds."""
    claims = []
    slow = adds_pairs_in_int16(instruction_sets())
    for entry in measured:
        for row in entry["variants"]:
            if row["variant"] not in STUDENTS:
                continue
            who = f"{entry['network']} {row['variant']}, batch {entry['batch']}"
            bound = None if slow else TARGETS.get((entry["network"], entry["batch"]))
            wanted = [] if bound is None else [(f"{who}: times the unquantized student", bound, "speed_up_over_float")]
            wanted.append((f"{who}: times {entry['rival']}", NOT_BEHIND, "speed_up_over_quantize_static"))
            for claim, least, key in wanted:
                found = row[key]["paired_median"]
                claims.append({"claim": claim, "bound": least, "found": found, "met": found >= least})
    return claims


def table(measured: list[dict[str, Any]]) -> Table:
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title in ("network", "batch", "variant", "min ms", "× float", "× quantize_static"):
        result.add_column(title, justify="left" if title in ("network", "variant") else "right")
    for entry in measured:
        for row in entry["variants"]:
            ratios = (row.get(f"speed_up_over_{other}") for other in (FLOAT, STATIC))
            cells = (f"{r['paired_median']:.2f}" + (" ~" if r["noisy"] else "") if r else "" for r in ratios)
            variant = row["variant"] + ("" if row["right_here"] else " (saturates here)")
            result.add_row(entry["network"], str(entry["batch"]), variant, f"{row['min_ms']:.3f}", *cells)
    return result


@click.command(help=(__doc__ or "").splitlines()[0])
@json_option
@click.option(
    "--network", "names", multiple=True, type=click.Choice(list(SIDES)), help="Only this one; may be repeated."
)
@click.option("--duration", default=5.0, show_default=True, type=Finite(0.0), help="Seconds for each variant.")
@click.option("--rounds", default=20, show_default=True, type=click.IntRange(1), help="How often all variants run.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="CPU threads of one query.")
def command(json_target: str | None, names: tuple[str, ...], duration: float, rounds: int, threads: int) -> None:
    console = Console(stderr=json_target == "-", width=None if sys.stdout.isatty() else 120)
    measured = []
    for name in names or tuple(SIDES):
        for batch in BATCHES:
            times, wrong = measure(name, batch, Length(duration_s=duration, rounds=rounds), threads)
            measured.append(record(name, batch, times, wrong))
    console.print(table(measured))
    claims = targets(measured)
    for claim in claims:
        met = "reached" if claim["met"] else "MISSED"
        console.print(f"{claim['claim']}: {claim['found']:.2f} (at least {claim['bound']:g}): {met}")
    result = {
        "version": VERSION,
        "what": "onnxruntime on the CPU: lowered students against the same unquantized, random weights",
        "command": shlex.join(["python", "-m", "faqd.benchmarks.studies.onnxruntime_cpu", *sys.argv[1:]]),
        "environment": environment(),
        "versions": {
            "faqd": __version__,
            "onnxruntime": version,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "threads": threads,
        "networks": measured,
        "targets": claims,
    }
    emit_json(json_target, result)


def main() -> None:
    run(command)


if __name__ == "__main__":
    main()
