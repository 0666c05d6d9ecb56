"""The proof that nothing was lost on the way, of a whole bundle.

docs/proof.md says what is compared with what, and the bounds; verify_layers.py compares a student's file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from faqd import bundle as names
from faqd.bundle import Bundle
from faqd.cpu import cpu_kind, cpu_model, instruction_sets
from faqd.deploy.export.teacher_float16 import TEACHER_IMAGES, run_stored
from faqd.deploy.export.uint8_input import compare_preprocessing, without_preprocessing
from faqd.deploy.onnx_model.integer_sums import integer_sums
from faqd.deploy.onnx_model.session import OnnxSession
from faqd.deploy.onnx_model.session import version as onnxruntime_version
from faqd.deploy.verify.agreement import agreement_failures, float16_failures
from faqd.deploy.verify.bundle_networks import flavours_in, load_network, refuse_other_files, torch_digests
from faqd.deploy.verify.float16 import changed, verify_float16
from faqd.deploy.verify.layers import trace_of, verify_trace
from faqd.deploy.verify.outputs import Outputs, compare_outputs, float_snr_db, outputs_of
from faqd.deploy.verify.segments import Trace, place_of
from faqd.deploy.verify.test_vectors import probe_inputs
from faqd.errors import UserError
from faqd.fidelity import compared_with_teacher
from faqd.files import read_json, sha256
from faqd.proof import FORMAT, STUDENTS, VERSION, proof_of
from faqd.quant import Target

CEIL_NOTE = (
    "activations are rounded up: the TensorRT flavour does so exactly, by its biases; the onnxruntime flavour rounds "
    "sums and convolution outputs in between, so that its agreement is reported and no bound."
)
PIXEL_PROBES = 16
"""Evaluation images on which preprocessing inside networks is compared, and as many of noise."""
AGREEMENT_IMAGES = 2000
FLOAT_SNR_DB = 60
"""Least signal-to-noise ratio of a float network's file to torch: sums of floats in another order lie far above."""

FILES: dict[Target, str] = {"tensorrt": names.STUDENT_TENSORRT_FP32, "onnxruntime": names.STUDENT_ONNXRUNTIME}
"""By flavour, what the exact gates run on."""
_FLAVOUR_OF: dict[str, Target] = {file: flavour for files in (FILES, STUDENTS) for flavour, file in files.items()}


def verified(bundle: Bundle) -> dict[str, Any]:
    """The record that verify.json is to hold; `passed` says whether every bound held. What an earlier one knows of
    other CPUs stays."""
    record = verification(bundle)
    for flavour, verdict in record["flavours"].items():
        if verdict["passed"] and proof_of(bundle, flavour).status in ("passed", "elsewhere"):
            earlier = read_json(bundle.folder / names.VERIFY)["flavours"][flavour]["cpu_kinds"]
            verdict["cpu_kinds"] = sorted({*earlier, *verdict["cpu_kinds"]})
    return record


@np.errstate(over="ignore", invalid="ignore")
def verification(bundle: Bundle) -> dict[str, Any]:
    """The record alone. Numbers that are not finite are judged, and nothing is said of them on the way.

    What fails in the networks beside the student, or in the bundle's data, fails in every flavour; what fails in the
    file of one says nothing of the other.
    """
    refuse_other_files(bundle)
    evaluation = bundle.evaluation()
    inputs, driven = probe_inputs(evaluation.images, bundle.preprocess.normalise)
    images = bundle.network_input(evaluation.images[: agreement_images(evaluation.teacher)])
    record = _facts(bundle, len(inputs), driven)
    failures: list[str] = []
    own: dict[str, list[str]] = {}
    outputs = _verify_flavours(bundle, record, own, inputs, driven, images, evaluation.teacher)
    if bundle.takes_pixels:
        record["preprocessing"] = _verify_preprocessing(bundle, evaluation.images[:PIXEL_PROBES])
        for name, compared in record["preprocessing"].items():
            if not compared["equal"]:
                concerned = own[_FLAVOUR_OF[name]] if name in _FLAVOUR_OF else failures
                concerned.append(f"{name}: input: its preprocessing is not the record's")
    if bundle.has(names.STUDENT_DEEPSTREAM):
        own["tensorrt"] += _deepstream_failures(bundle, evaluation.images[:PIXEL_PROBES])
    if len(outputs) == 2:
        record["between_flavours"] = compare_outputs(outputs["onnxruntime"], outputs["tensorrt"])
    told = agreement_failures(
        outputs,
        evaluation.teacher,
        record["rounding"],
        as_trained=record["as_trained"],
        between_flavours=record.get("between_flavours"),
    )
    for flavour, texts in told.items():
        own[flavour] += [f"{flavour}: {text}" for text in texts]
    failures += _verify_float_networks(bundle, record, inputs, driven, images)
    failures += _evaluation_failures(bundle, images, evaluation.teacher)
    for name, result in record["flavours"].items():
        result["passed"] = not failures and not own[name]
    record["failures"] = [text for texts in own.values() for text in texts] + failures
    record["passed"] = not record["failures"]
    return record


def _facts(bundle: Bundle, probes: int, driven: int) -> dict[str, Any]:
    """What the record says of the bundle, the probes and this machine; of the flavours nothing yet."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "manifest_sha256": sha256(bundle.folder / names.MANIFEST),
        "onnx_sha256": {name: bundle.manifest["files"][name]["sha256"] for name in bundle.onnx_files()},
        "cpu": {"model": cpu_model(), "instruction_sets": instruction_sets(), "kind": cpu_kind()},
        "onnxruntime": onnxruntime_version,
        "probe_images": probes,
        "driven_probes": driven,
        "flavours": {},
        "fidelity": {},
        "as_trained": bundle.manifest.get("as_trained"),
        "rounding": bundle.manifest.get("rounding"),
    }


def _verify_flavours(
    bundle: Bundle,
    record: dict[str, Any],
    own: dict[str, list[str]],
    inputs: NDArray[np.float32],
    driven: int,
    images: NDArray[Any],
    teacher: Outputs,
) -> dict[Target, Outputs]:
    """Adds what was found of the student's files to the record, and what failed of each to `own`; returns their
    outputs for `images`."""
    outputs: dict[Target, Outputs] = {}
    for flavour in flavours_in(bundle):
        trace, result, modes = _verify_flavour(bundle, flavour, inputs, driven)
        record["flavours"][flavour] = result
        own[flavour] = [f"{flavour}: {text}" for text in result["failures"]]
        outputs[flavour] = outputs_of(OnnxSession(bundle.path(FILES[flavour]), optimise=modes[-1]), images)
        record["fidelity"][FILES[flavour]] = _fidelity(bundle, FILES[flavour], outputs[flavour], teacher)
        if flavour == "tensorrt":
            half = outputs_of(OnnxSession(bundle.path(names.STUDENT_TENSORRT), optimise=False), images)
            found = record["float16"] = verify_float16(bundle, trace, half, outputs[flavour])
            found["failures"] += float16_failures(outputs[flavour], teacher, found["outputs"])
            own[flavour] += found["failures"]
            record["fidelity"][names.STUDENT_TENSORRT] = _fidelity(bundle, names.STUDENT_TENSORRT, half, teacher)
    return outputs


def _fidelity(bundle: Bundle, file: str, found: Outputs, teacher: Outputs) -> dict[str, Any]:
    _refuse_other_outputs(bundle, file, list(found), teacher)
    for name, values in teacher.items():
        if found[name].shape[1:] != values.shape[1:]:
            raise UserError(f"{bundle.path(file)}: its output {name} is not of the teacher's shape; export again.")
    return compared_with_teacher(found, teacher, bundle.branches)


def _verify_flavour(
    bundle: Bundle, flavour: Target, inputs: NDArray[np.float32], driven: int
) -> tuple[Trace, dict[str, Any], list[bool]]:
    """The run of the reference, what was found layer by layer, and how onnxruntime ran the file (optimised or not)."""
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
    result = verify_trace(trace, model, digests, modes)
    # As written, onnxruntime multiplies floats: only optimised it has kernels that saturate.
    sums = integer_sums(model) if True in modes else []
    saturating = [place_of(found.node) or found.node.name for found in sums if found.saturates]
    result |= {
        "integer_sums": {
            "layers": len(sums),
            "largest_pair": max((found.largest_sum for found in sums), default=0),
            "saturating": saturating,
        },
        "every_cpu": not saturating,
        "cpu_kinds": [cpu_kind()],
    }
    return trace, result, modes


def _verify_float_networks(
    bundle: Bundle, record: dict[str, Any], inputs: NDArray[np.float32], driven: int, images: NDArray[Any]
) -> list[str]:
    """Adds what was found of the float student and of the teacher to the record; returns what failed."""
    in_torch = bundle.probe_outputs()
    kinds = np.split(np.arange(len(inputs) - driven), 3)
    record["float_student"] = _against_torch(bundle, names.FLOAT_STUDENT, inputs, in_torch["student"], kinds)
    record["teacher"] = _against_torch(bundle, names.TEACHER, inputs, in_torch["teacher"], kinds)
    failures: list[str] = record["float_student"]["failures"] + record["teacher"]["failures"]
    for half, full in ((names.FLOAT_STUDENT_FP16, names.FLOAT_STUDENT), (names.TEACHER_FP16, names.TEACHER)):
        if bundle.has(half):
            failures += [f"{half}: {text}" for text in changed(load_network(bundle, half), load_network(bundle, full))]
    if bundle.has(names.TEACHER_FP16):
        try:
            record["teacher_float16"] = _teacher_in_float16(bundle, images[:TEACHER_IMAGES])
        except UserError as error:
            failures.append(f"{names.TEACHER_FP16}: {error}")
    return failures


def _verify_preprocessing(bundle: Bundle, images: NDArray[np.uint8]) -> dict[str, Any]:
    """Per ONNX file, its own preprocessing against the record's: bit for bit, on images and on noise."""
    noise = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    pixels = np.concatenate([images, noise])
    wanted, fed = bundle.preprocess.normalise(pixels), bundle.network_input(pixels)
    taking = [name for name in bundle.onnx_files() if name != names.STUDENT_DEEPSTREAM]
    return {name: compare_preprocessing(load_network(bundle, name), fed, wanted) for name in taking}


def _deepstream_failures(bundle: Bundle, images: NDArray[np.uint8]) -> list[str]:
    """What keeps the file for DeepStream from being the student's behind the record's normalisation, bit for bit."""
    name = names.STUDENT_DEEPSTREAM
    model, student = load_network(bundle, name), load_network(bundle, names.STUDENT_TENSORRT)
    student = without_preprocessing(student) if bundle.takes_pixels else student
    pixels = np.concatenate([images, np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)])
    fed = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32)
    failures = [] if _parts(without_preprocessing(model)) == _parts(student) else [f"{name}: another network inside"]
    if not compare_preprocessing(model, fed, bundle.preprocess.normalise(pixels))["equal"]:
        failures.append(f"{name}: input: its preprocessing is not the record's")
    return failures


def _parts(model: onnx.ModelProto) -> tuple[list[bytes], ...]:
    """What a network computes, whatever shapes are written beside it."""
    graph = model.graph
    nodes = [node.SerializeToString(deterministic=True) for node in graph.node]
    constants = sorted(tensor.SerializeToString(deterministic=True) for tensor in graph.initializer)
    return nodes, constants, [value.name.encode() for value in (*graph.input, *graph.output)]


def _against_torch(
    bundle: Bundle, file: str, inputs: NDArray[np.float32], wanted: Outputs, kinds: list[NDArray[np.intp]]
) -> dict[str, Any]:
    """A float network's file against what torch gave for the probes: of the signal-to-noise ratios on each kind of them
    the worst, since large values of one would hide errors of another. Probes at which torch's floats overflowed tell
    nothing."""
    model = load_network(bundle, file)
    model = without_preprocessing(model) if bundle.takes_pixels else model
    _refuse_other_outputs(bundle, file, [value.name for value in model.graph.output], wanted)
    found = outputs_of(OnnxSession(model.SerializeToString()), inputs[: max(map(len, wanted.values()))])
    snr: dict[str, float | None] = {}
    for name, values in wanted.items():
        if found[name].shape[1:] != values.shape[1:]:
            raise UserError(f"{bundle.path(file)}: its output {name} is not of the shape of torch's; export again.")
        finite = np.flatnonzero(np.isfinite(values.reshape(len(values), -1)).all(1))
        ratios = [
            float_snr_db(found[name][rows], values[rows], bundle.is_probability(name))
            for kind in kinds
            if len(rows := np.intersect1d(kind, finite))
        ]
        snr[name] = min((ratio for ratio in ratios if ratio is not None), default=None)
    return {"images": max(map(len, wanted.values())), "snr_db": snr, "failures": _too_far(file, snr)}


def _evaluation_failures(bundle: Bundle, images: NDArray[Any], wanted: Outputs) -> list[str]:
    """Whether the teacher's file gives what eval.npz says of it, for the images that whole outputs are compared on."""
    found = outputs_of(OnnxSession(bundle.path(names.TEACHER)), images)
    _refuse_other_outputs(bundle, names.TEACHER, list(found), wanted)
    rows = {name: min(len(images), len(values)) for name, values in wanted.items()}
    snr = {
        name: float_snr_db(found[name][:n], wanted[name][:n], bundle.is_probability(name))
        if found[name].shape[1:] == wanted[name].shape[1:]
        else -np.inf
        for name, n in rows.items()
    }
    return [f"{names.EVAL}: {text}" for text in _too_far(names.TEACHER, snr)]


def _refuse_other_outputs(bundle: Bundle, file: str, found: list[str], wanted: Outputs) -> None:
    if set(found) != set(wanted):
        raise UserError(f"{bundle.folder}: holds no values of torch for each output of {file}; export the run again.")


def _too_far(file: str, snr_by_output: dict[str, float | None]) -> list[str]:
    return [
        f"{file} is {snr:.0f} dB from torch's {name}, at least {FLOAT_SNR_DB} are needed"
        for name, snr in snr_by_output.items()
        if snr is not None and snr < FLOAT_SNR_DB
    ]


def _teacher_in_float16(bundle: Bundle, images: NDArray[Any]) -> dict[str, Any]:
    """What FP16 does to the teacher's outputs: its FP16 file, each tensor stored in FP16, against its FP32 file."""
    half = load_network(bundle, names.TEACHER_FP16)
    return compare_outputs(run_stored(half, images), outputs_of(OnnxSession(bundle.path(names.TEACHER)), images))


def agreement_images(teacher: Outputs) -> int:
    """How many evaluation images whole outputs are compared on: no more than dense outputs were stored for."""
    return min(AGREEMENT_IMAGES, max(len(values) for values in teacher.values()))
