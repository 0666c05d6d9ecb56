"""What a run is worth on the eval split: the deployed integers for a student, the float network for a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from faqd.quant import FLOAT_BITS
from faqd.train.convert import convert
from faqd.train.data import load_dataset
from faqd.train.prepare import Student
from faqd.train.run import data_options, finished, load_teacher, network_input, run_preprocess
from faqd.train.student import load_student

BATCH = 250


@torch.no_grad()
def outputs(network: Any, inputs: Tensor) -> Tensor:
    """float32 outputs of `network` for all of `inputs`, in batches."""
    return torch.cat([network(batch).float() for batch in inputs.split(BATCH)])


def deployable(student: Student) -> Any:
    """What a student's accuracy is measured on: its integers, or the network itself where activations are float."""
    return student.network if student.bits.activations == FLOAT_BITS else convert(student, "tensorrt")


def evaluate_run(folder: Path, data_root: Path | None) -> dict[str, Any]:
    """Accuracy and, for a student, agreement with the teacher, on the eval split.

    Without accuracy where the data has no labels, or other classes than the network has outputs.
    """
    record = finished(folder)
    dataset = load_dataset(data_options(record, data_root), with_labels=True)
    split = dataset.eval
    inputs = network_input(split.images, run_preprocess(record))
    teacher, _, _ = load_teacher(folder)
    wanted = outputs(teacher, inputs)
    result: dict[str, Any] = {"images": len(inputs)}
    measured = {"teacher": wanted}
    if record["kind"] == "distill":
        measured = {"student": outputs(deployable(load_student(folder)), inputs), "teacher": wanted}
    if split.labels is not None and wanted.shape[1:] != (len(dataset.classes or ()),):
        result["no_accuracy"] = f"outputs {tuple(wanted.shape[1:])}, classes of the data {len(dataset.classes or ())}"
    elif split.labels is not None:
        labels = torch.from_numpy(split.labels)
        for name, values in measured.items():
            result[f"{name}_accuracy"] = round(float((values.argmax(1) == labels).float().mean()), 6)
    if "student" in measured:
        agreement = (measured["student"].argmax(1) == wanted.argmax(1)).float().mean()
        result["agreement"] = round(float(agreement), 6)
    return result
