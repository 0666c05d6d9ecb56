"""The FP16 file against the FP32 one, on which the exact gates run: what is deployed must be what was proved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from faqd import bundle as names
from faqd.bundle import Bundle
from faqd.deploy.export.float16 import LARGEST, STATED, narrowed
from faqd.deploy.export.uint8_input import without_preprocessing
from faqd.deploy.onnx_model.session import OnnxSession
from faqd.deploy.reference.evaluator import code_tensors
from faqd.deploy.verify.bundle_networks import load_network
from faqd.deploy.verify.numbers import WEIGHTED
from faqd.deploy.verify.outputs import Outputs, compare_outputs, snr_db
from faqd.deploy.verify.segments import Segment, Trace, segments

EQUAL_CODES_FP16 = 0.999
"""Least share of codes at most one apart between the FP16 and the FP32 file, in a layer of integer products."""
LEAST_SNR_DB = 30
"""Of a float output, and of codes behind layers that multiply floats, which FP16 moves by more than one here and there;
on the reference's own inputs of the layers that make them. FP16 has 11 bits, about 66 dB."""


def verify_float16(bundle: Bundle, trace: Trace, found: Outputs, wanted: Outputs) -> dict[str, Any]:
    """Whole networks' outputs, whose floor is agreement.py's, and every layer on the reference's inputs, bounded.

    trace: of the FP32 file. found, wanted: the outputs of the FP16 and of the FP32 file for the same images. Driven
    probes are left out: sums that no image leads to may be too large for FP16.
    """
    half, full = load_network(bundle, names.STUDENT_TENSORRT), load_network(bundle, names.STUDENT_TENSORRT_FP32)
    if bundle.takes_pixels:
        half, full = without_preprocessing(half), without_preprocessing(full)
    here = set(code_tensors(half.graph))
    failures = [
        f"{name}: the FP16 file has no such quantized values" for name in code_tensors(full.graph) if name not in here
    ]
    narrow = any(map(_is_float_cast, half.graph.node))
    layers: list[dict[str, Any]] = []
    for segment in segments(half):
        feeds = trace.feeds(segment)
        if segment.output not in trace.computed or feeds is None:
            failures.append(f"{segment.layer}: the FP32 file has no such layer")
            continue
        # onnxruntime's CPU computes FP16 in float32, where nothing overflows that would on a GPU.
        if narrow and (too_large := _too_large(segment, trace.reached)):
            failures.append(f"{segment.layer}: {too_large}")
            continue
        # Of all probes at first: a tensor between two layers may have its images on another axis than the first.
        computed = OnnxSession(segment.model.SerializeToString(), optimise=False).run(feeds)[segment.output]
        computed, expected = map(trace.without_driven, (computed, trace.computed[segment.output]))
        if expected.dtype.kind == "f":
            snr = snr_db(computed, expected)
            layers.append({"layer": segment.layer, "snr_db": snr})
            if snr is not None and snr < LEAST_SNR_DB:
                apart = f"{segment.layer}: the FP16 output {segment.output} is {snr:.0f} dB from FP32"
                failures.append(apart + _beyond(computed))
            continue
        difference = np.abs(computed.astype(np.int16) - expected.astype(np.int16))
        close = float(np.mean(difference <= 1))
        row: dict[str, Any] = {
            "layer": segment.layer,
            "within_one_code": close,
            "largest_difference": int(difference.max()),
        }
        layers.append(row)
        if _multiplies_floats(segment):
            row["snr_db"] = snr = snr_db(computed, expected)
            if snr is not None and snr < LEAST_SNR_DB:
                apart = f"{segment.layer}: the quantized values of FP16 are {snr:.0f} dB from FP32"
                failures.append(apart + _beyond(computed))
        elif close < EQUAL_CODES_FP16:
            apart = f"{segment.layer}: only {100 * close:.3f} % of the quantized values of FP16 are within one of FP32"
            failures.append(apart + _beyond(computed))
    failures += changed(half, full)
    return {"layers": layers, "failures": failures, "outputs": compare_outputs(found, wanted)}


def _multiplies_floats(segment: Segment) -> bool:
    """Whether a layer that --exclude left float is part of it."""
    makers = {name: node for node in segment.model.graph.node for name in node.output}

    def dequantized(name: str) -> bool:
        while name in makers and _is_float_cast(makers[name]):
            name = makers[name].input[0]
        return name in makers and makers[name].op_type == "DequantizeLinear"

    products = [node for node in segment.model.graph.node if node.op_type in (*WEIGHTED, "MatMul")]
    return not all(dequantized(node.input[1]) for node in products)


_WAY_OUT = "write the bundle again with --float-type fp32"


def _beyond(found: NDArray[Any]) -> str:
    """Why FP16 is so far off, where sums inside an operator do not fit in it; nothing where all do."""
    if not np.isfinite(found).all():
        return f": sums inside the layer leave FP16's range, which ends at {LARGEST:.0f}; {_WAY_OUT}"
    return ""


def _too_large(segment: Segment, reached: dict[str, float]) -> str:
    """Which number of the FP32 file does not fit into this layer of the FP16 file; nothing where all do."""
    graph = segment.model.graph
    described = (*graph.value_info, *graph.input, *graph.output)
    here = {value.name for value in described if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
    name = max(sorted(here & reached.keys()), key=lambda name: reached[name], default="")
    if reached.get(name, 0.0) <= LARGEST:
        return ""
    return f"{name} reaches {reached[name]:.3g}, beyond FP16's {LARGEST:.0f}; {_WAY_OUT}"


def changed(half: onnx.ModelProto, full: onnx.ModelProto) -> list[str]:
    """What an FP16 file has otherwise than FP16 explains: a weight one code off moves few codes by more than one."""
    versions = [{entry.domain: entry.version for entry in model.opset_import} for model in (half, full)]
    other = [] if versions[0] == versions[1] else ["the FP16 file is of another opset than the FP32 file"]
    return [*other, *_changes(half.graph, full.graph)]


def _changes(half: onnx.GraphProto, full: onnx.GraphProto) -> Iterator[str]:
    here = {tensor.name: numpy_helper.to_array(tensor) for tensor in half.initializer}
    for tensor in full.initializer:
        wanted, found = numpy_helper.to_array(tensor), here.get(tensor.name)
        if found is not None and found.dtype == np.float16:
            wanted = narrowed(wanted)
        if found is None or found.dtype != wanted.dtype or not np.array_equal(found, wanted, equal_nan=True):
            yield f"{tensor.name}: the FP16 file has not the numbers of the FP32 file"
    if _operators(half) != _operators(full):
        yield "the FP16 file has other operators than the FP32 file"


def _operators(graph: onnx.GraphProto) -> list[Any]:
    """The nodes, their attributes and what they read, and what the outputs are, as if there were no casts between float
    types; a cast to another type counts."""
    makers = {name: (node, index) for node in graph.node for index, name in enumerate(node.output)}

    def source(name: str) -> tuple[str, int]:
        while name in makers and _is_float_cast(makers[name][0]):
            name = makers[name][0].input[0]
        node, index = makers.get(name, (None, -1))
        return (name, -1) if node is None else (node.name, index)

    found: list[Any] = [source(value.name) for value in graph.output]
    for node in graph.node:
        if not _is_float_cast(node):
            stated = node.op_type in STATED
            attributes = [] if stated else [a.SerializeToString(deterministic=True) for a in node.attribute]
            found.append((node.domain, node.op_type, node.name, attributes, [source(name) for name in node.input]))
    return found


def _is_float_cast(node: onnx.NodeProto) -> bool:
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    return node.op_type == "Cast" and all(a.i in floats for a in node.attribute if a.name == "to")
