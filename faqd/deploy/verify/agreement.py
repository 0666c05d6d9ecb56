"""Floors for whole outputs: arithmetic may be right in every layer, and nothing of the network be left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.deploy.verify.outputs import Outputs, snr_db
from faqd.quant import Target

LOWEST_DB, HIGHEST_DB = 3.0, 30.0
BESIDE_TEACHER_DB = 3.0
"""Two forms of a student have to be as close to each other as it is to its teacher, less this, within LOWEST_DB and
HIGHEST_DB: what one form rounds beside the other may cost no more than the quantization itself. A fixed bound would not
do: in a deep network that quantization has made chaotic, single codes at ties move outputs by 15 dB."""
BETWEEN_FLAVOURS_DB = 8.0
"""The same between the flavours: where sums could saturate, onnxruntime's file has weights of one bit less. Their error
is four times that of the student's own, five times with it: 7 dB, and a little for few images."""
FEWEST_IMAGES = 64
"""On which a correlation says something: fewer leave a poor student one below zero by chance."""


def agreement_failures(
    outputs: dict[Target, Outputs],
    teacher: Outputs,
    rounding: str | None,
    *,
    as_trained: dict[str, Any] | None = None,
    between_flavours: dict[str, Any] | None = None,
) -> dict[Target, list[str]]:
    """By flavour, what is wrong with its outputs for the evaluation images.

    rounding: of activations, in training. The others are comparisons as `compare_outputs` makes them, where there are
    any: the student in training with the first flavour, and the two flavours.
    """
    failures: dict[Target, list[str]] = {
        flavour: [*_constant(found, teacher), *_unlike(found, teacher)] for flavour, found in outputs.items()
    }
    first = next(iter(outputs))
    least = _least_by_output(outputs[first], teacher, BESIDE_TEACHER_DB)
    # The file for onnxruntime rounds what it adds, behind which rounding up is another function: no bound for it.
    if as_trained is not None and (first == "tensorrt" or rounding != "ceil"):
        failures[first] += _too_far(as_trained["snr_db"], least, "the student as it was trained")
    if between_flavours is not None and rounding != "ceil":
        least = _least_by_output(outputs[first], teacher, BETWEEN_FLAVOURS_DB)
        failures["onnxruntime"] += _too_far(between_flavours["snr_db"], least, "that of the TensorRT file")
    return failures


def float16_failures(found: Outputs, teacher: Outputs, float16: dict[str, Any]) -> list[str]:
    """What is wrong with the outputs of the FP16 file that engines are built from. found: those of the FP32 file;
    float16: the comparison of the two."""
    least = _least_by_output(found, teacher, BESIDE_TEACHER_DB)
    return [*_too_far(float16["snr_db"], least, "that of the FP32 file in the FP16 file")]


def _least_by_output(found: Outputs, teacher: Outputs, less_db: float) -> dict[str, float]:
    return {name: _least(values, teacher.get(name), less_db) for name, values in found.items()}


def _least(found: NDArray[Any], teacher: NDArray[Any] | None, less_db: float) -> float:
    rows = 0 if teacher is None else min(len(found), len(teacher))
    to_teacher = snr_db(found[:rows], teacher[:rows]) if teacher is not None and rows else None
    return HIGHEST_DB if to_teacher is None else min(max(to_teacher - less_db, LOWEST_DB), HIGHEST_DB)


def _too_far(snr_by_output: dict[str, float | None], least: dict[str, float], other: str) -> Iterator[str]:
    for name, snr in snr_by_output.items():
        if snr is not None and snr < least[name]:
            yield (
                f"the output {name} is {snr:.1f} dB from {other}, at least {least[name]:.1f} are needed, about what "
                "the student is from its teacher"
            )


def _constant(found: Outputs, teacher: Outputs) -> Iterator[str]:
    """Outputs that no longer depend on the image, where the teacher's do: all that an image makes of the network is
    rounded or limited away."""
    for name, values in found.items():
        if name in teacher and len(values) > 1 and _is_constant(values) and not _is_constant(teacher[name]):
            yield f"the output {name} is the same for all {len(values)} images, and the teacher's is not"


def _is_constant(values: NDArray[Any]) -> bool:
    return bool((values == values[:1]).all())


def _unlike(found: Outputs, teacher: Outputs) -> Iterator[str]:
    """Outputs of which what the images change does not go with what they change of the teacher's."""
    for name, values in found.items():
        rows = min(len(values), len(teacher.get(name, ())))
        correlation = _correlation(values[:rows], teacher[name][:rows]) if rows >= FEWEST_IMAGES else None
        if correlation is not None and correlation <= 0:
            yield (
                f"the output {name} has nothing of the teacher's left: what changes from image to image has a "
                f"correlation of {correlation:.2f} over {rows} images"
            )


def _correlation(found: NDArray[Any], wanted: NDArray[Any]) -> float | None:
    """Of what differs from the mean over the images; None where one of them has no such thing, or no finite one."""
    a, b = (values.astype(np.float64) - values.mean(0, dtype=np.float64) for values in (found, wanted))
    scale = np.sqrt(np.square(a).sum() * np.square(b).sum())
    return float((a * b).sum() / scale) if 0 < scale < np.inf else None
