"""The networks of a bundle, each what the manifest says that it is: what a proof may take for granted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx

from faqd.bundle import MANIFEST, Bundle
from faqd.deploy.onnx_file import load_model
from faqd.errors import UserError


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
    wanted = manifest["input"]["name"]
    inputs = [value.name for value in graph.input]
    if inputs != [wanted]:
        yield f"has the inputs {', '.join(inputs) or 'none'}, the manifest says {wanted}"
    outputs, promised = [value.name for value in graph.output], [output["name"] for output in manifest["outputs"]]
    if outputs != promised:
        yield f"has the outputs {', '.join(outputs) or 'none'}, the manifest says {', '.join(promised)}"
    made = {name for node in graph.node for name in node.output}
    for name in outputs:
        if name not in made:
            yield f"its output {name} is computed by no node"


def _grids(graph: onnx.GraphProto) -> Iterator[str]:
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not constants.issuperset(node.input[1:3]):
            yield f"node {node.name or node.output[0]} ({node.op_type}) computes its scale or its zero point"
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) != 3:
            yield f"node {node.name or node.output[0]} ({node.op_type}) has no zero point"
