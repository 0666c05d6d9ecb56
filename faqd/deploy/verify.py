"""The proof that nothing was lost on the way, of a whole bundle.

docs/proof.md says what is compared with what, and the bounds; verify_layers.py compares a student's file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd import bundle as names
from faqd.bundle import Bundle
from faqd.deploy.bundle_networks import flavours, load_network, refuse_incomplete, torch_digests
from faqd.deploy.onnx_session import OnnxSession
from faqd.deploy.probes import probe_inputs
from faqd.deploy.teacher_float16 import TEACHER_IMAGES, run_stored
from faqd.deploy.uint8_input import compare_preprocessing, without_preprocessing
from faqd.deploy.verify_float16 import changed, verify_float16
from faqd.deploy.verify_layers import trace_of, verify_trace
from faqd.deploy.whole_outputs import Outputs, compare_outputs, outputs_of
from faqd.errors import UserError
from faqd.files import sha256, write_json

FORMAT = "faqd-verify"
VERSION = 1

CEIL_NOTE = (
    "activations are rounded up: the TensorRT flavour does so exactly, by its biases; the onnxruntime flavour rounds "
    "sums and convolution outputs in between, so that its agreement is reported and no bound."
)
TEACHER_PROBES = 16
"""Evaluation images on which the teacher's file is held against torch."""
AGREEMENT_IMAGES = 2000
FLOAT_SNR_DB = 60
"""Least signal-to-noise ratio of a float network's file to torch: sums of floats in another order lie far above."""

FILES = {"tensorrt": names.STUDENT_TENSORRT_FP32, "onnxruntime": names.STUDENT_ONNXRUNTIME}
"""By flavour, what the exact gates run on."""


def verify_bundle(bundle: Bundle) -> dict[str, Any]:
    """Verify a bundle and write its verify.json. Returns the record; `passed` says whether every bound held."""
    record = verification(bundle)
    write_json(bundle.folder / names.VERIFY, record)
    return record


@np.errstate(over="ignore", invalid="ignore")
def verification(bundle: Bundle) -> dict[str, Any]:
    """The record alone. Numbers that are not finite are judged, and nothing is said of them on the way."""
    refuse_incomplete(bundle)
    evaluation = bundle.evaluation()
    inputs, driven = probe_inputs(evaluation.images, bundle.preprocess.normalise)
    images = bundle.network_input(evaluation.images[: agreement_images(evaluation.teacher)])
    results: dict[str, Any] = {}
    record: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "manifest_sha256": sha256(bundle.folder / names.MANIFEST),
        "onnx_sha256": {name: bundle.manifest["files"][name]["sha256"] for name in bundle.onnx_files()},
        "probe_images": len(inputs),
        "driven_probes": driven,
        "flavours": results,
        "as_trained": bundle.manifest.get("as_trained"),
        "rounding": bundle.manifest.get("rounding"),
    }
    failures: list[str] = []
    outputs: dict[str, Outputs] = {}
    for flavour in flavours(bundle):
        model = load_network(bundle, FILES[flavour])
        if bundle.takes_pixels:
            model = without_preprocessing(model)
        digests = torch_digests(bundle, flavour)
        if digests["driven"] != driven:
            raise UserError(f"{bundle.folder}: made with other probes than this faqd's; export the run again.")
        trace = trace_of(model, inputs, digests)
        # onnxruntime's optimizer rounds float biases to int32 when it fuses, so that only the flavour which stores
        # int32 biases keeps its arithmetic under optimization.
        modes = [False, True] if flavour == "onnxruntime" else [False]
        results[flavour] = verify_trace(trace, model, digests, modes)
        failures += [f"{flavour}: {text}" for text in results[flavour]["failures"]]
        outputs[flavour] = outputs_of(OnnxSession(bundle.path(FILES[flavour]), optimise=modes[-1]), images)
        if flavour == "tensorrt":
            record["float16"] = verify_float16(bundle, trace, images, outputs[flavour])
            failures += record["float16"]["failures"]
    if bundle.takes_pixels:
        record["preprocessing"] = _verify_preprocessing(bundle, evaluation.images[:TEACHER_PROBES])
        failures += [
            f"{name}: input: its preprocessing is not the record's"
            for name, compared in record["preprocessing"].items()
            if not compared["equal"]
        ]
    if len(outputs) == 2:
        record["between_flavours"] = compare_outputs(outputs["onnxruntime"], outputs["tensorrt"])
    record["float_student"] = _against_torch(bundle, names.FLOAT_STUDENT, images, bundle.float_outputs())
    record["teacher"] = _against_torch(bundle, names.TEACHER, images[:TEACHER_PROBES], evaluation.teacher)
    failures += record["float_student"]["failures"] + record["teacher"]["failures"]
    for half, full in ((names.FLOAT_STUDENT_FP16, names.FLOAT_STUDENT), (names.TEACHER_FP16, names.TEACHER)):
        if bundle.has(half):
            failures += [f"{half}: {text}" for text in changed(load_network(bundle, half), load_network(bundle, full))]
    if bundle.has(names.TEACHER_FP16):
        try:
            record["teacher_float16"] = _teacher_in_float16(bundle, images[:TEACHER_IMAGES])
        except UserError as error:
            failures.append(f"{names.TEACHER_FP16}: {error}")
    record["failures"] = failures
    record["passed"] = not failures
    return record


def _verify_preprocessing(bundle: Bundle, images: NDArray[np.uint8]) -> dict[str, Any]:
    """Per ONNX file, its own preprocessing against the record's: bit for bit, on images and on noise."""
    noise = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    pixels = np.concatenate([images, noise])
    wanted, fed = bundle.preprocess.normalise(pixels), bundle.network_input(pixels)
    return {name: compare_preprocessing(load_network(bundle, name), fed, wanted) for name in bundle.onnx_files()}


def _against_torch(bundle: Bundle, file: str, images: NDArray[Any], wanted: Outputs) -> dict[str, Any]:
    """A float network's file against what torch gave for the same images."""
    load_network(bundle, file)
    images = images[: max((len(values) for values in wanted.values()), default=1)]
    found = outputs_of(OnnxSession(bundle.path(file)), images)
    for name, values in found.items():
        if name not in wanted or wanted[name].shape[1:] != values.shape[1:]:
            raise UserError(
                f"{bundle.folder}: holds no values of torch for the output {name} of {file}, or of another shape; "
                "export the run again."
            )
    rows = {name: min(len(values), len(wanted[name])) for name, values in found.items()}
    compared = compare_outputs(
        {name: found[name][:n] for name, n in rows.items()}, {name: wanted[name][:n] for name, n in rows.items()}
    )
    failures = [
        f"{file} is {snr:.0f} dB from torch's {name}, at least {FLOAT_SNR_DB} are needed"
        for name, snr in compared["snr_db"].items()
        if snr is not None and snr < FLOAT_SNR_DB
    ]
    return {**compared, "failures": failures}


def _teacher_in_float16(bundle: Bundle, images: NDArray[Any]) -> dict[str, Any]:
    """What FP16 does to the teacher's outputs: its FP16 file, each tensor stored in FP16, against its FP32 file."""
    half = load_network(bundle, names.TEACHER_FP16)
    return compare_outputs(run_stored(half, images), outputs_of(OnnxSession(bundle.path(names.TEACHER)), images))


def agreement_images(teacher: Outputs) -> int:
    """How many evaluation images whole outputs are compared on: no more than dense outputs were stored for."""
    return min(AGREEMENT_IMAGES, max(len(values) for values in teacher.values()))
