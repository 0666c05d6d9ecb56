"""What stands in a record of the bench, version 2: every key that a table, a page, a gate or a comparison reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from faqd.benchmarks.report.layer_time_chart import KINDS
from faqd.bundle import FLOATS
from faqd.fidelity import VERDICTS
from faqd.proof import STATUSES
from faqd.schema import COUNT, POSITIVE, Each, Many, Maybe, wrong

_SHARE = {"value": float, "low": float, "high": float, "n": COUNT}
_ACCURACY = {
    "top1": Maybe(_SHARE),
    "top5": Maybe(_SHARE),
    "gap_to_teacher": Maybe(_SHARE),
    "ratio_to_teacher": Maybe(float),
    "agreement": Maybe(_SHARE),
    "kl_to_teacher_nats": Maybe(float),
    "snr_db": Maybe(Each(Maybe(float))),
}
_FIDELITY = {"by_output": Each(float), "least": float, "verdict": VERDICTS}
"""Older records have none."""
_SUMMARY = {
    "batch": COUNT,
    "samples": COUNT,
    "min_ms": POSITIVE,
    "median_ms": POSITIVE,
    "max_ms": POSITIVE,
    "coefficient_of_variation": float,
    "percentiles_ms": Each(Maybe(float)),
    "throughput_queries_per_s": POSITIVE,
    "throughput_images_per_s": POSITIVE,
    "round_medians_ms": Many(float, 1),
    "distribution_ms": Many(POSITIVE, 101),
    "parts": Maybe({part: {"median_ms": float} for part in ("enqueue", "h2d", "compute", "d2h")}),
}
_CLOCKS = {
    "gpu_mhz": Maybe(float),
    "cpu_mhz": Maybe(float),
    "temperature_c": Each(float),
    "power_mode": Maybe(str),
    "power_w": Maybe(float),
}
_LAYER = {"name": str, "kind": tuple(KINDS), "mean_ms": float, "share": float}
_WINDOW = {"start_s": float, "duration_s": POSITIVE, "median_ms": float, "throughput_images_per_s": POSITIVE}
_NETWORK = {
    "bundle": int,
    "role": ("teacher", "teacher_fp16", "student", "float"),
    "name": str,
    "kind": str,
    "weight_bits": COUNT,
    "act_bits": COUNT,
    "file_bytes": Maybe(POSITIVE),
    "size": Maybe({"float32_bytes": POSITIVE}),
    "accuracy": Maybe(_ACCURACY),
    "metric": Maybe(Each(float)),
    "loaded": Maybe({"auxiliary_streams": Maybe(float)}),
    "latency": Many({**_SUMMARY, "cuda_graph": Maybe(bool), "warnings": Many(str), "one_ahead": Maybe(_SUMMARY)}),
    "speed_up": Many({"batch": COUNT, "over": str, "paired_median": POSITIVE, "noisy": bool}),
    "layers": Maybe({"layers": Many(_LAYER, 1)}),
    "energy": Maybe(
        {
            "batch": COUNT,
            "queries": COUNT,
            **dict.fromkeys(("idle_w", "load_w", "energy_per_image_mj", "total_energy_per_image_mj"), Maybe(float)),
            "reason": Maybe(str),
        }
    ),
    "sweep": Maybe(
        {
            "points": Many({"batch": COUNT, "throughput_images_per_s": POSITIVE}),
            "saturated_at_batch": Maybe(COUNT),
            "ended": str,
        }
    ),
    "sustained": Maybe(
        {
            "minutes": POSITIVE,
            "clocks": {"status": str},
            "throughput_kept": float,
            "windows": Many({**_WINDOW, **_CLOCKS}, 1),
        }
    ),
}
_STUDENT = {
    "accuracy": _ACCURACY,
    "size": Maybe(dict.fromkeys(("float32_bytes", "int8_bytes", "packed_bytes"), POSITIVE)),
}
_ENGINE_FILE = {"file": str, "accuracy": {**_ACCURACY, "fidelity": _FIDELITY}, "metric": Maybe(Each(float))}
"""What a student's other file is worth; older records have none."""
_DIFFERENCE = Maybe(Each({"value": float, "low": float, "high": float}))
"""Of a user's metric to the teacher's; older records have none."""
_PROOF = {"status": STATUSES, **dict.fromkeys(("codes", "differing", "largest_difference"), Maybe(float))}
_FLOATS = {**FLOATS, "worth_int8": bool}
"""What a bundle's manifest said of what stays float; all three or none, as in older records."""
_ON_CPU = {"backend": {"threads": COUNT}}
_TEXTS = ("time_utc", "cpu", "os", "kernel", "machine", "python", "numpy")
RECORD = {
    "faqd": str,
    "command": Many(str),
    "switches": {
        "backend": str,
        "preset": Maybe(str),
        **dict.fromkeys(("cuda_graph", "spin_wait", "transfers"), Maybe(bool)),
        "rounds": COUNT,
        "duration_s": float,
        "warm_up_ms": float,
        "batch": Many(COUNT, 1),
        "percentiles": Many(POSITIVE),
        "skip_latency": bool,
    },
    "backend": {"name": ("engine", "onnxruntime"), "device": str, "why": str},
    "environment": {**dict.fromkeys(_TEXTS, str), "board": Maybe(str)},
    "clocks": {"status": str, "after_latency": _CLOCKS},
    "evaluation": {"images": COUNT, "labels": bool, "classification": bool, "sha256": str},
    "metric": Maybe({"source": str, "images": COUNT}),
    "energy": {"status": str, "reason": Maybe(str), "rail": Maybe(str), "source": Maybe(str)},
    "bundles": Many({"folder": str, "name": str, "kind": str, "verify": str, "manifest_sha256": str}, 1),
    "networks": Many(_NETWORK, 2),
    "gates": Many(dict),
    "notes": Many(str),
}


def complaint(record: Mapping[str, Any]) -> str | None:
    """What is wrong with a record first, by its place; None where it is whole."""
    return next(_complaints(record), None)


def _complaints(record: Mapping[str, Any]) -> Iterator[str]:
    yield from wrong(record, RECORD, "")
    if "source" in record["evaluation"]:
        yield from wrong(record["evaluation"]["source"], str, "evaluation/source")
    for i, bundle in enumerate(record["bundles"]):
        if not bundle.keys().isdisjoint(_FLOATS):
            yield from wrong(bundle, _FLOATS, f"bundles/{i}")
        if "proofs" in bundle:
            yield from wrong(bundle["proofs"], Each(_PROOF), f"bundles/{i}/proofs")
    networks = record["networks"]
    if networks[0]["role"] != "teacher":
        yield "networks/0 is not the teacher"
    students = [(f"networks/{i}", network) for i, network in enumerate(networks) if network["role"] == "student"]
    if not students:
        yield "networks has no student"
    for path, student in students:
        yield from wrong(student, _STUDENT, path)
        yield from wrong(student.get("engine_file"), Maybe(_ENGINE_FILE), f"{path}/engine_file")
        if record["metric"]:
            yield from wrong(student["metric"], Each(float), f"{path}/metric")
        beside = student.get("engine_file") or {}
        yield from wrong(beside.get("metric_difference"), _DIFFERENCE, f"{path}/engine_file/metric_difference")
    yield from wrong(record["switches"].get("bootstrap"), Maybe(COUNT), "switches/bootstrap")
    labels, classes = record["evaluation"]["labels"], record["evaluation"]["classification"]
    judged = [("networks/0", networks[0]), *students] if labels and classes else []
    for path, network in judged:
        keys = ("top1",) if network["role"] == "teacher" else ("top1", "gap_to_teacher", "agreement")
        yield from wrong(network["accuracy"], dict.fromkeys(keys, _SHARE), f"{path}/accuracy")
    for i, network in enumerate(networks):
        if not 0 <= network["bundle"] < len(record["bundles"]):
            yield f"networks/{i}/bundle is {network['bundle']}, not one of {len(record['bundles'])}"
        yield from wrong(network.get("metric_difference"), _DIFFERENCE, f"networks/{i}/metric_difference")
        if "file" in network:
            yield from wrong(network["file"], str, f"networks/{i}/file")
        if network["accuracy"] and network["role"] != "teacher":
            yield from wrong(network["accuracy"], {"snr_db": Each(Maybe(float))}, f"networks/{i}/accuracy")
            if "fidelity" in network["accuracy"]:
                yield from wrong(network["accuracy"], {"fidelity": _FIDELITY}, f"networks/{i}/accuracy")
        for j, latency in enumerate(network["latency"]):
            wanted = {f"{p:g}": Maybe(float) for p in (*record["switches"]["percentiles"], 99)}
            yield from wrong(latency["percentiles_ms"], wanted, f"networks/{i}/latency/{j}/percentiles_ms")
            on_gpu = {"parts": dict, "one_ahead": dict} if record["backend"]["name"] == "engine" else {}
            yield from wrong(latency, on_gpu, f"networks/{i}/latency/{j}")
    if record["backend"]["device"] == "CPU":
        yield from wrong(record, _ON_CPU, "")
