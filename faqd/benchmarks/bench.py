"""One bench run: bundles in, one record out. Table, JSON and report all show this record and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from faqd import __version__
from faqd.benchmarks.accuracy import classification_output, judge
from faqd.benchmarks.environment import environment
from faqd.benchmarks.latency import (
    DURATION_S,
    ROUNDS,
    WARM_UP_S,
    Query,
    Times,
    interleaved,
    speed_up,
    summary,
)
from faqd.bundle import EVAL, FLOAT_STUDENT, MANIFEST, TEACHER, VERIFY, Bundle, Evaluation
from faqd.errors import UserError
from faqd.files import read_json, sha256

FORMAT = "faqd-bench"
VERSION = 1
EVAL_BATCH = 64

Array = NDArray[Any]
Role = Literal["teacher", "student", "float"]
"""float: the student's graph unquantized, the baseline for speed; its weights are not meant to classify."""


class Network(Protocol):
    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]: ...

    def query(self, feeds: Mapping[str, Array]) -> Query: ...


class Backend(Protocol):
    """What runs the networks: onnxruntime on the CPU, or engines on a GPU."""

    name: str
    student: str
    """The ONNX file that the student is run from, or its engine was built from."""
    facts: dict[str, Any]
    """For the record: `device`, `why`, versions."""

    def missing(self, bundle: Bundle, role: Role) -> str | None:
        """Why this network cannot be run here and what makes it so, or None."""

    def open(self, bundle: Bundle, role: Role) -> AbstractContextManager[Network]: ...


@dataclass(frozen=True)
class Options:
    """The switches of a run. duration_s: per network and batch. Both gates: a share, such as 0.99."""

    batch: tuple[int, ...] = (1, 32)
    duration_s: float = DURATION_S
    rounds: int = ROUNDS
    warm_up_s: float = WARM_UP_S
    skip_latency: bool = False
    min_accuracy_ratio: float | None = None
    min_agreement: float | None = None


def bench(
    bundles: Sequence[Bundle],
    backend: Backend,
    options: Options,
    *,
    command: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Measure every student, its own float graph and the one teacher; the record says what was found.

    UserError where the bundles are not comparable or a gate asks for what they cannot tell.
    """
    _check_comparable(bundles)
    data = bundles[0].evaluation()
    _check_gates(data, options)
    networks = _networks(bundles, backend.student)
    notes: list[str] = []
    with ExitStack() as stack:
        opened: dict[str, Network] = {}
        for entry in networks:
            bundle = bundles[entry["bundle"]]
            reason = backend.missing(bundle, entry["role"])
            if reason and entry["role"] == "student":
                raise UserError(reason)
            if reason:
                notes.append(reason)
            elif entry["role"] == "student" or not options.skip_latency:
                opened[entry["id"]] = stack.enter_context(backend.open(bundle, entry["role"]))
        for entry in networks:
            if entry["role"] == "student":
                progress(f"accuracy of {entry['name']} on {len(data.images)} images")
                entry["accuracy"] = _accuracy(bundles[entry["bundle"]], opened[entry["id"]], data)
            elif entry["role"] == "teacher":
                entry["accuracy"] = _teacher_accuracy(data, entry["name"])
        if not options.skip_latency:
            for batch in options.batch:
                seconds = len(opened) * (options.duration_s + options.warm_up_s)
                progress(f"latency of {len(opened)} networks at batch {batch}, about {seconds:.0f} s")
                queries = {name: network.query(_feeds(bundles[0], data, batch)) for name, network in opened.items()}
                times = interleaved(
                    queries,
                    rounds=options.rounds,
                    duration_s=options.duration_s,
                    warm_up_s=options.warm_up_s,
                    clock=clock,
                )
                _record_latency(networks, times, batch)
    return {
        "format": FORMAT,
        "version": VERSION,
        "faqd": __version__,
        "command": list(command),
        "switches": {**asdict(options), "batch": list(options.batch), "backend": backend.name},
        "backend": {"name": backend.name, **backend.facts},
        "environment": environment(),
        "evaluation": {
            "images": len(data.images),
            "labels": data.labels is not None,
            "classification": classification_output(data.teacher) is not None,
            "sha256": bundles[0].manifest["files"][EVAL]["sha256"],
        },
        "bundles": [_bundle_record(bundle, backend.student) for bundle in bundles],
        "networks": networks,
        "gates": _gates(networks, options),
        "notes": [*notes, *_remarks(bundles, networks)],
    }


def failed_gates(result: Mapping[str, Any]) -> list[str]:
    """One sentence per gate that was not met."""
    return [
        f"{gate['network']}: {gate['measure'].replace('_', ' ')} {gate['found']:.4f} is below the "
        f"{gate['wanted']:g} that {gate['option']} asks for."
        for gate in result["gates"]
        if not gate["passed"]
    ]


def _check_comparable(bundles: Sequence[Bundle]) -> None:
    first = bundles[0]
    for other in bundles[1:]:
        pair = f"{first.folder} and {other.folder}"
        if other.manifest["files"][EVAL]["sha256"] != first.manifest["files"][EVAL]["sha256"]:
            raise UserError(
                f"{pair}: their {EVAL} differ (other images, labels or teacher), so their figures cannot stand "
                "in one table; bench them apart, or export both from the same data and teacher."
            )
        if other.preprocess != first.preprocess or other.takes_pixels != first.takes_pixels:
            raise UserError(f"{pair}: they preprocess images differently; bench them apart.")


def _check_gates(data: Evaluation, options: Options) -> None:
    if options.min_accuracy_ratio is not None and data.labels is None:
        raise UserError("--min-accuracy-ratio needs labels and these bundles have none: use --min-agreement.")
    wanted = options.min_accuracy_ratio is not None or options.min_agreement is not None
    if wanted and classification_output(data.teacher) is None:
        raise UserError("--min-accuracy-ratio and --min-agreement need an output of shape (images, classes).")


def _networks(bundles: Sequence[Bundle], student_file: str) -> list[dict[str, Any]]:
    """The teacher once, then every student followed by its own float graph; equal files are one network."""
    teacher = bundles[0]
    networks = [_entry("teacher", 0, str(teacher.manifest["teacher"]["name"]), teacher, TEACHER)]
    float_ids = {teacher.manifest["files"][TEACHER]["sha256"]: "teacher"} if teacher.has(TEACHER) else {}
    for index, bundle in enumerate(bundles):
        student = _entry("student", index, bundle.name, bundle, student_file)
        student |= {"kind": bundle.kind} | {key: bundle.manifest[key] for key in ("weight_bits", "act_bits", "size")}
        networks.append(student)
        if not bundle.has(FLOAT_STUDENT):
            continue
        content = bundle.manifest["files"][FLOAT_STUDENT]["sha256"]
        if content not in float_ids:
            float_ids[content] = f"float-{index}"
            networks.append(_entry("float", index, f"{bundle.name}, its float graph", bundle, FLOAT_STUDENT))
        student["own_float"] = float_ids[content]
    return networks


def _entry(role: Role, index: int, name: str, bundle: Bundle, file: str) -> dict[str, Any]:
    return {
        "id": "teacher" if role == "teacher" else f"{role}-{index}",
        "role": role,
        "bundle": index,
        "name": name,
        "kind": "float",
        "weight_bits": 32,
        "act_bits": 32,
        "file_bytes": bundle.manifest["files"].get(file, {}).get("bytes"),
        "size": bundle.manifest["teacher"].get("size") if role == "teacher" else None,
        "own_float": None,
        "accuracy": None,
        "latency": [],
        "speed_up": [],
    }


def _feeds(bundle: Bundle, data: Evaluation, batch: int) -> dict[str, Array]:
    """Real images, repeated where there are fewer than the batch."""
    images = data.images[np.arange(batch) % len(data.images)]
    return {bundle.manifest["input"]["name"]: bundle.network_input(images)}


def _accuracy(bundle: Bundle, network: Network, data: Evaluation) -> dict[str, Any]:
    parts: dict[str, list[Array]] = {}
    for start in range(0, len(data.images), EVAL_BATCH):
        images = data.images[start : start + EVAL_BATCH]
        outputs = network.run({bundle.manifest["input"]["name"]: bundle.network_input(images)})
        for name, values in outputs.items():
            parts.setdefault(name, []).append(values)
    outputs = {name: np.concatenate(values) for name, values in parts.items()}
    return judge(outputs, data.teacher, data.labels, bundle.name)


def _teacher_accuracy(data: Evaluation, name: str) -> dict[str, Any]:
    record = judge(data.teacher, data.teacher, data.labels, name)
    return {key: record[key] if key in ("top1", "top5") else None for key in record}


def _record_latency(networks: list[dict[str, Any]], times: dict[str, Times], batch: int) -> None:
    for entry in networks:
        own = times.get(entry["id"])
        if own is None:
            continue
        entry["latency"].append(summary(own, batch))
        for over, baseline in (("own_float", entry["own_float"]), ("teacher", "teacher")):
            if baseline in times and entry["role"] == "student":
                ratio = speed_up(own, times[baseline]).to_json()
                entry["speed_up"].append({"batch": batch, "over": over, "baseline": baseline, **ratio})


def _bundle_record(bundle: Bundle, student_file: str) -> dict[str, Any]:
    keys = ("name", "kind", "architecture", "weight_bits", "act_bits", "target", "teacher")
    return {
        "folder": str(bundle.folder),
        **{key: bundle.manifest[key] for key in keys},
        "manifest_sha256": sha256(bundle.folder / MANIFEST),
        "verify": _verify_status(bundle, student_file),
    }


def _verify_status(bundle: Bundle, student_file: str) -> str:
    """passed, failed, stale (it does not speak of this student file) or missing."""
    path = bundle.folder / VERIFY
    if not path.is_file():
        return "missing"
    found = read_json(path)
    if not isinstance(found, dict) or found.get("passed") is not True:
        return "failed"
    hashes = found.get("onnx_sha256")
    here = bundle.manifest["files"].get(student_file, {}).get("sha256")
    return "passed" if isinstance(hashes, dict) and here and hashes.get(student_file) == here else "stale"


def _gates(networks: list[dict[str, Any]], options: Options) -> list[dict[str, Any]]:
    gates = []
    for entry in (entry for entry in networks if entry["role"] == "student"):
        found = {"accuracy_ratio": entry["accuracy"]["ratio_to_teacher"]}
        found["agreement"] = (entry["accuracy"]["agreement"] or {}).get("value")
        for measure, wanted in (
            ("accuracy_ratio", options.min_accuracy_ratio),
            ("agreement", options.min_agreement),
        ):
            if wanted is not None:
                value = found[measure] or 0.0
                option = f"--min-{measure.replace('_', '-')}"
                record = {"option": option, "measure": measure, "network": entry["name"]}
                gates.append({**record, "wanted": wanted, "found": value, "passed": value >= wanted})
    return gates


def _remarks(bundles: Sequence[Bundle], networks: list[dict[str, Any]]) -> list[str]:
    remarks = []
    if all(bundle.kind != "ptq" for bundle in bundles):
        remarks.append(
            "No PTQ row: `faqd-deploy ptq ... --out ptq` makes a bundle of the same network without training; "
            "name it beside this one."
        )
    noisy = sorted({entry["name"] for entry in networks for ratio in entry["speed_up"] if ratio["noisy"]})
    if noisy:
        remarks.append(
            f"Noisy: for {', '.join(noisy)} the ratio of the fastest rounds and the paired median differ by more "
            "than 10 % (marked ~); repeat on a quiet machine."
        )
    if any(record["percentiles_ms"]["99"] is None for entry in networks for record in entry["latency"]):
        remarks.append("A p99 is left out where fewer than 100 queries ran: ask for a longer --duration.")
    return remarks
