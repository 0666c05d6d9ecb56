"""The steps of a bench run, in their order: each fills what it measures into the entries of the networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from faqd.at_once import images_at_once
from faqd.benchmarks.measure import energy
from faqd.benchmarks.measure.accuracy import judge
from faqd.benchmarks.measure.clocks import Clocks
from faqd.benchmarks.measure.latency import (
    CLOSED_LOOP,
    ONE_AHEAD,
    Clock,
    Length,
    Times,
    interleaved,
    speed_up,
    stability_warnings,
    summary,
)
from faqd.benchmarks.measure.networks import Array, Backend, Network, feeds_of, timed_teacher
from faqd.benchmarks.measure.paired_metric import PairedMetric, paired_metric
from faqd.benchmarks.measure.sustained import sustained
from faqd.benchmarks.measure.sweep import sweep
from faqd.benchmarks.measure.switches import Options
from faqd.benchmarks.measure.user_metric import Metric
from faqd.benchmarks.report.trtexec_json import profile_json
from faqd.bundle import STUDENT_TENSORRT, Bundle, Evaluation
from faqd.errors import UserError

EVAL_BATCH = 64
PROFILE_RUNS = 50
SWEEP_ROUNDS = 3


@dataclass
class Bench:
    """What the steps of a run share. opened: the networks that can be run here, by id."""

    bundles: Sequence[Bundle]
    backend: Backend
    options: Options
    data: Evaluation
    networks: list[dict[str, Any]]
    progress: Callable[[str], None]
    clock: Clock
    opened: dict[str, Network] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def batch(self) -> int:
        return self.options.batch[0]

    @property
    def ahead(self) -> bool:
        """Whether queries can be in flight at all: onnxruntime's call returns with the result."""
        return self.backend.gpu is not None

    def students(self) -> list[dict[str, Any]]:
        return [entry for entry in self.networks if entry["role"] == "student"]

    def judged(self) -> list[dict[str, Any]]:
        """The students; on a GPU the FP16 networks too, which may have lost something as well."""
        return [entry for entry in self.measured() if entry["role"] == "student" or entry["weight_bits"] == 16]

    @property
    def teacher(self) -> str:
        """The id of the one that is run."""
        return timed_teacher(self.networks)

    def measured(self) -> list[dict[str, Any]]:
        return [entry for entry in self.networks if entry["id"] in self.opened]

    def feeds(self, batch: int) -> dict[str, Array]:
        return feeds_of(self.bundles[0], self.data, batch)


def open_networks(run: Bench, stack: ExitStack) -> None:
    for entry in run.networks:
        if entry["id"] == "teacher" != run.teacher:
            continue
        bundle = run.bundles[entry["bundle"]]
        reason = run.backend.missing(bundle, entry["role"])
        if reason and entry["role"] == "student":
            raise UserError(reason)
        if reason:
            run.notes.append(reason)
        elif entry["role"] == "student" or run.backend.gpu or not run.options.skip_latency:
            network = stack.enter_context(run.backend.open(bundle, entry["role"]))
            start = run.clock()
            network.run(run.feeds(1 if entry["role"] == "student" else run.batch))
            entry["loaded"] = {**network.facts, "first_inference_ms": (run.clock() - start) * 1e3}
            run.opened[entry["id"]] = network


def measure_accuracy(run: Bench, metric: Metric | None) -> None:
    data, teacher = run.data, run.networks[0]
    paired: PairedMetric | None = None
    if metric:
        resamples = run.options.bootstrap or 0
        paired = paired_metric(metric, data, run.bundles[0], resamples, teacher["name"], run.progress)
        teacher["metric"] = paired.teacher
    for entry in run.judged():
        run.progress(f"accuracy of {entry['name']} on {len(data.images)} images")
        bundle = run.bundles[entry["bundle"]]
        outputs = _outputs(bundle, run.opened[entry["id"]], data)
        try:
            entry["accuracy"] = judge(outputs, data.teacher, data.labels, entry["name"], bundle.branches)
        except UserError as error:
            if entry["role"] == "student":
                raise
            run.notes.append(str(error))
            continue
        if paired:
            entry |= paired.judge(outputs, bundle, entry["name"])
        if entry["role"] == "student":
            entry["engine_file"] = _judged_engine_file(run, bundle, paired)
    record = judge(data.teacher, data.teacher, data.labels, teacher["name"])
    teacher["accuracy"] = {key: record[key] if key in ("top1", "top5") else None for key in record}


def _judged_engine_file(run: Bench, bundle: Bundle, paired: PairedMetric | None) -> dict[str, Any] | None:
    """What the file that an engine is built from is worth, where another one is run here."""
    file = run.backend.open_engine_file(bundle)
    if file is None:
        return None
    who = f"{bundle.name}, {STUDENT_TENSORRT}"
    run.progress(f"accuracy of {who} as written, on {len(run.data.images)} images")
    with file as network:
        outputs = _outputs(bundle, network, run.data)
    return {
        "file": STUDENT_TENSORRT,
        "accuracy": judge(outputs, run.data.teacher, run.data.labels, who, bundle.branches),
        **(paired.judge(outputs, bundle, who) if paired else {"metric": None, "metric_difference": None}),
    }


def _outputs(bundle: Bundle, network: Network, data: Evaluation) -> dict[str, Array]:
    parts: dict[str, list[Array]] = {}
    count = max(len(values) for values in data.teacher.values())  # dense outputs are stored for some images only
    step = images_at_once(data.images.shape[1:3], EVAL_BATCH)
    for start in range(0, count, step):
        images = data.images[start : min(start + step, count)]
        outputs = network.run({bundle.manifest["input"]["name"]: bundle.network_input(images)})
        for name, values in outputs.items():
            parts.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in parts.items()}


def measure_latency(run: Bench) -> Times | None:
    """Fills latency and speed-ups in; the times of the first student at the first batch size."""
    first: Times | None = None
    options, student = run.options, run.students()[0]["id"]
    for batch in options.batch:
        submissions = 2 if run.ahead else 1
        seconds = submissions * len(run.opened) * (options.length.duration_s + options.length.warm_up_ms / 1e3)
        run.progress(f"latency of {len(run.opened)} networks at batch {batch}, about {seconds:.0f} s")
        closed, graphs = _timed(run, batch, slots=1)
        ahead = _timed(run, batch, slots=2)[0] if run.ahead else {}
        for entry in run.measured():
            own = closed[entry["id"]]
            record = _summary(run, own, batch)
            record |= {
                "submission": CLOSED_LOOP,
                "cuda_graph": graphs[entry["id"]],
                "warnings": stability_warnings(record),
                ONE_AHEAD: _summary(run, ahead[entry["id"]], batch) if run.ahead else None,
            }
            entry["latency"].append(record)
            for over, baseline in (("own_float", entry["own_float"]), ("teacher", run.teacher)):
                if baseline in closed and entry["role"] == "student":
                    ratio = speed_up(own, closed[baseline]).to_json()
                    entry["speed_up"].append({"batch": batch, "over": over, "baseline": baseline, **ratio})
        first = first or (ahead or closed)[student]
    return first


def _timed(run: Bench, batch: int, slots: int) -> tuple[dict[str, Times], dict[str, bool | None]]:
    """The times of every network, and whether its kernels were launched as a CUDA graph."""
    feeds = run.feeds(batch)
    with ExitStack() as stack:
        opened = {name: stack.enter_context(network.submission(feeds, slots)) for name, network in run.opened.items()}
        graphs = {name: getattr(submission, "cuda_graph", None) for name, submission in opened.items()}
        return interleaved(opened, run.options.length, run.clock), graphs


def _summary(run: Bench, times: Times, batch: int) -> dict[str, Any]:
    return summary(times, batch, run.options.percentiles, run.options.average_runs, parts=run.ahead)


def measure_sweep(run: Bench) -> None:
    length = run.options.length
    short = Length(length.duration_s, length.warm_up_ms, length.iterations, min(SWEEP_ROUNDS, length.rounds))
    image_bytes = sum(values.nbytes for values in run.feeds(1).values())
    slots = 2 if run.ahead else 1
    found = sweep(run.opened, run.feeds, image_bytes, slots, short, run.clock, run.progress)
    for entry in run.measured():
        entry["sweep"] = {"submission": ONE_AHEAD if run.ahead else CLOSED_LOOP, **found[entry["id"]]}


def measure_energy(run: Bench, meter: energy.Meter) -> None:
    for entry in run.measured():
        run.progress(f"energy of {entry['name']}, {run.options.energy_duration_s:g} s")
        with run.opened[entry["id"]].submission(run.feeds(run.batch)) as submission:
            entry["energy"] = energy.measure(
                submission, run.batch, meter, run.options.energy_duration_s, clock=run.clock
            )


def measure_profile(run: Bench) -> list[dict[str, Any]]:
    for entry in run.measured():
        run.progress(f"time per layer of {entry['name']}")
        layers = run.opened[entry["id"]].layer_times(run.feeds(run.batch), PROFILE_RUNS)
        table = profile_json({name: times for name, _, times in layers})
        kinds = {name: kind for name, kind, _ in layers}
        entry["layers"] = {
            "batch": run.batch,
            "count": table[0]["count"],
            "total_ms": sum(layer["averageMs"] for layer in table[1:]),
            "layers": [
                {
                    "name": layer["name"],
                    "kind": kinds[layer["name"]],
                    "mean_ms": layer["averageMs"],
                    "median_ms": layer["medianMs"],
                    "share": layer["percentage"] / 100,
                }
                for layer in table[1:]
            ],
        }
        if entry is run.students()[0]:
            exported = table
    return exported


def measure_sustained(run: Bench, clocks: Clocks) -> None:
    entry = run.students()[0]
    run.progress(f"{entry['name']} under load for {run.options.sustained_minutes:g} minutes")
    with run.opened[entry["id"]].submission(run.feeds(run.batch)) as submission:
        entry["sustained"] = sustained(submission, run.batch, run.options.sustained_minutes, clocks, run.clock)
