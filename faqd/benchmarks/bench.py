"""One bench run: bundles in, one record out. Table, JSON and report all show this record and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from faqd import __version__
from faqd.benchmarks.measure import energy
from faqd.benchmarks.measure.clocks import Clocks
from faqd.benchmarks.measure.environment import environment
from faqd.benchmarks.measure.latency import (
    CLOSED_LOOP,
    ONE_AHEAD,
    Clock,
    Times,
)
from faqd.benchmarks.measure.networks import (
    Backend,
    EvaluationData,
    bundle_record,
    check_comparable,
    entries,
    stored_data,
)
from faqd.benchmarks.measure.steps import (
    Bench,
    measure_accuracy,
    measure_energy,
    measure_latency,
    measure_profile,
    measure_sustained,
    measure_sweep,
    open_networks,
)
from faqd.benchmarks.measure.switches import Options
from faqd.benchmarks.measure.user_metric import Metric, images_judged
from faqd.benchmarks.record.gates import judged
from faqd.benchmarks.record.read import FORMAT, VERSION
from faqd.benchmarks.report.notes import remarks
from faqd.bundle import Bundle, Evaluation, without_fp16_teacher
from faqd.errors import UserError
from faqd.fidelity import classification_output


@dataclass
class Run:
    """result: the record. times: every query of the first student at the first batch size, as trtexec submits."""

    result: dict[str, Any]
    times: Times | None = None
    profile: list[dict[str, Any]] | None = None


def bench(
    bundles: Sequence[Bundle],
    backend: Backend,
    options: Options,
    *,
    metric: Metric | None = None,
    data: EvaluationData | None = None,
    command: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
    clock: Clock = time.perf_counter,
) -> Run:
    """Measure every student, the same unquantized and the one teacher; the record says what was found.

    data: what to judge on, by default the images that the bundles hold.

    UserError where the bundles are not comparable or a gate asks for what they cannot tell.
    """
    check_comparable(bundles, own_images=data is not None)
    judged_on = data or stored_data(bundles[0])
    evaluation = judged_on.evaluation
    meter, no_meter = _meter(backend, options)
    _check_gates(evaluation, options, no_meter)
    run = Bench(bundles, backend, options, evaluation, entries(bundles, backend.files), progress, clock)
    if backend.gpu and run.teacher == "teacher":
        run.notes.append(without_fp16_teacher(bundles[0]))
    clocks = Clocks(backend.gpu)
    times, profile, read = _measured(run, metric, meter, clocks)
    result = {
        "format": FORMAT,
        "version": VERSION,
        "faqd": __version__,
        "command": list(command),
        "switches": _switches(options, backend, metric),
        "backend": {"name": backend.name, **backend.facts},
        "environment": environment(),
        "clocks": {**clocks.to_json(), **read},
        "evaluation": {
            "source": judged_on.source,
            "images": len(evaluation.images),
            "labels": evaluation.labels is not None,
            "classification": classification_output(evaluation.teacher) is not None,
            "sha256": judged_on.sha256,
        },
        "metric": metric.to_json(images_judged(evaluation)) if metric else None,
        "energy": energy.meter_json(meter) if meter else energy.not_measured(no_meter),
        "bundles": [bundle_record(bundle, backend.files) for bundle in bundles],
        "networks": run.networks,
        "gates": [],
        "notes": run.notes,
    }
    result["gates"] = judged(result, options.gates)
    result["notes"] = [*run.notes, *remarks(result)]
    return Run(result, times, profile)


def _measured(
    run: Bench, metric: Metric | None, meter: energy.Meter | None, clocks: Clocks
) -> tuple[Times | None, list[dict[str, Any]] | None, dict[str, Any]]:
    """All steps that are asked for. Returns what `Run` has besides the record, and how fast the clocks ran."""
    options = run.options
    times = profile = None
    with ExitStack() as stack:
        open_networks(run, stack)
        measure_accuracy(run, metric)
        before = clocks.read()
        if not options.skip_latency:
            times = measure_latency(run)
        after = clocks.read()
        if not options.skip_latency:
            if options.sweep:
                measure_sweep(run)
            if meter is not None:
                measure_energy(run, meter)
            if options.profile:
                profile = measure_profile(run)
            if options.sustained_minutes:
                measure_sustained(run, clocks)
    return times, profile, {"before_latency": before, "after_latency": after}


def _switches(options: Options, backend: Backend, metric: Metric | None) -> dict[str, Any]:
    record = asdict(options)
    return {
        "backend": backend.name,
        **backend.switches,
        "submissions": [] if options.skip_latency else [CLOSED_LOOP, *([ONE_AHEAD] if backend.gpu else [])],
        **record.pop("length"),
        **record.pop("gates"),
        **record,
        "batch": list(options.batch),
        "percentiles": list(options.percentiles),
        "metric": metric.spec if metric else None,
    }


def _meter(backend: Backend, options: Options) -> tuple[energy.Meter | None, str]:
    if options.skip_latency:
        return None, "--skip-latency leaves it out"
    if not options.energy_duration_s:
        return None, "--energy-duration 0 leaves it out"
    return energy.find_meter(backend.gpu, options.power_rail)


def _check_gates(data: Evaluation, options: Options, no_meter: str) -> None:
    """Before anything is measured, what is known to be impossible."""
    gates = options.gates
    if gates.min_accuracy_ratio is not None and data.labels is None:
        raise UserError("--min-accuracy-ratio needs labels and these bundles have none: use --min-agreement.")
    wanted = gates.min_accuracy_ratio is not None or gates.min_agreement is not None
    if wanted and classification_output(data.teacher) is None:
        raise UserError("--min-accuracy-ratio and --min-agreement need an output of shape (images, classes).")
    if gates.max_p99_ms is not None and options.skip_latency:
        raise UserError("--max-p99-ms needs latencies, and --skip-latency leaves them out: drop one of the two.")
    if gates.max_energy_mj is not None and no_meter:
        raise UserError(f"--max-energy-mj: no energy data on this machine: {no_meter}.")
