"""faqd-bench: what a bundle is worth on this machine, as a table, as JSON and as one HTML page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from faqd.bundle import Bundle, load_bundle
from faqd.command import SETTINGS, emit_json, json_option, run, version_option
from faqd.errors import UserError
from faqd.files import written_beside

if TYPE_CHECKING:
    from faqd.benchmarks.bench import Backend

STUDENT_ENGINE = "student.tensorrt.engine"


class BatchSizes(click.ParamType):  # type: ignore[type-arg,unused-ignore] # Generic from click 8.4 on.
    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is no list of batch sizes such as 1,32.", param, ctx)
        return tuple(dict.fromkeys(int(part) for part in parts))


@click.command(context_settings=SETTINGS)
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--batch",
    type=BatchSizes(),
    default="1,32",
    show_default=True,
    help="Batch sizes to time; tables and charts show the first.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Threads of one query on the CPU.",
)
@click.option(
    "--duration",
    type=click.FloatRange(0, min_open=True),
    default=3.0,
    show_default=True,
    help="Seconds of timed queries per network and batch size.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Rounds in which all networks take turns; speed-ups are compared round by round.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "onnxruntime", "engine"]),
    default="auto",
    show_default=True,
    help="What runs the networks: auto takes the engines where there are a GPU and engines.",
)
@click.option("--skip-latency", is_flag=True, help="Measure accuracy and sizes alone.")
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="Write one HTML page to FILE.")
@click.option(
    "--min-accuracy-ratio",
    type=click.FloatRange(0, 2),
    help="End with exit code 1 if a student's accuracy is below this share of the teacher's, such as 0.99.",
)
@click.option(
    "--min-agreement",
    type=click.FloatRange(0, 1),
    help="End with exit code 1 if a student agrees with the teacher on a smaller share of the images.",
)
@json_option
@version_option
def bench_command(
    bundles: Sequence[Path],
    threads: int,
    backend: str,
    duration: float,
    report: Path | None,
    json_target: str | None,
    **options: Any,
) -> None:
    """Measure what each BUNDLE is worth on this machine: accuracy, agreement with the teacher, size, latency.

    Several bundles are compared in one run if they were exported from the same data and teacher.
    """
    from faqd.benchmarks.bench import Options, bench, failed_gates
    from faqd.benchmarks.report import page_from_result
    from faqd.benchmarks.table import console_for, print_result

    loaded = [load_bundle(folder) for folder in bundles]
    console = console_for(sys.stderr if json_target == "-" else sys.stdout)
    chosen = _backend(backend, loaded, threads)
    console.print(f"Running on {chosen.name}: {chosen.facts['why']}.", style="dim", markup=False)
    result = bench(
        loaded,
        chosen,
        Options(duration_s=duration, **options),
        command=["faqd-bench", *sys.argv[1:]],
        progress=lambda line: console.print(f"... {line}", style="dim", markup=False),
    )
    print_result(result, console)
    emit_json(json_target, result)
    if report is not None:
        with written_beside(report) as temporary:
            temporary.write_text(page_from_result(result), encoding="utf-8")
        console.print(f"report: {report}", markup=False)
    if failures := failed_gates(result):
        raise UserError(" ".join(failures), exit_code=1)


def _backend(choice: str, bundles: Sequence[Bundle], threads: int) -> Backend:
    from faqd.deploy.cuda import device_or_none

    without = [str(bundle.folder) for bundle in bundles if not (bundle.folder / STUDENT_ENGINE).is_file()]
    device, reason = (None, "") if choice == "onnxruntime" else device_or_none()
    if choice == "engine" and device is None:
        raise UserError(f"--backend engine: {reason}")
    if device is not None and (choice == "engine" or not without):
        from faqd.benchmarks.engines import EngineBackend

        return EngineBackend(device.name, "asked for" if choice == "engine" else "a GPU and engines are here")
    from faqd.benchmarks.sessions import OnnxruntimeBackend

    if choice == "onnxruntime":
        why = "asked for"
    elif device is not None:
        why = f"{without[0]} has no {STUDENT_ENGINE}; `faqd-deploy build-engine {without[0]}` makes it"
    else:
        why = "no GPU that can be used from here"
    return OnnxruntimeBackend(threads, why)


def main() -> None:
    run(bench_command)
