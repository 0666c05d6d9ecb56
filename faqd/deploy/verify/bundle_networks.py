"""The networks of a bundle, each what the manifest says that it is: what a proof may take for granted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import onnx

from faqd import bundle as names
from faqd.bundle import Bundle
from faqd.deploy.onnx_model.load import load_model
from faqd.errors import UserError
from faqd.schema import COUNT, POSITIVE, Each, Many, Maybe, wrong

ZERO_POINTS = {"int8": (0,), "uint8": range(0, 256, 2), "int32": (0,)}
"""By type of the codes."""


def load_network(bundle: Bundle, file: str) -> onnx.ModelProto:
    """The checked model `file`; UserError (exit code 2) where it is damaged, or has not the inputs, the outputs and the
    constant grids that every network of this bundle has."""
    model = load_model(bundle.path(file))
    for complaint in (*_interface(bundle.manifest, model.graph), *_grids(model.graph)):
        raise UserError(f"{bundle.path(file)}: {complaint}; export the run again.")
    stated = f"{bundle.manifest['weight_bits']}/{bundle.manifest['act_bits']}"
    written = {entry.key: entry.value for entry in model.metadata_props}.get("faqd.student", stated).rpartition(" ")[2]
    if written != stated:
        raise UserError(
            f"{bundle.folder / names.MANIFEST}: says {stated} bits, and {file} that it has {written}; export again."
        )
    return model


_LISTED = Many({"layer": str, **dict.fromkeys(("codes", "weight_scale", "bias"), str)})
_LIMITS = {"grid": Many(float, 2), "low": Maybe(float), "high": Maybe(float), "nonnegative": bool}
_ROUNDING = {"layer": str, "scale": POSITIVE, **_LIMITS}
_DIGESTS = {
    "codes": Each(str),
    "outputs": Each(str),
    "output_bits": COUNT,
    "driven": float,
    "layers": _LISTED,
    "roundings": Many(_ROUNDING),
    "others": Many({"layer": str, "number": str, "sha256": str}),
    "floats": Each(Many(float, 1)),
}


def flavours(target: str, act_bits: int) -> list[Literal["tensorrt", "onnxruntime"]]:
    """What a student is deployed as: both, but no grid of TensorRT has the 8-bit activations of onnxruntime's."""
    return ["onnxruntime"] if target == "onnxruntime" and act_bits == 8 else ["tensorrt", "onnxruntime"]


def flavours_in(bundle: Bundle) -> list[Literal["tensorrt", "onnxruntime"]]:
    return flavours(bundle.manifest["target"], bundle.manifest["act_bits"])


def refuse_other_files(bundle: Bundle) -> None:
    """UserError where a file is missing that such a bundle has, or a network is listed that no gate looks at."""
    needed = [names.STUDENT_ONNXRUNTIME, names.FLOAT_STUDENT, names.FLOAT_STUDENT_FP16, names.TEACHER]
    needed += [names.EVAL, names.PROBE_OUTPUTS]
    if "tensorrt" in flavours_in(bundle):
        needed += [names.STUDENT_TENSORRT_FP32, names.STUDENT_TENSORRT]
    for name in needed:
        if not bundle.has(name):
            raise UserError(f"{bundle.folder / names.MANIFEST}: lists no {name}; export the run again.")
    for name in bundle.onnx_files():
        if name not in (*needed, names.TEACHER_FP16, *_beside(bundle)):
            raise UserError(
                f"{bundle.folder / names.MANIFEST}: lists {name}, which nothing proves; export the run again."
            )


def _beside(bundle: Bundle) -> tuple[str, ...]:
    return (names.STUDENT_DEEPSTREAM,) if "tensorrt" in flavours_in(bundle) else ()


def torch_digests(bundle: Bundle, flavour: str) -> dict[str, Any]:
    """What the manifest says of torch in this flavour, as `torch_values.torch_digests` wrote it."""
    digests = bundle.manifest.get("torch_digests")
    found = digests.get(flavour) if isinstance(digests, dict) else None
    if isinstance(found, dict):
        found = {"floats": {}, **found}  # which bundles of before have not
    complaint = next(wrong(found, _DIGESTS, flavour), None)
    if complaint is not None:
        raise UserError(
            f"{bundle.folder / names.MANIFEST}: no digests of torch's {flavour} student ({complaint}); export the run "
            "again."
        )
    assert isinstance(found, dict)
    return found


def _interface(manifest: dict[str, Any], graph: onnx.GraphProto) -> Iterator[str]:
    wanted = manifest["input"]["name"]
    inputs = [value.name for value in graph.input]
    if inputs != [wanted]:
        yield f"has the inputs {', '.join(inputs) or 'none'}, the manifest says {wanted}"
    outputs, promised = [value.name for value in graph.output], [output["name"] for output in manifest["outputs"]]
    if outputs != promised:
        yield f"has the outputs {', '.join(outputs) or 'none'}, the manifest says {', '.join(promised)}"
    for value in (*graph.input, *graph.output):
        batch = next(iter(value.type.tensor_type.shape.dim), None)
        if batch is None or batch.HasField("dim_value"):
            yield f"{value.name} has no free number of images"
    made = {name for node in graph.node for name in node.output}
    for name in outputs:
        if name not in made:
            yield f"its output {name} is computed by no node"


def _grids(graph: onnx.GraphProto) -> Iterator[str]:
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        where = f"node {node.name or node.output[0]} ({node.op_type})"
        if not constants.keys() >= set(node.input[1:3]):
            yield f"{where} computes its scale or its zero point"
        elif len(node.input) != 3:
            yield f"{where} has no zero point"
        else:
            # Codes are compared without their zero point; where they saturate says which one they have.
            zero = onnx.numpy_helper.to_array(constants[node.input[2]])
            if node.input[0] not in constants and (zero.size != 1 or math.prod(constants[node.input[1]].dims) != 1):
                yield f"{where} has not one scale and one zero point, as an activation of faqd's has"
            if not np.isin(zero, list(ZERO_POINTS.get(str(zero.dtype), ()))).all():
                yield f"{where} has the zero point {zero.flat[0]}"
