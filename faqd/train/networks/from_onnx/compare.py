"""Whether a network that was read computes what onnxruntime does of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from faqd.deploy.onnx_model.session import OnnxSession
from faqd.errors import UserError, first_line
from faqd.train.networks.from_onnx.builder import Builder, Ref

NEAR = 1e-5
"""How far an output may be from onnxruntime's, as a share of its range."""
_OF_ONE = ("Sigmoid", "Softmax", "HardSigmoid")
"""What has the range from 0 to 1 and an error of that range, as onnxruntime's sigmoid is zero for what is nearly so. A
network can be far off there and look right, so what they read is compared as well."""


@torch.no_grad()
def compare(
    path: Path, model: onnx.ModelProto, builder: Builder, outputs: dict[str, str], shape: tuple[int, ...]
) -> None:
    """UserError where an output is not onnxruntime's for seeded images, or where images depend on each other."""
    makers = {name: node for node in model.graph.node for name in node.output}
    ending = {name: makers[name] for name in outputs if name in makers and makers[name].op_type in _OF_ONE}
    values = {node.input[0]: builder.values[node.input[0]] for node in ending.values()}
    watched = {name: value.name for name, value in values.items() if isinstance(value, Ref)}
    network = builder.network(builder.image, outputs | watched).eval()
    images = torch.randn(builder.batch or 2, *shape, generator=torch.Generator().manual_seed(0))
    session = OnnxSession(_returning(model, [name for name in watched if name not in outputs]))
    try:
        wanted = session.run({builder.image: images.numpy()})
    except UserError:  # A file may say that it takes any number of images, and hold for one.
        if builder.batch is not None:
            raise
        images = images[:1]
        wanted = session.run({builder.image: images.numpy()})
    try:
        found = network(images)
    except Exception as error:  # what torch raises for values, which sizes alone do not tell
        raise UserError(f"{path}: read, it fails: {first_line(error)}. Please report the file.") from error
    _refuse_other(path, found, wanted, ending, "onnxruntime computes of the file")
    more = torch.cat([images, images.flip(-1)])
    parts = [network(part) for part in more.split(len(images))]
    joined = {name: torch.cat([part[name] for part in parts]).numpy() for name in outputs}
    _refuse_other(path, network(more), joined, ending, "it computes of fewer images at once")


def _returning(model: onnx.ModelProto, names: list[str]) -> bytes:
    """The file with more outputs."""
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    more = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, graph=graph)
    return bytes(more.SerializeToString())


def _refuse_other(
    path: Path, found: dict[str, Tensor], wanted: dict[str, Any], of_one: dict[str, Any], what: str
) -> None:
    for name, values in wanted.items():
        ours = found[name].numpy()
        if ours.shape != values.shape:
            raise UserError(
                f"{path}: read, its output {name} has shape {ours.shape}, and {values.shape} is what {what}."
            )
        if not np.isfinite(values).all():
            raise UserError(f"{path}: its output {name} is not finite on random images; it cannot be compared.")
        apart = float(np.abs(ours - values.astype(np.float64)).max(initial=0.0))
        reach = 1.0 if name in of_one else float(np.ptp(values)) if values.size else 0.0
        # What is nearly the same everywhere has the error of its size.
        if apart > NEAR * max(reach, 1e-2 * float(np.abs(values).max(initial=0.0))):
            raise UserError(
                f"{path}: read, its output {name} is {apart / (reach or 1.0):.1e} of its range from what {what}, and "
                f"{NEAR:g} is allowed. Please report the file, and give the network as FILE.py:callable meanwhile."
            )
