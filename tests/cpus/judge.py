"""Whether onnxruntime computed the reference's codes on a CPU, by the rule of `faqd-deploy verify`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from faqd.deploy.verify.layers import SATURATED, _compare, _differing_in_all, _failure, _saturated
from tests.cpus.emulated import Cpu
from tests.cpus.students import SATURATING, Case

MODES = {"plain": False, "optimised": True}


@dataclass(frozen=True)
class Verdict:
    """Of one student on one CPU. codes: compared, of both modes together; differing: of those; largest: by how much.
    failures: a sentence each, none for a student that passed."""

    student: str
    codes: int
    differing: int
    largest: int
    failures: list[str]


def verdicts(cases: list[Case], results: Path) -> list[Verdict]:
    """Of every student on what the runner wrote into `results`."""
    layers: dict[str, list[dict[str, Any]]] = {}
    for index, case in enumerate(cases):
        with np.load(results / f"{index:03}.npz") as found:
            wanted = case.values[case.segment.output]
            compared = {mode: _compare(found[mode], wanted, case.segment, case.values) for mode in MODES}
            if not compared["optimised"]["passed"]:
                compared["optimised"]["saturated"] = _saturated(case.segment, case.feeds, found["optimised"])
        layers.setdefault(case.student, []).append({"layer": case.segment.layer, **compared})
    return [verdict(student, rows) for student, rows in layers.items()]


def verdict(student: str, layers: list[dict[str, Any]]) -> Verdict:
    """layers: as in `verify.json`."""
    compared = [(row["layer"], row[mode], optimise) for row in layers for mode, optimise in MODES.items()]
    codes = [entry for _, entry, _ in compared if "codes" in entry]
    return Verdict(
        student,
        sum(entry["codes"] for entry in codes),
        sum(entry["differing"] for entry in codes),
        max(entry["largest_difference"] for entry in codes),
        [_failure(*entry) for entry in compared if not entry[1]["passed"]] + _differing_in_all(layers),
    )


def objections(cpu: Cpu, instruction_sets: list[str], found: list[Verdict]) -> list[str]:
    """What is wrong with a run on `cpu`, the emulation included: the saturating layer fails where it has to."""
    told = [f"{verdict.student}: {text}" for verdict in found for text in verdict.failures]
    missing, surplus = set(cpu.has) - set(instruction_sets), set(cpu.lacks) & set(instruction_sets)
    wrong = [f"not emulated: it ran without {name}" for name in sorted(missing)]
    wrong += [f"not emulated: it ran with {name}" for name in sorted(surplus)]
    if cpu.saturates is not False:
        expected = [text for text in told if text.startswith(f"{SATURATING}: ")]
        told = [text for text in told if text not in expected]
        if cpu.saturates and not expected:
            wrong.append(f"not emulated: the {SATURATING} came out right")
        if expected and not any(text.endswith(SATURATED) for text in expected):
            wrong.append(f"the {SATURATING} gives other codes than `verify` knows of saturating kernels")
    return [f"{cpu.name}: {text}" for text in wrong + told]


def instruction_sets(results: Path) -> list[str]:
    """What the CPU could do when it wrote `results`."""
    found: list[str] = json.loads((results / "instruction_sets.json").read_text(encoding="utf-8"))
    return found
