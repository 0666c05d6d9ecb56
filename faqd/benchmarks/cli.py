"""faqd-bench: what a bundle is worth on this machine, as a table, as JSON and as one HTML page."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from faqd.benchmarks.options import bench_flags
from faqd.bundle import Bundle, load_bundle
from faqd.command import SETTINGS, Command, emit_json, run, version_option
from faqd.data_flags import absolute_source
from faqd.errors import UserError
from faqd.extras import install
from faqd.files import write_json, written_beside
from faqd.given import arguments_given, refuse_all_but, refuse_idle

if TYPE_CHECKING:
    from rich.console import Console

    from faqd.benchmarks.measure.networks import Backend, EvaluationData
    from faqd.benchmarks.measure.switches import Asked, Options
    from faqd.benchmarks.record.gates import Gates
    from faqd.benchmarks.report.pictures import Picture

STUDENT_ENGINE = "student.tensorrt.engine"
_TIMING = (
    *("--warm-up", "--duration", "--iterations", "--avg-runs", "--percentile", "--rounds", "--sweep", "--sustained"),
    *("--energy-duration", "--power-rail", "--dump-profile", "--export-times", "--export-profile"),
)
"""What has nothing to do without timed queries."""
_GATES = ("min_accuracy_ratio", "min_agreement", "max_p99_ms", "max_energy_mj")
_GATE_OPTIONS = [f"--{name.replace('_', '-')}" for name in _GATES]


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, type=click.Path(path_type=Path))
@bench_flags
@version_option
def bench_command(
    bundles: Sequence[Path], stored: Path | None, compare: tuple[Path, Path] | None, **options: Any
) -> None:
    """Measure what each BUNDLE is worth on this machine: accuracy, agreement with the teacher, size, latency, energy.

    Several bundles are compared in one run if they were exported from the same data and teacher. With --from or
    --compare nothing is measured: earlier records are read.
    """
    from faqd.benchmarks.record.gates import Gates
    from faqd.benchmarks.report.terminal import console_for

    ways = {"BUNDLE": bool(bundles), "--from": stored is not None, "--compare": compare is not None}
    given = [name for name, there in ways.items() if there]
    if len(given) != 1:
        raise UserError(f"give one of {', '.join(ways)}; found {' and '.join(given) or 'none'}.")
    if stored is not None:
        refuse_all_but(["--from", "--json", "--report", "--pictures", *_GATE_OPTIONS], "--from measures nothing")
    if compare is not None:
        refuse_all_but(["--compare", "--json"], "--compare measures nothing, and judges by no gate")
    console = console_for(sys.stderr if options["json_target"] == "-" else sys.stdout)
    gates = Gates(**{name: options.pop(name) for name in _GATES})
    if compare is not None:
        _compare(*compare, console, options["json_target"])
    elif stored is not None:
        _judge_stored(stored, gates, console, options)
    else:
        _measure(bundles, gates, console, options)


def _measure(bundles: Sequence[Path], gates: Gates, console: Console, options: dict[str, Any]) -> None:
    from faqd.benchmarks.bench import bench
    from faqd.benchmarks.measure.switches import Asked
    from faqd.benchmarks.measure.user_metric import load_metric
    from faqd.benchmarks.report.trtexec_json import times_json

    if options["skip_latency"]:
        refuse_idle(_TIMING, "--skip-latency times nothing")
    if not options["energy_duration"]:
        refuse_idle(["--power-rail"], "--energy-duration 0 measures no energy")
    if not options["metric"]:
        refuse_idle(["--bootstrap"], "it resamples images for --metric, which is not given")
    if not options["eval_data"]:
        refuse_idle(["--labels"], "the images of a bundle have their labels with them (--eval-data names others)")
    pictures = _pictures(options)
    metric = load_metric(options["metric"]) if options["metric"] else None
    loaded = [load_bundle(folder) for folder in bundles]
    asked = Asked(*(options.pop(field.name) for field in fields(Asked)))
    chosen = _backend(loaded, asked, options)
    console.print(f"Running on {chosen.name}: {chosen.facts['why']}.", style="dim", markup=False)

    def say(line: str) -> None:
        console.print(f"... {line}", style="dim", markup=False)

    done = bench(
        loaded,
        chosen,
        _options(options, gates),
        metric=metric,
        data=_own_images(loaded[0], options, say),
        command=["faqd-bench", *arguments_given()],
        progress=say,
    )
    if options["export_times"] and done.times is not None:
        write_json(options["export_times"], times_json(done.times))
    if options["export_profile"] and done.profile is not None:
        write_json(options["export_profile"], done.profile)
    _show(done.result, console, options, pictures)


def _own_images(bundle: Bundle, options: dict[str, Any], say: Callable[[str], None]) -> EvaluationData | None:
    """What --eval-data names. It takes libraries that a board has not."""
    source = absolute_source(options["eval_data"])
    if source is None:
        return None
    from faqd.benchmarks.measure.eval_data import evaluation_data

    return evaluation_data(bundle, source, options["labels"], options["threads"], say)


def _judge_stored(path: Path, gates: Gates, console: Console, options: dict[str, Any]) -> None:
    from faqd.benchmarks.record.gates import judged
    from faqd.benchmarks.record.read import read_record

    pictures = _pictures(options)
    record = read_record(path)
    record["gates"] = judged(record, gates)
    _show(record, console, options, pictures)


def _pictures(options: dict[str, Any]) -> list[Picture]:
    """Those of --pictures, read before anything is measured."""
    if options["report"] is None:
        refuse_idle(["--pictures"], "they are shown in the page of --report")
    if options["pictures"] is None:
        return []
    from faqd.benchmarks.report.pictures import pictures_in

    return pictures_in(options["pictures"])


def _show(record: dict[str, Any], console: Console, options: dict[str, Any], pictures: list[Picture]) -> None:
    from faqd.benchmarks.record.gates import check
    from faqd.benchmarks.report.html import page_from_result
    from faqd.benchmarks.report.terminal import print_result

    print_result(record, console)
    emit_json(options["json_target"], record)
    report = options["report"]
    if report is not None:
        with written_beside(report) as temporary:
            temporary.write_text(page_from_result(record, pictures), encoding="utf-8")
        console.print(f"report: {report}", markup=False)
    check(record["gates"])


def _compare(a: Path, b: Path, console: Console, json_target: str | None) -> None:
    from faqd.benchmarks.record.compare import compare, worse
    from faqd.benchmarks.record.read import read_record
    from faqd.benchmarks.report.terminal import print_comparison

    found = compare(read_record(a), read_record(b))
    print_comparison(found, console)
    emit_json(json_target, found)
    if sentences := worse(found):
        raise UserError(" ".join(sentences), exit_code=1)


def _options(options: dict[str, Any], gates: Gates) -> Options:
    from faqd.benchmarks.measure.latency import Length
    from faqd.benchmarks.measure.switches import Options

    return Options(
        batch=options["batch"],
        length=Length(options["duration"], options["warm_up"], options["iterations"], options["rounds"]),
        percentiles=tuple(sorted({*options["percentile"], 99.0})),
        average_runs=options["avg_runs"],
        skip_latency=options["skip_latency"],
        sweep=options["sweep"],
        profile=options["dump_profile"] or options["export_profile"] is not None,
        sustained_minutes=options["sustained"],
        energy_duration_s=options["energy_duration"],
        power_rail=options["power_rail"],
        bootstrap=options["bootstrap"],
        gates=gates,
    )


def _backend(bundles: Sequence[Bundle], asked: Asked, options: dict[str, Any]) -> Backend:
    from faqd.deploy.cuda.cuda import device_or_none

    choice, cuda = options["backend"], options["cuda"]
    without = [str(bundle.folder) for bundle in bundles if not (bundle.folder / STUDENT_ENGINE).is_file()]
    device, reason = (None, "") if choice == "onnxruntime" else device_or_none(cuda)
    if choice == "engine" and device is None:
        raise UserError(f"--backend engine: {reason}")
    if device is not None and (choice == "engine" or not without):
        from faqd.benchmarks.backends.engines import EngineBackend

        refuse_idle(["--threads"], "engines compute on the GPU (--backend onnxruntime measures the CPU)")
        why = "asked for" if choice == "engine" else "a GPU and engines are here"
        return EngineBackend(device, why, asked.on_a_gpu(), cuda=cuda, trust=options["trust"])
    asked.refuse_without_gpu()
    if choice == "onnxruntime":
        refuse_idle(["--cuda", "--trust"], "--backend onnxruntime loads no engine")
    if choice == "onnxruntime":
        why = "asked for"
    elif device is not None:
        why = f"{without[0]} has no {STUDENT_ENGINE}; `faqd-deploy build-engine {without[0]}` makes it"
    else:
        why = "no GPU that can be used from here"
    try:
        from faqd.benchmarks.backends.sessions import OnnxruntimeBackend
    except ModuleNotFoundError as error:
        if choice == "onnxruntime" or error.name not in ("onnx", "onnxruntime"):
            raise
        # On a board the CPU is not what was meant: what keeps the engines from running is what must be said.
        raise UserError(
            f"{why}{f' ({reason})' if reason else ''}. To measure on the CPU instead: {install('onnx')}."
        ) from None
    return OnnxruntimeBackend(options["threads"], why)


def main() -> None:
    run(bench_command)
