"""The proof that nothing was lost on the way: referee, torch and onnxruntime held against each other.

docs/proof.md says what is compared with what, and the bounds.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from faqd import bundle as names
from faqd.bundle import Bundle
from faqd.deploy.bundle_networks import load_network, torch_digests
from faqd.deploy.onnx_session import OnnxSession
from faqd.deploy.referee import Referee, Value, stored
from faqd.deploy.segments import Segment, segments
from faqd.deploy.teacher_float16 import TEACHER_IMAGES, run_stored
from faqd.deploy.ties import distinct_roundings
from faqd.deploy.uint8_input import compare_preprocessing, without_preprocessing
from faqd.deploy.verify_float16 import changed, verify_float16
from faqd.deploy.whole_outputs import Outputs, compare_outputs, outputs_of
from faqd.errors import UserError
from faqd.files import sha256, write_json
from faqd.reference import real

FORMAT = "faqd-verify"
VERSION = 1

EQUAL_CODES = 0.9999
"""Least share of all codes on which onnxruntime and the referee agree; no code may differ by more than one."""
CHANCE = 1e-6
"""How rarely a layer whose codes differ at just that rate may be refused: rounding ties come by chance, and two among
the 16,384 codes of a small layer say nothing of its rate. See `tolerated`."""
OUTPUT_ERROR = 1e-4
"""Largest difference of a float output, relative to its root mean square."""
FLOAT32_BITS = 24
FLOAT_LAYER_BITS = 10
"""Significant bits of the outputs that torch and the referee must have equal: all of float32, but ten where a layer was
excluded and sums floats, whose last bits depend on the order. At ten bits two right sums are told apart about once in
1e11 values."""
CEIL_NOTE = (
    "activations are rounded up: the TensorRT flavour does so exactly, by its biases; the onnxruntime flavour rounds "
    "sums and convolution outputs in between, so that its agreement is reported and no bound."
)
PROBES = 16
"""Evaluation images among the probe inputs; half as many enlarged fourfold and half as many of noise join them."""
PROBE_PIXELS = 224 * 224
ENLARGED = 4.0
AGREEMENT_IMAGES = 2000
MOST_VALUES = 2**29
"""Of one tensor for all probe images: 4 GiB in the referee's float64."""
FLOAT_SNR_DB = 60
"""Least signal-to-noise ratio of a float network's file to torch: sums of floats in another order lie far above."""

FLAVOURS = {"tensorrt": names.STUDENT_TENSORRT_FP32, "onnxruntime": names.STUDENT_ONNXRUNTIME}


def probe_inputs(bundle_images: NDArray[np.uint8], normalise: Any) -> NDArray[np.float32]:
    """Network inputs that reach beyond every clip: images, enlarged images, and noise of the same reach; of images
    larger than PROBE_PIXELS fewer, because the referee holds every tensor of all of them."""
    height, width = bundle_images.shape[1:3]
    count = max(2, min(PROBES, PROBES * PROBE_PIXELS // (height * width)))
    images = normalise(bundle_images[:count])
    enlarged = images[: count // 2] * np.float32(ENLARGED)
    reach = np.abs(enlarged).max()
    noise = np.random.default_rng(0).uniform(-reach, reach, enlarged.shape).astype(np.float32)
    return np.concatenate([images, enlarged, noise])


def digest(values: NDArray[Any], bits: int = FLOAT32_BITS) -> str:
    """SHA-256 of a tensor, so that equal means every value equal: codes (zero point removed) as int16, the network's
    own outputs as float32 without negative zeros, rounded to `bits` significant bits."""
    if values.dtype.kind != "f":
        return hashlib.sha256(values.astype("<i2").tobytes()).hexdigest()
    mantissa, exponent = np.frexp(values.astype(np.float64))
    rounded = np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)
    return hashlib.sha256((rounded.astype("<f4") + np.float32(0)).tobytes()).hexdigest()


def verify_bundle(bundle: Bundle) -> dict[str, Any]:
    """Verify a bundle and write its verify.json. Returns the record; `passed` says whether every bound held."""
    record = verification(bundle)
    write_json(bundle.folder / names.VERIFY, record)
    return record


def verification(bundle: Bundle) -> dict[str, Any]:
    evaluation = bundle.evaluation()
    inputs = probe_inputs(evaluation.images, bundle.preprocess.normalise)
    images = bundle.network_input(evaluation.images[: agreement_images(evaluation.teacher)])
    flavours: dict[str, Any] = {}
    outputs: dict[str, Outputs] = {}
    for flavour, file in FLAVOURS.items():
        if not bundle.has(file):
            continue
        model = load_network(bundle, file)
        if bundle.takes_pixels:
            model = without_preprocessing(model)
        _refuse_oversized(model, len(inputs))
        # onnxruntime's optimizer rounds float biases to int32 when it fuses, so that only the flavour which stores
        # int32 biases keeps its arithmetic under optimization.
        modes = [False, True] if flavour == "onnxruntime" else [False]
        flavours[flavour] = verify_file(model, inputs, torch_digests(bundle, flavour), modes)
        outputs[flavour] = outputs_of(OnnxSession(bundle.path(file), optimise=modes[-1]), images)
    record: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "onnx_sha256": {name: sha256(bundle.path(name)) for name in bundle.manifest["files"] if name.endswith(".onnx")},
        "probe_images": len(inputs),
        "flavours": flavours,
        "as_trained": bundle.manifest.get("as_trained"),
        "rounding": bundle.manifest.get("rounding"),
    }
    failures = [f"{flavour}: {text}" for flavour, result in flavours.items() for text in result["failures"]]
    if bundle.takes_pixels:
        record["preprocessing"] = _verify_preprocessing(bundle, evaluation.images[:PROBES])
        failures += [
            f"{name}: input: its preprocessing is not the record's"
            for name, compared in record["preprocessing"].items()
            if not compared["equal"]
        ]
    if len(outputs) == 2:
        record["between_flavours"] = compare_outputs(outputs["onnxruntime"], outputs["tensorrt"])
    if bundle.has(names.STUDENT_TENSORRT) and "tensorrt" in flavours:
        record["float16"] = verify_float16(bundle, inputs, images, outputs["tensorrt"])
        failures += record["float16"]["failures"]
    if "snr_db" in bundle.manifest.get("float_student", {}):
        record["float_student"] = bundle.manifest["float_student"]
        failures += _far_from_torch("float student", names.FLOAT_STUDENT, record["float_student"])
    if bundle.has(names.TEACHER):
        record["teacher"] = _verify_teacher(bundle, images[:PROBES], evaluation.teacher)
        failures += record["teacher"]["failures"]
    for half, full in ((names.FLOAT_STUDENT_FP16, names.FLOAT_STUDENT), (names.TEACHER_FP16, names.TEACHER)):
        if bundle.has(half) and bundle.has(full):
            failures += [f"{half}: {text}" for text in changed(load_network(bundle, half), load_network(bundle, full))]
    if bundle.has(names.TEACHER_FP16):
        try:
            record["teacher_float16"] = _teacher_in_float16(bundle, images[:TEACHER_IMAGES])
        except UserError as error:
            failures.append(f"{names.TEACHER_FP16}: {error}")
    record["failures"] = failures
    record["passed"] = not failures
    return record


def _refuse_oversized(model: onnx.ModelProto, images: int) -> None:
    for value in onnx.shape_inference.infer_shapes(model).graph.value_info:
        elements = images * math.prod(max(1, size.dim_value) for size in value.type.tensor_type.shape.dim)
        if elements > MOST_VALUES:
            raise UserError(
                f"tensor {value.name} has {elements:,} elements for {images} probe images; the referee holds at most "
                f"{MOST_VALUES:,} of one. Verify a smaller --image-size."
            )


def _verify_preprocessing(bundle: Bundle, images: NDArray[np.uint8]) -> dict[str, Any]:
    """Per ONNX file, its own preprocessing against the record's: bit for bit, on images and on noise."""
    noise = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    pixels = np.concatenate([images, noise])
    wanted, fed = bundle.preprocess.normalise(pixels), bundle.network_input(pixels)
    files = [name for name in bundle.manifest["files"] if name.endswith(".onnx")]
    return {name: compare_preprocessing(load_network(bundle, name), fed, wanted) for name in files}


def _verify_teacher(bundle: Bundle, images: NDArray[Any], wanted: Outputs) -> dict[str, Any]:
    """The float teacher's file against what torch gave for the same images, which eval.npz holds."""
    load_network(bundle, names.TEACHER)
    found = outputs_of(OnnxSession(bundle.path(names.TEACHER)), images)
    for name, values in found.items():
        if name not in wanted or wanted[name].shape[1:] != values.shape[1:]:
            raise UserError(f"{bundle.path(names.EVAL)}: has no teacher.{name} of that shape; export the run again.")
    rows = {name: min(len(values), len(wanted[name])) for name, values in found.items()}
    compared = compare_outputs(
        {name: found[name][:n] for name, n in rows.items()}, {name: wanted[name][:n] for name, n in rows.items()}
    )
    return {**compared, "failures": _far_from_torch("teacher", names.TEACHER, compared)}


def _far_from_torch(what: str, file: str, compared: dict[str, Any]) -> list[str]:
    return [
        f"{what}: {file} is {snr:.0f} dB from torch's {name}, at least {FLOAT_SNR_DB} are needed"
        for name, snr in compared["snr_db"].items()
        if snr is not None and not snr >= FLOAT_SNR_DB
    ]


def _teacher_in_float16(bundle: Bundle, images: NDArray[Any]) -> dict[str, Any]:
    """What FP16 does to the teacher's outputs: its FP16 file, each tensor stored in FP16, against its FP32 file."""
    half = load_network(bundle, names.TEACHER_FP16)
    return compare_outputs(run_stored(half, images), outputs_of(OnnxSession(bundle.path(names.TEACHER)), images))


def verify_file(
    model: onnx.ModelProto, inputs: NDArray[np.float32], torch_digests: dict[str, Any], modes: list[bool]
) -> dict[str, Any]:
    """One flavour: every code and output of torch against the referee, then onnxruntime layer by layer on the
    referee's inputs.

    torch_digests: `codes` by layer, `outputs` by name, and the outputs' significant bits. modes: whether onnxruntime
    optimizes. Returns {"layers": [...], "failures": [...]}, the failures of the first wrong layer first.
    """
    values = Referee(model).run({model.graph.input[0].name: inputs})
    layers, failures = [], []
    for segment in segments(model):
        wanted = values[segment.output]
        row: dict[str, Any] = {"layer": segment.layer, "tensor": segment.output}
        if real(wanted).dtype.kind == "f":
            bits = torch_digests.get("output_bits", FLOAT32_BITS)
            row["torch_equal"] = digest(real(wanted), bits) == torch_digests["outputs"].get(segment.output)
        else:
            codes = centred(model, segment.output, wanted)
            row |= _clipping(codes)
            row["torch_equal"] = digest(codes) == torch_digests["codes"].get(segment.layer)
        if not row["torch_equal"]:
            failures.append(f"{segment.layer}: the torch student and the referee differ")
        feeds = {name: stored(values[name]) for name in segment.inputs}
        for optimise in modes:
            found = OnnxSession(segment.model.SerializeToString(), optimise=optimise).run(feeds)[segment.output]
            row["optimised" if optimise else "plain"] = compared = _compare(found, wanted, segment, values)
            if not compared["passed"]:
                failures.append(_failure(segment.layer, compared, optimise))
        layers.append(row)
    failures += _missing(layers, torch_digests["codes"]) + _differing_in_all(layers)
    return {"layers": layers, "failures": failures}


def _missing(layers: list[dict[str, Any]], wanted: dict[str, str]) -> list[str]:
    found = {row["layer"] for row in layers}
    return [f"{layer}: the file has no codes of this layer" for layer in wanted if layer not in found]


def _differing_in_all(layers: list[dict[str, Any]]) -> list[str]:
    failures = []
    for mode in ("plain", "optimised"):
        compared = [row[mode] for row in layers if "codes" in row.get(mode, {})]
        differing, total = (sum(c[key] for c in compared) for key in ("roundings", "codes"))
        if differing > max(1, (1 - EQUAL_CODES) * total):
            failures.append(f"all layers: {differing} of {total} codes differ in {mode} onnxruntime")
    return failures


def centred(model: onnx.ModelProto, name: str, codes: NDArray[Any]) -> NDArray[Any]:
    """The codes of the integer tensor `name` of a run, zero point removed."""
    constants = {t.name: t for t in model.graph.initializer}
    reader = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == name)
    zero_point = onnx.numpy_helper.to_array(constants[reader.input[2]])
    return codes.astype(np.int16) - int(zero_point)


def _compare(found: NDArray[Any], wanted: Value, segment: Segment, values: dict[str, Value]) -> dict[str, Any]:
    if found.dtype.kind == "f":
        reference = real(wanted)
        error = float(np.abs(found - reference).max() / max(float(np.sqrt(np.square(reference).mean())), 1e-30))
        return {"relative_error": error, "passed": error <= OUTPUT_ERROR}
    difference = np.abs(found.astype(np.int16) - wanted.astype(np.int16))
    largest = int(difference.max(initial=0))
    roundings = distinct_roundings(segment, values, difference > 0)
    return {
        "codes": int(difference.size),
        "differing": int(np.count_nonzero(difference)),
        "roundings": roundings,
        "largest_difference": largest,
        "passed": roundings <= tolerated(difference.size) and largest <= 1,
    }


def tolerated(codes: int) -> int:
    """How many of a layer's codes may differ: the least count that rounding ties at the rate 1 - EQUAL_CODES exceed
    with a probability below CHANCE (Poisson)."""
    if not codes:
        return 0
    expected = (1 - EQUAL_CODES) * codes
    count = math.ceil(expected + 12 * math.sqrt(expected) + 12)
    at_least = 0.0
    while at_least <= CHANCE and count:
        at_least += math.exp(count * math.log(expected) - expected - math.lgamma(count + 1))
        count -= at_least <= CHANCE
    return count


def _failure(layer: str, compared: dict[str, Any], optimise: bool) -> str:
    how = "optimised" if optimise else "plain"
    if "codes" in compared:
        return (
            f"{layer}: {compared['differing']} of {compared['codes']} codes differ in {how} onnxruntime, "
            f"by up to {compared['largest_difference']}"
        )
    return f"{layer}: the float output differs by {compared['relative_error']:.2g} in {how} onnxruntime"


def _clipping(codes: NDArray[Any]) -> dict[str, float]:
    """Shares of codes at the lowest and the highest value that occur: how far the probes reach into the clips."""
    low, high = codes.min(), codes.max()
    return {
        "lowest": int(low),
        "highest": int(high),
        "share_at_lowest": round(float(np.mean(codes == low)), 6),
        "share_at_highest": round(float(np.mean(codes == high)), 6),
    }


def agreement_images(teacher: Outputs) -> int:
    """How many evaluation images whole outputs are compared on: no more than dense outputs were stored for."""
    return min(AGREEMENT_IMAGES, max(len(values) for values in teacher.values()))
