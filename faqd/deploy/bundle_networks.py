"""The networks of a bundle, each what the manifest says that it is: what a proof may take for granted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx

from faqd.bundle import MANIFEST, Bundle
from faqd.deploy.onnx_file import load_model
from faqd.errors import UserError

ZERO_POINTS = {"int8": (0,), "uint8": (0, 128), "int32": (0,)}
"""By type of the codes."""


def load_network(bundle: Bundle, file: str) -> onnx.ModelProto:
    """The checked model `file`; UserError (exit code 2) where it is damaged, or has not the inputs, the outputs and the
    constant grids that every network of this bundle has."""
    model = load_model(bundle.path(file))
    for complaint in (*_interface(bundle.manifest, model.graph), *_grids(model.graph)):
        raise UserError(f"{bundle.path(file)}: {complaint}; export the run again.")
    return model


def torch_digests(bundle: Bundle, flavour: str) -> dict[str, Any]:
    """What the manifest says of torch's values in this flavour: `codes` by layer and `outputs` by name."""
    digests = bundle.manifest.get("torch_digests")
    found = digests.get(flavour) if isinstance(digests, dict) else None
    if not isinstance(found, dict) or not all(isinstance(found.get(key), dict) for key in ("codes", "outputs")):
        raise UserError(f"{bundle.folder / MANIFEST}: no digests of torch's {flavour} student; export the run again.")
    return found


def _interface(manifest: dict[str, Any], graph: onnx.GraphProto) -> Iterator[str]:
    wanted = manifest.get("input", {}).get("name", "nothing of it")
    inputs = [value.name for value in graph.input]
    if inputs != [wanted]:
        yield f"has the inputs {', '.join(inputs) or 'none'}, the manifest says {wanted}"
    outputs, promised = (
        [value.name for value in graph.output],
        [output.get("name", "one without a name") for output in manifest.get("outputs", [])],
    )
    if outputs != promised:
        yield f"has the outputs {', '.join(outputs) or 'none'}, the manifest says {', '.join(promised) or 'none'}"
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
            # Codes are compared without their zero point; another one would move where they saturate.
            zero = onnx.numpy_helper.to_array(constants[node.input[2]])
            if not np.isin(zero, ZERO_POINTS.get(str(zero.dtype), ())).all():
                yield f"{where} has the zero point {zero.flat[0]}"
