"""Outputs of whole networks against each other."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.at_once import images_at_once
from faqd.deploy.onnx_model.session import OnnxSession

Outputs = dict[str, NDArray[np.float32]]
"""A network's outputs by name, images first."""
BATCH = 250
PROBABILITY_ERROR = 1e-6
NO_SIGNAL_DB = -400.0
"""Stands for numbers that are not finite as well: JSON has none of those."""


def outputs_of(session: OnnxSession, inputs: NDArray[Any]) -> Outputs:
    name = next(iter(session.inputs))
    step = images_at_once(inputs.shape[1:3] if inputs.dtype == np.uint8 else inputs.shape[2:], BATCH)
    parts = [session.run({name: inputs[i : i + step]}) for i in range(0, len(inputs), step)]
    return {output: np.concatenate([part[output] for part in parts]).astype(np.float32) for output in session.outputs}


def compare_outputs(found: Outputs, wanted: Outputs) -> dict[str, Any]:
    """Signal-to-noise ratio of each output in dB (None where equal), and for the first output of class scores the share
    of equal top-1 answers; n images."""
    result: dict[str, Any] = {
        "images": max(len(values) for values in found.values()),
        "snr_db": {name: snr_db(found[name], values) for name, values in wanted.items()},
    }
    scores = next((name for name, values in wanted.items() if values.ndim == 2), None)
    if scores is not None:
        result["top1_agreement"] = float(np.mean(found[scores].argmax(1) == wanted[scores].argmax(1)))
    return result


def float_snr_db(found: NDArray[Any], wanted: NDArray[Any], is_probability: bool) -> float | None:
    """The same for a float network's file and torch, whose sums differ in order; None too where probabilities are so
    near that onnxruntime's sigmoid explains it, which has an absolute error: of an output that is almost zero the
    ratio would judge nothing else."""
    if is_probability and np.abs(found.astype(np.float64) - wanted).max(initial=0.0) <= PROBABILITY_ERROR:
        return None
    return snr_db(found, wanted)


def snr_db(found: NDArray[Any], wanted: NDArray[Any]) -> float | None:
    """10 log10 of the sum of squares over that of the differences; None where there is no difference, NO_SIGNAL_DB
    where nothing of the signal is left, or there is none."""
    noise = float(np.square(found.astype(np.float64) - wanted).sum())
    signal = float(np.square(wanted.astype(np.float64)).sum())
    if noise == 0:
        return None
    return float(10 * np.log10(signal / noise)) if 0 < signal < np.inf and noise < np.inf else NO_SIGNAL_DB
