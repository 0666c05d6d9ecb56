"""What a run is worth on the eval split: the deployed integers for a student, the float network for a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from faqd.errors import UserError
from faqd.preprocess import Preprocess
from faqd.quant import FLOAT_BITS
from faqd.quantize.convert import convert
from faqd.quantize.outputs import run_batches
from faqd.quantize.student import Student
from faqd.train.data.datasets import Say, load_dataset
from faqd.train.data.split import Split
from faqd.train.run.folder import MovedData, finished, images_of_run, load_teacher, network_input, run_preprocess
from faqd.train.run.student import load_student

BATCH = 250


def deployable(student: Student) -> Any:
    """What a student's accuracy is measured on: its integers, or the network itself where activations are float."""
    return student.network if student.config.activations == FLOAT_BITS else convert(student, "tensorrt")


def evaluate_run(folder: Path, moved: MovedData) -> dict[str, Any]:
    """Accuracy and, for a student, agreement with the teacher, on the eval split; for each output its SNR in dB.

    Without accuracy where the data has no labels, or other classes than the network has outputs.
    """
    record = finished(folder)
    dataset = load_dataset(images_of_run(record, moved), with_labels="eval")
    split = dataset.eval
    networks: dict[str, Any] = {"teacher": load_teacher(folder)[0]}
    if record["kind"] == "distill":
        networks = {"student": deployable(load_student(folder)), **networks}
    measured = _outputs(networks, split, run_preprocess(record))
    wanted = measured["teacher"]
    result: dict[str, Any] = {"images": len(split)}
    if "student" in measured:
        result["snr_db"] = {name: _snr_db(measured["student"][name], wanted[name]) for name in wanted}
    scores = next((name for name, values in wanted.items() if values.dim() == 2), None)
    shapes = {name: tuple(values.shape[1:]) for name, values in wanted.items()}
    if split.labels is not None and (scores is None or shapes[scores] != (len(dataset.classes or ()),)):
        listed = ", ".join(map(str, shapes.values()))
        result["no_accuracy"] = f"outputs {listed}, classes of the data {len(dataset.classes or ())}"
    elif split.labels is not None and scores is not None:
        labels = torch.from_numpy(split.labels)
        for name, values in measured.items():
            result[f"{name}_accuracy"] = round(float((values[scores].argmax(1) == labels).float().mean()), 6)
    if "student" in measured and scores is not None:
        agreement = (measured["student"][scores].argmax(1) == wanted[scores].argmax(1)).float().mean()
        result["agreement"] = round(float(agreement), 6)
    return result


def _outputs(networks: dict[str, Any], split: Split, preprocess: Preprocess) -> dict[str, dict[str, Tensor]]:
    """Of each network by name, for all images of a split, which are decoded once."""
    parts: dict[str, list[dict[str, Tensor]]] = {name: [] for name in networks}
    for start in range(0, len(split), BATCH):
        inputs = network_input(split.pixels[start : start + BATCH], preprocess)
        for name, network in networks.items():
            parts[name].append(run_batches(network, inputs, BATCH))
    return {
        name: {output: torch.cat([part[output] for part in found]) for output in found[0]}
        for name, found in parts.items()
    }


def evaluate_runs(runs: Sequence[Path], moved: MovedData, say: Say) -> list[dict[str, Any]]:
    """The same for every finished run of a folder; of one that is not, that is said."""
    found = []
    for run in runs:
        try:
            found.append({"run": run.name, **evaluate_run(run, moved)})
        except UserError as error:
            say(str(error))
    if not found:
        raise UserError(f"{runs[0].parent}: none of its {len(runs)} runs can be evaluated.")
    return found


def row(result: dict[str, Any]) -> dict[str, str]:
    """Of one run, for a table of several."""
    shares = {name: result.get(name) for name in ("student_accuracy", "teacher_accuracy", "agreement")}
    told = {name.replace("_", " "): "–" if value is None else f"{100 * value:.2f} %" for name, value in shares.items()}
    ratios = [value for value in result.get("snr_db", {}).values() if value is not None]
    return {
        "run": result["run"],
        "images": str(result["images"]),
        **told,
        "least SNR": f"{min(ratios):.1f} dB" if ratios else "–",
    }


def _snr_db(found: Tensor, wanted: Tensor) -> float | None:
    """10 log10 of the power of `wanted` over that of the difference; None where there is no difference or no signal."""
    noise, signal = ((values.double() ** 2).sum() for values in (found - wanted, wanted))
    return float(10 * torch.log10(signal / noise)) if noise > 0 and signal > 0 else None
