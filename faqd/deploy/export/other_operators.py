"""Operators that no row writes, of float islands: torch's exporter translates them."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from torch import fx

from faqd.deploy.export.onnx_file import OnnxFile
from faqd.deploy.export.tensor_facts import TensorFacts
from faqd.errors import UserError, first_line
from faqd.quantize.capture.aten import word_of
from faqd.quantize.lowering.number_types import retyped
from faqd.quantize.operators.emit import OPSET


def write_others(
    network: fx.GraphModule,
    region: list[fx.Node],
    facts: Mapping[fx.Node, TensorFacts],
    values: dict[fx.Node, ir.Value],
    file: OnnxFile,
    places: Mapping[fx.Node, str],
) -> None:
    """Write nodes that follow each other and no row knows; what others read of them is in `values` afterwards."""
    inside = _with_sizes(region, facts)
    results = [node for node in region if node in facts and _is_read_outside(node, region, facts)]
    if not results:
        return
    read = list(
        dict.fromkeys(n for node in inside for n in node.all_input_nodes if n not in inside and n.op != "get_attr")
    )
    model = _translated(network, inside, read, results, facts)
    for given, node in zip(list(model.graph.inputs), read, strict=True):
        ir.convenience.replace_all_uses_with(given, values[node], replace_graph_outputs=True)
    made = list(model.graph.outputs)
    model.graph.outputs.clear()
    place = places[results[-1]]
    for initializer in list(model.graph.initializers.values()):
        model.graph.initializers.pop(str(initializer.name))
        file.adopt(initializer, place)
    for made_of in list(model.graph):
        model.graph.remove(made_of)
        made_of.metadata_props.clear()
        made_of.doc_string = None
        for output in made_of.outputs:
            output.metadata_props.clear()
            output.shape = None  # with symbols of another file
        file.graph.append(made_of)
        file.call(made_of, place)
    for node, value in zip(results, made, strict=True):
        file.describe(value, facts[node])
        values[node] = value


def _with_sizes(region: list[fx.Node], facts: Mapping[fx.Node, TensorFacts]) -> list[fx.Node]:
    """The nodes, behind what they read that is no tensor, such as sizes: it is computed once more."""
    found: dict[fx.Node, None] = {}

    def take(node: fx.Node) -> None:
        for read in node.all_input_nodes:
            if read not in facts and read not in region:
                take(read)
        found[node] = None

    for node in region:
        take(node)
    return list(found)


def _is_read_outside(node: fx.Node, region: list[fx.Node], facts: Mapping[fx.Node, TensorFacts]) -> bool:
    """Whether something behind the region reads a tensor of it, or something that is no tensor and is made of it."""
    return any(
        reader not in region or (reader not in facts and _is_read_outside(reader, region, facts))
        for reader in node.users
    )


def _translated(
    network: fx.GraphModule,
    inside: list[fx.Node],
    read: list[fx.Node],
    results: list[fx.Node],
    facts: Mapping[fx.Node, TensorFacts],
) -> ir.Model:
    """A model of some nodes, of what they read, and of their results, with its constants known."""
    graph, copied = fx.Graph(), {}
    for index, node in enumerate(read):
        copied[node] = graph.placeholder(f"read_{index}")
    for node in inside:
        for own in node.all_input_nodes:
            if own.op == "get_attr" and own not in copied:
                copied[own] = graph.node_copy(own)
        copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(tuple(copied[node] for node in results))
    part = copy.deepcopy(fx.GraphModule(network, graph)).float().eval()
    retyped(part, torch.float64, torch.float32)
    part.recompile()
    examples = tuple(_example(facts[node]) for node in read)
    shapes = tuple(_moving(facts[node]) for node in read)
    with warnings.catch_warnings():
        # torch's exporter warns of its own deprecations; a user can do nothing about them.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                part,
                examples,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                optimize=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise UserError(
                f"torch's exporter cannot write {', '.join(dict.fromkeys(map(word_of, inside)))} as ONNX: "
                f"{first_line(_innermost(error))}. Write it in forward with other operators."
            ) from error
    assert program is not None
    _fold_constants(program.model)
    return program.model


def _example(facts: TensorFacts) -> torch.Tensor:
    sizes = [size if isinstance(size, int) else size[0] for size in facts.sizes]
    dtype = torch.float32 if facts.dtype.is_floating_point else facts.dtype
    return torch.ones(sizes, dtype=dtype)


def _moving(facts: TensorFacts) -> dict[int, Any]:
    return {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(facts.sizes) if not isinstance(size, int)}


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _fold_constants(model: ir.Model) -> None:
    """What the exporter leaves to be computed from constants, such as the axes of a norm: TensorRT wants them known."""
    if any(node.op_type == "Constant" for node in model.graph):
        fold_constants(model)
        common.RemoveUnusedNodesPass()(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    if model.functions:
        common.InlinePass()(model)
    # Copies of constants, which the exporter writes for tensors made in forward.
    for node in list(model.graph):
        if node.op_type == "Identity" and node.inputs[0] is not None and node.inputs[0].is_initializer():
            (copied,) = node.outputs
            if not copied.is_graph_output():
                ir.convenience.replace_all_uses_with(copied, node.inputs[0])
                model.graph.remove(node, safe=True)
