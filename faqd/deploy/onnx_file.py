"""The one place that opens an ONNX file nobody vouches for: scanned, parsed and checked before others see it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx

from faqd.deploy.onnx_graph import Graph, attributes_of, scale_of
from faqd.deploy.onnx_scan import MAX_ELEMENTS, read_scanned
from faqd.errors import UserError, first_line

MAX_SIZES = 2**16
"""Of one computed list of integers; what networks compute are the sizes of a shape, and masks of a few thousand."""
_INDICES = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)


def load_model(path: Path) -> onnx.ModelProto:
    """Read and fully check an ONNX file; UserError (exit code 2) if it is damaged, hostile or no network of ours."""
    return _checked(path)[0]


def load_bytes(path: Path) -> bytes:
    """The bytes of the same checks: what is handed to a runtime is what was checked, whatever becomes of the file."""
    return _checked(path)[1]


def _checked(path: Path) -> tuple[onnx.ModelProto, bytes]:
    data = read_scanned(path)
    try:
        model = onnx.ModelProto.FromString(data)
        onnx.checker.check_model(model, full_check=True)
        for values_too in (False, True):  # Sizes alone first: values of shapes are propagated only where those are few.
            inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=values_too)
            for complaint in _oversized(inferred):
                raise UserError(f"{path}: {complaint}.")
    except UserError:
        raise
    except Exception as error:  # protobuf, the checker and shape inference raise many kinds
        raise UserError(f"{path}: not a valid ONNX file ({first_line(error)}).") from error
    for complaint in _bad_quantization(inferred):
        raise UserError(f"{path}: {complaint}.")
    return model, data


def _oversized(model: onnx.ModelProto) -> Iterator[str]:
    """Tensors that the file does not declare and shape inference finds: what a few bytes can make a runtime fill."""
    for value in model.graph.value_info:
        sizes = [size.dim_value for size in value.type.tensor_type.shape.dim]
        elements = math.prod(max(1, size) for size in sizes)
        shape = "x".join(map(str, sizes))
        if elements > MAX_ELEMENTS:
            yield f"tensor {value.name}, of {shape} elements, is larger than anything that runs here"
        elif len(sizes) == 1 and elements > MAX_SIZES and value.type.tensor_type.elem_type in _INDICES:
            yield f"tensor {value.name} computes {elements:,} indices or sizes; store them, or fold what is constant"


def _bad_quantization(model: onnx.ModelProto) -> Iterator[str]:
    """What the checker lets pass: scales that are no scales, and an axis on which they do not fit."""
    graph = Graph(model)
    for node in graph.nodes:
        scale = scale_of(graph, node) if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None
        if scale is None:
            continue
        what = f"node {node.name or node.output[0]} ({node.op_type})"
        if not (np.isfinite(scale) & (scale > 0)).all():
            yield f"{what}: every scale must be a finite number above zero"
        shape = graph.shape(node.input[0])
        if scale.ndim != 1 or scale.size == 1 or shape is None:
            continue
        axis = attributes_of(node).get("axis", 1)
        if not -len(shape) <= axis < len(shape):
            yield f"{what}: axis {axis} of a tensor with {len(shape)} axes"
        elif shape[axis] and shape[axis] != scale.size:
            yield f"{what}: {scale.size} scales for the {shape[axis]} elements of axis {axis}"
