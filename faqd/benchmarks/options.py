"""The options of faqd-bench: their names, units and defaults, as trtexec has them where it has them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from faqd.benchmarks.measure.paired_metric import LEAST_RESAMPLES
from faqd.command import Finite, flags, json_option, section, writable
from faqd.errors import UserError


class Numbers(click.ParamType):  # type: ignore[type-arg,unused-ignore] # Generic from click 8.4 on.
    """Several numbers with commas between them, each once."""

    def __init__(self, name: str, example: str, number: Callable[[str], float], good: Callable[[float], bool]) -> None:
        self.name, self._example, self._number, self._good = name, example, number, good

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = [self._number(part.strip()) for part in str(value).split(",")]
        except ValueError:
            numbers = []
        if not numbers or not all(map(self._good, numbers)):
            self.fail(f"{value!r} is no list of {self.name} such as {self._example}.", param, ctx)
        return tuple(dict.fromkeys(numbers))


def _plain_int(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


_ABOVE_ZERO = Finite(0, min_open=True)
_FROM_ZERO = Finite(0)
_FILE = click.Path(path_type=Path, dir_okay=False)
_TO_WRITE: dict[str, Any] = {"type": _FILE, "callback": writable}


def _no_more_than_cores(context: click.Context, option: click.Parameter, threads: int) -> int:
    """More threads than cores wait for each other, and what is measured is that."""
    cores = len(os.sched_getaffinity(0))
    if threads > cores:
        raise UserError(f"--threads {threads}: this process may use {cores} core(s) of the machine; give at most that.")
    return threads


bench_flags = flags(
    section(
        "Networks",
        click.option(
            "--batch",
            type=Numbers("batch sizes", "1,32", _plain_int, lambda size: size > 0),
            default="1,32",
            help="Batch sizes to time; tables, charts, energy and gates speak of the first.",
        ),
        click.option(
            "--threads",
            type=click.IntRange(1),
            default=1,
            callback=_no_more_than_cores,
            help="Threads of one query on the CPU.",
        ),
        click.option(
            "--backend",
            type=click.Choice(["auto", "onnxruntime", "engine"]),
            default="auto",
            help="What runs the networks: auto takes the engines where there are a GPU and engines.",
        ),
        click.option(
            "--cuda",
            type=click.Choice(["auto", "cuda-bindings", "pycuda"]),
            default="auto",
            help="The CUDA binding to use for engines; only cuda-bindings has CUDA graphs.",
        ),
        click.option("--trust", is_flag=True, help="Load engines that do not match their record, or have none."),
        click.option(
            "--metric", metavar="FILE.py:fn|module:fn", help="Judge outputs by fn(outputs, eval) -> dict of numbers."
        ),
        click.option(
            "--bootstrap",
            type=click.IntRange(LEAST_RESAMPLES),
            metavar="N",
            help="Beside each number of --metric the 95 % interval of its difference to the teacher's, by a paired "
            "bootstrap: the function is called N times more for each network, on images drawn with repeats.",
        ),
    ),
    section(
        "Data",
        click.option(
            "--eval-data",
            metavar="SOURCE",
            show_default="the bundle's eval.npz",
            help="Judge on folder:PATH or another source of --data, none of whose images was learned from; takes the "
            "images and onnx extras.",
        ),
        click.option("--labels", is_flag=True, help="Take the subfolder names of that folder for classes."),
    ),
    section(
        "Timing",
        click.option("--warm-up", type=_FROM_ZERO, default=200.0, help="Milliseconds before timing starts."),
        click.option(
            "--duration",
            type=_ABOVE_ZERO,
            default=3.0,
            help="Seconds of timed queries per network and batch size.",
        ),
        click.option(
            "--iterations",
            type=click.IntRange(1),
            default=10,
            help="Time at least so many queries, however long they take.",
        ),
        click.option(
            "--avg-runs",
            type=click.IntRange(1),
            default=10,
            help="Average so many queries in turn; the least and the largest average are recorded.",
        ),
        click.option(
            "--percentile",
            type=Numbers("percentiles", "90,95,99", float, lambda p: 0 < p < 100),
            default="90,95,99",
            help="Report these percentiles where the queries are enough to carry them; 99 is always among them.",
        ),
        click.option(
            "--rounds",
            type=click.IntRange(1),
            default=10,
            help="Rounds in which all networks take turns; speed-ups are compared round by round.",
        ),
        click.option("--skip-latency", is_flag=True, help="Measure accuracy and sizes alone."),
        click.option("--sweep", is_flag=True, help="Double the batch until throughput no longer grows."),
        click.option(
            "--sustained",
            type=_FROM_ZERO,
            default=0.0,
            metavar="MINUTES",
            help="Keep the first student under load for MINUTES, with clocks, temperature and power mode over time.",
        ),
    ),
    section(
        "Submission to a GPU",
        click.option(
            "--preset",
            type=click.Choice(["trtexec10", "trtexec11"]),
            show_default="trtexec11",
            help="Submit to a GPU as that trtexec does: 10 has no CUDA graph, sleeps while it waits and copies in and "
            "out; 11 is the opposite in all three. Never compare across the two.",
        ),
        click.option(
            "--use-cuda-graph/--no-cuda-graph",
            "cuda_graph",
            default=None,
            show_default="the preset's",
            help="Launch as one CUDA graph, or not.",
        ),
        click.option(
            "--use-spin-wait/--no-spin-wait",
            "spin_wait",
            default=None,
            show_default="the preset's",
            help="Wait actively, or sleep.",
        ),
        click.option(
            "--include-data-transfers/--no-data-transfers",
            "transfers",
            default=None,
            show_default="the preset's",
            help="Copy in and out with every query, or not.",
        ),
        click.option(
            "--zero-copy",
            is_flag=True,
            help="Let the kernels work on the host's memory instead of copying, on a GPU that shares it (Jetson).",
        ),
        click.option(
            "--inf-streams",
            type=click.IntRange(1, 64),
            show_default="1",
            help="Compute so many queries side by side where they are submitted ahead: more throughput, and latencies "
            "that mean little. The closed loop stays with one.",
        ),
    ),
    section(
        "Energy",
        click.option(
            "--energy-duration",
            type=_FROM_ZERO,
            default=5.0,
            help="Seconds of load per network for its energy, where something measures power; 0 leaves it out.",
        ),
        click.option(
            "--power-rail",
            metavar="NAME",
            show_default="the module's",
            help="Take this rail of a Jetson instead of the module's.",
        ),
    ),
    section(
        "Gates",
        click.option(
            "--min-accuracy-ratio",
            type=Finite(0, 2),
            help="End with exit code 1 if a student's accuracy is below this share of the teacher's, such as 0.99.",
        ),
        click.option(
            "--min-agreement",
            type=Finite(0, 1),
            help="End with exit code 1 if the top-1 agreement with the teacher is below this share of the images.",
        ),
        click.option("--max-p99-ms", type=_ABOVE_ZERO, help="End with exit code 1 if a student's p99 is above this."),
        click.option(
            "--max-energy-mj",
            type=_ABOVE_ZERO,
            help="End with exit code 1 if a student takes more millijoules above idle per image.",
        ),
    ),
    section(
        "Stored records",
        click.option(
            "--from",
            "stored",
            type=_FILE,
            help="Measure nothing: print, report and judge the record in FILE, which --json wrote.",
        ),
        click.option(
            "--compare",
            nargs=2,
            type=_FILE,
            metavar="A B",
            help="Measure nothing: print what changed beyond noise from record A to B; exit code 1 if something "
            "got worse.",
        ),
    ),
    section(
        "Output",
        click.option("--report", **_TO_WRITE, help="Write one HTML page to FILE."),
        click.option(
            "--pictures",
            type=click.Path(path_type=Path),
            metavar="FOLDER",
            help="Show the PNG and JPEG files of FOLDER in that page, such as boxes of float beside INT8.",
        ),
        json_option,
        click.option("--dump-profile", is_flag=True, help="Measure the time of each layer, in a run of its own."),
        click.option(
            "--export-profile", **_TO_WRITE, help="Write it for the first student to FILE, in trtexec's JSON form."
        ),
        click.option(
            "--export-times",
            **_TO_WRITE,
            help="Write every query of the first student at the first batch size to FILE, in trtexec's JSON form.",
        ),
    ),
)
