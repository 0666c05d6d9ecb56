"""The one place that opens an ONNX file nobody vouches for: scanned, parsed and checked before others see it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx

from faqd.deploy.onnx_model.beside import join
from faqd.deploy.onnx_model.graph import Graph, attributes_of, operand, scale_of
from faqd.deploy.onnx_model.inference import inferred
from faqd.deploy.onnx_model.scan import MAX_ELEMENTS, read_scanned
from faqd.errors import UserError, first_line

MAX_SIZES = 2**18
"""In all computed lists of integers; what networks compute are the sizes of a shape, and masks of a few thousand."""
MAX_RANK = 64
"""Of a tensor, as far as its operators tell at once; runtimes take eight axes."""
_SIZED_BY = {
    **dict.fromkeys(("Expand", "Tile", "OneHot", "Upsample", "Pad", "CenterCropPad"), (1,)),
    **dict.fromkeys(("ConstantOfShape", "EyeLike", "HannWindow", "HammingWindow", "BlackmanWindow"), (0,)),
    "Range": (0, 1, 2),
    "Resize": (2, 3),
}
"""Which operands say how large a result is."""
_INDICES = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)


def load_model(path: Path, *, beside: bool = False) -> onnx.ModelProto:
    """Read and fully check an ONNX file; UserError (exit code 2) if it is damaged, hostile or no network of ours.

    beside: its tensors may be in other files of its folder; they are brought into the model.
    """
    return _checked(path, beside)[0]


def load_bytes(path: Path) -> bytes:
    """The bytes of the same checks: what is handed to a runtime is what was checked, whatever becomes of the file."""
    return _checked(path)[1]


def _checked(path: Path, beside: bool = False) -> tuple[onnx.ModelProto, bytes]:
    data = read_scanned(path, beside=beside)
    try:
        model = onnx.ModelProto.FromString(data)
        if beside:
            join(path, model)
        _free_sizes(model.graph)
        for complaint in _unbounded(model.graph):
            raise UserError(f"{path}: {complaint}.")
        for values_too in (False, True):  # Sizes alone first: values of shapes are propagated only where those are few.
            found = inferred(model, check=not values_too, values_too=values_too)
            for complaint in _oversized(found):
                raise UserError(f"{path}: {complaint}.")
    except UserError:
        raise
    except Exception as error:  # protobuf, the checker and shape inference raise many kinds
        raise UserError(f"{path}: not a valid ONNX file ({first_line(error)}).") from error
    for complaint in _bad_quantization(Graph(model), Graph(found)):
        raise UserError(f"{path}: {complaint}.")
    return model, data


def _free_sizes(graph: onnx.GraphProto) -> None:
    """-1 for a free size, as Paddle's exporter writes it, in onnx's own way: shape inference takes it for a number."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_value == -1:
                size.ClearField("dim_value")


def _unbounded(graph: onnx.GraphProto) -> Iterator[str]:
    """What no inference may see, or bounds: axes without an end, and sizes that depend on what the input holds."""
    stored = {tensor.name: int(tensor.dims[0]) if len(tensor.dims) == 1 else 1 for tensor in graph.initializer}
    by_value = {value.name for value in graph.input} - stored.keys()
    rank: dict[str, int] = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        where = f"node {node.name or ', '.join(node.output)} ({node.op_type})"
        if any(operand(node, index) in by_value for index in _SIZED_BY.get(node.op_type, ())):
            yield f"{where} makes a tensor as large as values of the input say; export a network of fixed sizes"
        if node.op_type not in ("Shape", "Size") and not by_value.isdisjoint(node.input):
            by_value.update(node.output)
        axes = max((rank.get(name, 0) for name in node.input), default=0)
        if node.op_type == "Unsqueeze":
            axes += stored.get(operand(node, 1), 0) + sum(len(a.ints) for a in node.attribute if a.name == "axes")
        elif node.op_type in ("Reshape", "Expand", "Tile"):
            axes = max(axes, stored.get(operand(node, 1), 0))
        if axes > MAX_RANK:
            yield f"{where} has {axes} axes; runtimes take eight"
        rank.update(dict.fromkeys(node.output, axes))


def _oversized(model: onnx.ModelProto) -> Iterator[str]:
    """Tensors that the file does not declare and shape inference finds: what a few bytes can make a runtime fill."""
    listed = 0
    for value in model.graph.value_info:
        sizes = [size.dim_value for size in value.type.tensor_type.shape.dim]
        elements = math.prod(max(1, size) for size in sizes)
        shape = "x".join(map(str, sizes))
        if elements > MAX_ELEMENTS:
            yield f"tensor {value.name}, of {shape} elements, is larger than anything that runs here"
        listed += elements if len(sizes) < 2 and value.type.tensor_type.elem_type in _INDICES else 0
        if listed > MAX_SIZES:
            yield f"up to {value.name}, {listed:,} indices or sizes are computed; store them, or fold what is constant"


def _bad_quantization(graph: Graph, inferred_graph: Graph) -> Iterator[str]:
    """What the checker lets pass: scales that are no scales, and an axis on which they do not fit."""
    for node in graph.nodes:
        scale = scale_of(graph, node) if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None
        if scale is None:
            continue
        what = f"node {node.name or node.output[0]} ({node.op_type})"
        if not (np.isfinite(scale) & (scale > 0)).all():
            yield f"{what}: every scale must be a finite number above zero"
        shape = inferred_graph.shape(node.input[0])
        if scale.ndim != 1 or scale.size == 1 or shape is None:
            continue
        axis = attributes_of(node).get("axis", 1)
        if not -len(shape) <= axis < len(shape):
            yield f"{what}: axis {axis} of a tensor with {len(shape)} axes"
        elif shape[axis] and shape[axis] != scale.size:
            yield f"{what}: {scale.size} scales for the {shape[axis]} elements of axis {axis}"
