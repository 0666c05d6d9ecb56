"""FILE.onnx as a network: its layers are torch's, its weights are parameters at the names of its nodes.

The file is opened by the checks that hold for every ONNX file here. What was read is held against onnxruntime's run of
the file itself before anything learns from it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor, nn

from faqd.deploy.onnx_model.beside import joined_sha256
from faqd.deploy.onnx_model.load import load_model
from faqd.deploy.onnx_model.scan import locations
from faqd.errors import UserError
from faqd.train.networks.from_onnx import functions, layers, recurrent, resize, shapes, windows
from faqd.train.networks.from_onnx.builder import BATCH, Builder, Ref, Rule
from faqd.train.networks.from_onnx.compare import compare
from faqd.train.networks.from_onnx.network import OnnxNetwork

RULES: dict[str, Rule] = {
    **layers.RULES,
    **windows.RULES,
    **functions.RULES,
    **shapes.RULES,
    **resize.RULES,
    **recurrent.RULES,
}
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger")
_FLOAT = onnx.TensorProto.FLOAT
_compared: set[tuple[str, int, tuple[int, int]]] = set()
"""By SHA-256, channels and pixels: a run reads its teacher several times."""


def read_onnx(path: Path, channels: int, pixels: tuple[int, int]) -> nn.Module:
    """The network of an ONNX file for images of that size, in evaluation mode.

    UserError where the file is damaged, where it holds what is not read, or computes something else when read.
    """
    model = load_model(path, beside=True)
    _refuse_quantized(path, model)
    value = _image(path, model)
    sizes = [size.dim_value if size.dim_value > 0 else None for size in value.type.tensor_type.shape.dim]
    last = _has_channels_last(sizes, channels)
    _refuse_size(path, sizes, last, channels, pixels)
    _refuse_unknown(path, model, value.name)
    shape = (*pixels, channels) if last else (channels, *pixels)
    builder = Builder(model, str(path), RULES, shape, sizes[0])
    builder.walk()
    outputs = _outputs(path, builder)
    key = (onnx_sha256(path), channels, pixels)
    if key not in _compared:
        compare(path, model, builder, outputs, shape)
        _compared.add(key)
    network = builder.network(value.name, outputs)
    return (_ChannelsLast(network) if last else network).eval()


def onnx_sha256(path: Path) -> str:
    """Of the file and of those that it keeps tensors in."""
    return joined_sha256(path, locations(path))


def input_size(path: Path) -> tuple[int, tuple[int, int]] | None:
    """(channels, (H, W)) where the file says them; None where one is free."""
    sizes = [size.dim_value for size in _image(path, load_model(path, beside=True)).type.tensor_type.shape.dim]
    if len(sizes) != 4 or min(sizes[1:]) <= 0:
        return None
    channels, height, width = (sizes[3], *sizes[1:3]) if sizes[3] in (1, 3) and sizes[1] > 4 else sizes[1:]
    return channels, (height, width)


class _ChannelsLast(nn.Module):
    """A network of images (N, H, W, C), for (N, C, H, W)."""

    def __init__(self, network: OnnxNetwork) -> None:
        super().__init__()
        self.network, self.image_name = network, network.image_name

    def forward(self, x: Tensor) -> Any:
        return self.network(x.permute(0, 2, 3, 1))


# What is not read -------------------------------------------------------------------------------------------------


def _refuse_quantized(path: Path, model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type in _QUANTIZED or node.op_type.startswith(("QLinear", "DynamicQuantize")):
            raise UserError(
                f"{path}: is quantized already (node {node.name or node.output[0]}, {node.op_type}); give the float "
                "file that it was made of."
            )
        if node.domain not in ("", "ai.onnx"):
            raise UserError(
                f"{path}: node {node.name or node.output[0]} is {node.op_type} of {node.domain}, which is no operator "
                "of ONNX itself; give the file from before a runtime's own optimiser wrote it."
            )


def _image(path: Path, model: onnx.ModelProto) -> onnx.ValueInfoProto:
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs: list[onnx.ValueInfoProto] = [value for value in model.graph.input if value.name not in stored]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise UserError(
            f"{path}: has {len(inputs)} inputs ({names}); taken is a network of images alone. Store what is the same "
            "for every image as constants of the file."
        )
    tensor = inputs[0].type.tensor_type
    if tensor.elem_type != _FLOAT:
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        raise UserError(f"{path}: its input {inputs[0].name} is {kind}; save the network in float32.")
    if len(tensor.shape.dim) != 4:
        raise UserError(
            f"{path}: its input {inputs[0].name} has {len(tensor.shape.dim)} axes; taken are images (N, C, H, W)."
        )
    return inputs[0]


def _has_channels_last(sizes: list[int | None], channels: int) -> bool:
    return sizes[3] == channels and sizes[1] != channels


def _refuse_size(path: Path, sizes: list[int | None], last: bool, channels: int, pixels: tuple[int, int]) -> None:
    _, *rest = sizes
    wanted = [rest[2], *rest[:2]] if last else rest
    found = (channels, *pixels)
    if all(size in (None, given) for size, given in zip(wanted, found, strict=True)):
        return
    asked = "x".join("any" if size is None else str(size) for size in wanted)
    side = "x".join(str(size) for size in wanted[1:]) if None not in wanted[1:] else ""
    cure = f"--image-size {side}" if side else "another --image-size"
    raise UserError(
        f"{path}: takes images of {asked} (channels, height, width) and not {'x'.join(map(str, found))}; give {cure}"
        f"{'' if wanted[0] in (None, channels) else f', and images of {wanted[0]} channels'}."
    )


def _refuse_unknown(path: Path, model: onnx.ModelProto, image: str) -> None:
    """Whatever is computed of the image, all at once."""
    computed, unknown = {image}, Counter[str]()
    for node in model.graph.node:
        if node.op_type in ("Shape", "Size") or computed.isdisjoint(node.input):
            continue
        computed.update(node.output)
        if node.op_type not in RULES:
            unknown[node.op_type] += 1
    if unknown:
        listed = ", ".join(f"{kind} ({count})" for kind, count in unknown.items())
        raise UserError(
            f"{path}: has operators that are not read: {listed}. Cut them off the file (onnx.utils.extract_model), or "
            "give the network as FILE.py:callable."
        )


def _outputs(path: Path, builder: Builder) -> dict[str, str]:
    found: dict[str, str] = {}
    for output in builder.graph.output:
        value = builder.values.get(output.name)
        if value is None:
            raise UserError(f"{path}: its output {output.name} is a second result of a node, which is not read.")
        if not isinstance(value, Ref):
            raise UserError(f"{path}: its output {output.name} is the same for every image; take it out of the file.")
        if value.shape[:1] != (BATCH,):
            axes = [axis for axis, size in enumerate(value.shape) if size == BATCH]
            where = f"along axis {axes[0]}" if axes else "among others of an axis"
            raise UserError(
                f"{path}: its output {output.name} has its images {where}, and they have to be the first axis; end the "
                "file with a Transpose or a Reshape."
            )
        found[output.name] = value.name
    return found
