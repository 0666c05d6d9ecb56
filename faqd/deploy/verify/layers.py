"""One file of a student, layer by layer: torch, the reference and onnxruntime held against each other."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from faqd.deploy.onnx_model.session import OnnxSession
from faqd.deploy.reference.int16_kernel import emulated
from faqd.deploy.reference.values import Value
from faqd.deploy.verify.float_operators import FloatOperators, has_float_operators
from faqd.deploy.verify.floats import Floats
from faqd.deploy.verify.numbers import WEIGHTED, grids, wrong_constants
from faqd.deploy.verify.segments import Segment, Trace, place_of
from faqd.deploy.verify.test_vectors import Drive
from faqd.deploy.verify.ties import distinct_roundings
from faqd.proof import EQUAL_CODES
from faqd.reference import Grid, real

CHANCE = 1e-6
"""How rarely a layer whose codes differ at just that rate may be refused: rounding ties come by chance, and two among
the 16,384 codes of a small layer say nothing of its rate. See `tolerated`."""
OUTPUT_ERROR = 1e-4
"""Largest difference of a float output, relative to its size: see `_size`."""
INT32 = 2**31
FLOAT32_BITS = 24
FLOAT_LAYER_BITS = 10
"""Significant bits of the outputs that torch and the reference must have equal: all of float32, but ten where a layer
was excluded and sums floats, whose last bits depend on the order. At ten bits two right sums are told apart about once
in 1e11 values."""


def digest(values: NDArray[Any], bits: int = FLOAT32_BITS) -> str:
    """SHA-256 of a tensor, so that equal means every value equal: codes (zero point removed) as int16, the network's
    own outputs as float32 without negative zeros, rounded to `bits` significant bits."""
    if values.dtype.kind != "f":
        return hashlib.sha256(values.astype("<i2").tobytes()).hexdigest()
    mantissa, exponent = np.frexp(values.astype(np.float64))
    rounded = np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)
    return hashlib.sha256((rounded.astype("<f4") + np.float32(0)).tobytes()).hexdigest()


def verify_file(
    model: onnx.ModelProto, inputs: NDArray[np.float32], torch_digests: dict[str, Any], modes: list[bool]
) -> dict[str, Any]:
    """One flavour: every number, code and output of torch against the file in the reference, then onnxruntime layer by
    layer on the reference's inputs.

    torch_digests: as `torch_values.torch_digests` writes them. modes: whether onnxruntime optimizes. Returns
    {"layers": [...], "failures": [...], "floats": {...}}, the failures of the first wrong layer first.
    """
    return verify_trace(trace_of(model, inputs, torch_digests), model, torch_digests, modes)


def trace_of(model: onnx.ModelProto, inputs: NDArray[np.float32], torch_digests: dict[str, Any]) -> Trace:
    """The reference's run on probe inputs, the last of them driven as they were in torch."""
    return Trace(model, inputs, Drive(grids(torch_digests), torch_digests["driven"]))


def verify_trace(
    trace: Trace, model: onnx.ModelProto, torch_digests: dict[str, Any], modes: list[bool]
) -> dict[str, Any]:
    """The same for a run that has not begun; afterwards the trace holds all that was computed."""
    wrong: dict[str, list[str]] = defaultdict(list)
    for place, text in wrong_constants(model, torch_digests):
        wrong[place].append(text)
    roundings = {entry["layer"]: entry for entry in torch_digests["roundings"] if "scale" in entry}
    floats = Floats(torch_digests["floats"])
    layers: list[dict[str, Any]] = []
    failures: list[str] = []
    for segment, feeds, values in trace:
        failures += floats.compare(segment, values, trace)
        for place in dict.fromkeys(map(place_of, segment.model.graph.node)):
            failures += [f"{place}: {text}" for text in wrong.pop(place, [])]
        failures += [f"{place}: {text}" for place, text in _beyond_int32(segment, values, trace)]
        wanted = values[segment.output]
        row: dict[str, Any] = {"layer": segment.layer, "tensor": segment.output}
        if real(wanted).dtype.kind == "f":
            bits = torch_digests["output_bits"]
            row["torch_equal"] = digest(real(wanted), bits) == torch_digests["outputs"].get(segment.output)
        else:
            codes = trace.centred(segment.output)
            row |= {"lowest": int(codes.min()), "highest": int(codes.max())}
            row["beyond"] = _beyond(segment, values, roundings.get(segment.layer))
            row["torch_equal"] = digest(codes) == torch_digests["codes"].get(segment.layer)
        if not row["torch_equal"]:
            failures.append(f"{segment.layer}: the torch student and the integer reference differ")
        for optimise in modes:
            if not optimise and has_float_operators(segment):
                shown = FloatOperators(segment)
                inside = shown.run(feeds)
                failures += shown.failures(inside)
                found = inside[segment.output]
            else:
                session = OnnxSession(segment.model.SerializeToString(), optimise=optimise)
                found = session.run(feeds)[segment.output]
            row["optimised" if optimise else "plain"] = compared = _compare(found, wanted, segment, values)
            if not compared["passed"]:
                if optimise and _saturated(segment, feeds, found):
                    compared["saturated"] = True
                failures.append(_failure(segment.layer, compared, optimise))
        layers.append(row)
    failures += [f"{place}: {text}" for place, texts in wrong.items() for text in texts]
    failures += _missing(layers, torch_digests["codes"]) + floats.missing() + _differing_in_all(layers)
    return {"layers": layers, "failures": failures, "floats": floats.record()}


def _beyond_int32(segment: Segment, values: dict[str, Value], trace: Trace) -> Iterator[tuple[str, str]]:
    """(place, what is wrong) of the layers whose integer sums int32 does not hold, with the bias where that is an
    integer as well. Driven probes do not count: no image makes them."""
    for node in segment.model.graph.node:
        operands = [values[name] for name in node.input] if node.op_type in WEIGHTED else []
        if len(operands) < 2 or not all(isinstance(operand, Grid) for operand in operands[:2]):
            continue
        x, weight = operands[:2]
        if x.scale.size != 1 or weight.scale.size not in (1, max(weight.scale.shape, default=1)):
            continue
        found = trace.without_driven(real(values[node.output[0]]))
        bias = np.zeros(1) if len(operands) < 3 or isinstance(operands[2], Grid) else real(operands[2])
        per_channel = (-1, *[1] * (found.ndim - 2))
        sums = (found - bias.reshape(per_channel)) / (x.scale * weight.scale.reshape(-1)).reshape(per_channel)
        largest = float(np.abs(sums).max(initial=0.0))
        if largest >= INT32:
            yield place_of(node), f"its sums come to {largest:.3g}, beyond int32, in which they are added on a device"


def _beyond(segment: Segment, values: dict[str, Value], wanted: dict[str, Any] | None) -> dict[str, bool]:
    """Whether a value came in that the lower limit changes, and one that the upper does, of the limits that the file
    states; the ends of the integers themselves cannot get lost."""
    if wanted is None or segment.quantize is None:
        return {}
    zero_point = values[segment.quantize.input[2]]
    reach = np.iinfo(zero_point.dtype)
    ends = (reach.min - int(zero_point.item()), reach.max - int(zero_point.item()))
    unclipped = real(values[segment.unclipped]) / wanted["scale"]
    low, high = (None if wanted[key] == end else wanted[key] for key, end in zip(("low", "high"), ends, strict=True))
    found = {} if low is None or wanted["nonnegative"] else {"low": bool(unclipped.min() < low - 0.5)}
    return found if high is None else {**found, "high": bool(unclipped.max() > high + 0.5)}


def _missing(layers: list[dict[str, Any]], wanted: dict[str, str]) -> list[str]:
    found = {row["layer"] for row in layers}
    return [f"{layer}: the file has no quantized values of this layer" for layer in wanted if layer not in found]


def _differing_in_all(layers: list[dict[str, Any]]) -> list[str]:
    failures = []
    for mode in ("plain", "optimised"):
        compared = [row[mode] for row in layers if "codes" in row.get(mode, {})]
        differing, total = (sum(c[key] for c in compared) for key in ("roundings", "codes"))
        if differing > max(1, (1 - EQUAL_CODES) * total):
            failures.append(f"all layers: {differing} of {total} quantized values differ in {mode} onnxruntime")
    return failures


def _size(values: NDArray[Any]) -> float:
    """The root mean square, or a sixteenth of the largest value: probabilities of thousands of classes are nearly all
    zero, and the error of a float32 is that of the others."""
    return max(float(np.sqrt(np.square(values).mean())), float(np.abs(values).max(initial=0.0)) / 16)


def _compare(found: NDArray[Any], wanted: Value, segment: Segment, values: dict[str, Value]) -> dict[str, Any]:
    if found.dtype.kind == "f":
        reference = real(wanted)
        error = float(np.abs(found - reference).max() / max(_size(reference), 1e-30))
        return {"relative_error": error if math.isfinite(error) else None, "passed": error <= OUTPUT_ERROR}
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


def _saturated(segment: Segment, feeds: dict[str, NDArray[Any]], found: NDArray[Any]) -> bool:
    """Whether onnxruntime gave what a kernel gives that adds products in pairs, in int16."""
    wanted = emulated(segment.model, feeds, segment.output)
    return wanted is not None and bool(_near(found[: len(wanted)], wanted))


def _near(found: NDArray[Any], wanted: NDArray[Any]) -> bool:
    """As `_compare` has it, but that every code counts."""
    if found.dtype.kind == "f":
        return float(np.abs(found - wanted).max()) <= OUTPUT_ERROR * _size(wanted)
    return int(np.count_nonzero(found != wanted)) <= tolerated(found.size)


SATURATED = (
    ": two of its products together pass int16, in which onnxruntime adds them on an x86 CPU with AVX2 and no VNNI; an "
    "emulation of that gives the same. On other CPUs this file is right. Export the run again: faqd now writes files "
    "that are right on all"
)


def _failure(layer: str, compared: dict[str, Any], optimise: bool) -> str:
    how = "optimised" if optimise else "plain"
    cause = SATURATED if compared.get("saturated") else ""
    if "codes" in compared:
        return (
            f"{layer}: {compared['differing']} of {compared['codes']} quantized values differ in {how} onnxruntime, "
            f"by up to {compared['largest_difference']}{cause}"
        )
    error = compared["relative_error"]
    differs = "is not finite" if error is None else f"differs by {error:.2g}"
    return f"{layer}: the float output {differs} in {how} onnxruntime{cause}"
