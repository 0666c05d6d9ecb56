"""What a reader of a record must know besides its figures, as sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from faqd.benchmarks.measure.clocks import moved
from faqd.benchmarks.measure.percentiles import samples_needed
from faqd.benchmarks.report.figures import device, label


def remarks(result: Mapping[str, Any]) -> list[str]:
    networks, switches = result["networks"], result["switches"]
    found = []
    if all(bundle["kind"] != "ptq" for bundle in result["bundles"]):
        found.append(
            "No PTQ row: `faqd-deploy ptq ... --out ptq` makes a bundle of the same network without training; "
            "name it beside this one."
        )
    if result["metric"] and not switches["bootstrap"]:
        found.append(
            f"On {result['metric']['images']:,} images figures of --metric that lie close together may differ by "
            "chance: --bootstrap 1000 gives each difference to the teacher its interval."
        )
    noisy = sorted({entry["name"] for entry in networks for ratio in entry["speed_up"] if ratio["noisy"]})
    if noisy:
        found.append(
            f"Noisy: for {', '.join(noisy)} the ratio of the fastest rounds and the paired median differ by more "
            "than 10 % (marked ~); repeat on a quiet machine."
        )
    found += _losing(result)
    records = [(entry, latency) for entry in networks for latency in entry["latency"]]
    short = sorted({float(p) for _, r in records for p, value in r["percentiles_ms"].items() if value is None})
    if short:
        found.append(
            f"A p{short[0]:g} is left out where fewer than {samples_needed(short[0])} queries ran: ask for a longer "
            "--duration."
        )
    for entry, latency in records:
        found += [f"{entry['name']} at batch {latency['batch']}: {text}" for text in latency["warnings"]]
    if switches["cuda_graph"] and any(latency["cuda_graph"] is False for _, latency in records):
        found.append("No CUDA graph could be captured for some networks: their kernels were launched one by one.")
    if (streams := switches.get("inf_streams") or 1) > 1:
        found.append(
            f"With {streams} streams (--inf-streams) queries one ahead share the GPU: their throughput counts, their "
            "latency does not."
        )
    if any(entry["layers"] and (entry["loaded"] or {}).get("auxiliary_streams") for entry in networks):
        found.append("Kernels ran on auxiliary streams: the times per layer do not add up to the compute time.")
    clocks = result["clocks"]
    if text := moved(clocks["before_latency"], clocks["after_latency"]):
        found.append(f"While latency was measured, {' and '.join(text)}: lock the clocks and repeat.")
    if result["energy"]["status"] != "measured" and not switches["skip_latency"]:
        found.append(f"No energy data: {result['energy']['reason']}.")
    for entry in networks:
        if entry["energy"] and entry["energy"]["reason"]:
            found.append(f"No energy per image of {entry['name']}: {entry['energy']['reason']}.")
    return found


def _losing(result: Mapping[str, Any]) -> list[str]:
    """The students that INT8 makes slower, which depends on the processor and on the network's size."""
    return [
        f"INT8 does not pay here: {label(entry)} takes {1 / ratio['paired_median']:.2f} times as long as its own float "
        f"graph at batch {ratio['batch']} on {device(result)}."
        for entry in result["networks"]
        for ratio in entry["speed_up"]
        if ratio["over"] == "own_float" and ratio["paired_median"] < 1 and not ratio["noisy"]
    ]
