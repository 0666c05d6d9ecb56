"""A deployed student to ONNX Q/DQ: torch's exporter translates the network, this file states the quantization.

faqd/deploy/export/twins.py says what each deployed module becomes, plain_twins.py what others do.
"""

from __future__ import annotations

import ast
import copy
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from torch import Tensor, fx, nn

from faqd import __version__
from faqd.deploy.export.plain_twins import OPSET, Flatten, GlobalAverage, Mean, Regrouped, ReshapeTwin, plain_twin
from faqd.deploy.export.twins import AverageTwin, deployed_twin
from faqd.errors import UserError, first_line
from faqd.files import written_beside
from faqd.quantize.convert import Deployed
from faqd.quantize.nodes import is_tensor, module_of, operand, places, propagate, role, shape, unused
from faqd.quantize.operators.shape import Reshape
from faqd.quantize.outputs import INPUT, graph_outputs


def onnx_from_deployed(deployed: Deployed, example: Tensor, metadata: dict[str, str]) -> onnx.ModelProto:
    """Export a deployed student of any flavour. example: (N >= 2, C, H, W) float32, for shapes only."""
    network = copy.deepcopy(deployed.network).float()
    _replace_modules(network, lambda module: deployed_twin(module, deployed.flavour))
    proto = onnx_from_network(network, example, metadata)
    if deployed.flavour != "float":
        _count_no_padding(proto)
    if deployed.flavour == "onnxruntime":
        # Told the shapes of tensors inside, it lays activations out in fewer buffers and is slower at batch 1.
        del proto.graph.value_info[:]
    return proto


def _count_no_padding(proto: onnx.ModelProto) -> None:
    """Let averages whose windows reach beyond the map (ceil_mode) count values alone: the same where nothing is padded.

    onnxruntime 1.32 computes them wrongly on codes where padding counts.
    """
    sizes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in proto.graph.value_info}
    for node in proto.graph.node:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        stated = {name: list(attribute.ints) or attribute.i for name, attribute in attributes.items()}
        if node.op_type != "AveragePool" or not (stated.get("count_include_pad") and stated.get("ceil_mode")):
            continue
        pads = stated.get("pads", [0])
        if any(pads) and _reaches_beyond(sizes[node.input[0]][2:], stated):
            raise UserError(
                f"{node.name.rpartition('.')[0]}: an average with ceil_mode that counts its padding, which onnxruntime "
                "computes wrongly on codes; give it count_include_pad=False, or leave ceil_mode out."
            )
        attributes["ceil_mode" if any(pads) else "count_include_pad"].i = 0


def _reaches_beyond(sizes: list[int], pool: dict[str, Any]) -> bool:
    """Whether ceil_mode gives a pooling another window along some axis."""
    spatial = len(sizes)
    pads, kernel, strides = pool["pads"], pool["kernel_shape"], pool.get("strides", [1] * spatial)
    padded = [size + pads[axis] + pads[axis + spatial] for axis, size in enumerate(sizes)]
    return any((size - k) % step for size, k, step in zip(padded, kernel, strides, strict=True))


def onnx_from_network(network: fx.GraphModule, example: Tensor, metadata: dict[str, str]) -> onnx.ModelProto:
    """Export a captured network in evaluation mode: dynamic batch, readable names, no trace of this machine."""
    network = _with_plain_operators(network, example)
    _replace_modules(network, plain_twin)
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        # torch's exporter warns of its own deprecations; a user can do nothing about them.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                network.eval(),
                (example[:2],),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=({0: batch},),
                input_names=[INPUT],
                optimize=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise UserError(
                f"torch's exporter cannot write this network as ONNX: {first_line(_innermost(error))}. Where --exclude "
                "keeps that operator float, write it in forward with others."
            ) from error
    assert program is not None
    model = program.model
    _fold_constants(model)
    _read_constants_themselves(model.graph)
    _keep_outputs_apart(model.graph)
    _name(model, list(graph_outputs(network)))
    _strip(model)
    model.producer_name, model.producer_version = "faqd", __version__
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


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


def _read_constants_themselves(graph: ir.Graph) -> None:
    """Remove the copies of constants that the exporter writes for tensors made in forward."""
    for node in list(graph):
        if node.op_type == "Identity" and node.inputs[0] is not None and node.inputs[0].is_initializer():
            (copied,) = node.outputs
            if not copied.is_graph_output():
                ir.convenience.replace_all_uses_with(copied, node.inputs[0])
                graph.remove(node, safe=True)


def _keep_outputs_apart(graph: ir.Graph) -> None:
    """What a network returns twice, or returns as it came in, under names of its own."""
    taken = set(graph.inputs)
    for index, value in enumerate(graph.outputs):
        if value in taken:
            again = ir.node("Identity", [value])
            (copied,) = again.outputs
            copied.type, copied.shape = value.type, value.shape
            graph.append(again)
            graph.outputs[index] = copied
        taken.add(value)


def _replace_modules(network: fx.GraphModule, twin: Callable[[nn.Module], nn.Module | None]) -> None:
    for node in network.graph.nodes:
        new = twin(network.get_submodule(str(node.target))) if node.op == "call_module" else None
        if new is not None:
            network.set_submodule(str(node.target), new)


def save(proto: onnx.ModelProto, path: Path) -> None:
    with written_beside(path) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))


def _with_plain_operators(network: fx.GraphModule, example: Tensor) -> fx.GraphModule:
    """Averages over all pixels as GlobalAveragePool and flattening as Flatten: what backends run on codes.

    torch's exporter would write a ReduceMean and a chain of Shape, Concat and Reshape.
    """
    network = copy.deepcopy(network)
    propagate(network, example[:2])
    finder = _AverageFinder(network)
    finder.run(example[:2])
    sizes = _sizes_behind_the_batch(network, example)
    found = {node: _plain_operator(network, node, finder.found, sizes) for node in network.graph.nodes}
    names = places(network)
    for node, plain in found.items():
        if plain is None:
            continue
        path = f"{names[node]}_plain"
        network.add_submodule(path, plain)
        with network.graph.inserting_after(node):
            new = network.graph.call_module(path, (operand(node),))
        node.replace_all_uses_with(new)
        network.graph.erase_node(node)
    network.graph.eliminate_dead_code()
    network.recompile()
    return network


def _sizes_behind_the_batch(network: fx.GraphModule, example: Tensor) -> dict[fx.Node, tuple[int, ...]]:
    """The sizes of all axes but the first, of the tensors that have the same for every number of images."""
    more = copy.deepcopy(network)
    propagate(more, torch.cat([example[:2], example[:1]]))
    pairs = [pair for pair in zip(network.graph.nodes, more.graph.nodes, strict=True) if all(map(is_tensor, pair))]
    return {node: shape(node)[1:] for node, other in pairs if shape(node)[1:] == shape(other)[1:]}


def _plain_operator(
    network: fx.GraphModule, node: fx.Node, averages: set[fx.Node], sizes: dict[fx.Node, tuple[int, ...]]
) -> nn.Module | None:
    """What stands for `node`; None where torch's exporter does well."""
    if node in averages:
        flat = len(shape(node)) == 2
        return nn.Sequential(GlobalAverage(), Flatten()) if flat else GlobalAverage()
    if _average_of(network, node) is torch.mean:
        return Mean(*_mean_axes(node))
    if role(network, node) != "reshape" or not is_tensor(node) or not is_tensor(operand(node)):
        return None
    before, after = shape(operand(node)), shape(node)
    if after == (before[0], math.prod(before[1:])):
        return Flatten() if len(before) > 2 else nn.Identity()
    if (regrouped := _regrouped(network, node)) is not None:
        return regrouped
    reshapes = node.target is torch.flatten or isinstance(module_of(network, node), Reshape)
    if not reshapes or math.prod(before) != math.prod(after):
        return None
    if after[0] == before[0]:
        return ReshapeTwin(after[1:])
    return ReshapeTwin(after[1:], batch=-1) if node in sizes and operand(node) in sizes else None


def _regrouped(network: fx.GraphModule, node: fx.Node) -> Regrouped | None:
    """A shuffle of channels, or of pixels into channels; None for any other operator."""
    module: Any = module_of(network, node)
    if len(shape(node)) != 4 or len(shape(operand(node))) != 4:
        return None
    (_, c, h, w), after = shape(operand(node)), shape(node)[1:]
    if isinstance(module, nn.ChannelShuffle):
        groups = module.groups
        return Regrouped((groups, c // groups, h, w), (0, 2, 1, 3, 4), after)
    if isinstance(module, nn.PixelUnshuffle):
        block = module.downscale_factor
        return Regrouped((c, h // block, block, w // block, block), (0, 1, 3, 5, 2, 4), after)
    return None


def _average_of(network: fx.GraphModule, node: fx.Node) -> Any:
    """What averages at `node`, or None."""
    module = module_of(network, node)
    if isinstance(module, AverageTwin):
        return module.average
    return node.target if role(network, node) == "average" else None


def _mean_axes(node: fx.Node) -> tuple[tuple[int, ...], bool]:
    """The axes of a mean, and whether they are kept."""
    given: Any = node.args
    _, axes, kept = given
    return axes, kept


class _AverageFinder(fx.Interpreter):
    """Finds the operators that average all pixels of a map, by what they make of a map of different values."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.network = network
        self.found: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        twin = n.op == "call_module" and isinstance(self.network.get_submodule(str(n.target)), AverageTwin)
        if (twin or role(self.network, n) == "average") and len(shape(operand(n))) in (3, 4):
            seen = self.env[operand(n)]
            maps = self.env[operand(n)] = torch.arange(seen.numel()).reshape(seen.shape).sin()
            result, wanted = super().run_node(n), maps.flatten(2).mean(2)
            if result.numel() == wanted.numel() and torch.allclose(result.reshape(wanted.shape), wanted, atol=1e-5):
                self.found.add(n)
            self.env[operand(n)] = seen
        return super().run_node(n)


# Names and metadata ----------------------------------------------------------------------------------------------

_WORDS = {"Clip": "clip", "Relu": "rectified", "QuantizeLinear": "codes", "DequantizeLinear": "real"}


def _name(model: ir.Model, outputs: list[str]) -> None:
    """Name nodes and tensors after the torch modules they come from."""
    graph = model.graph
    scopes = {node: _scope(node) for node in graph}
    taken: set[str] = {value.name for value in [*graph.inputs, *graph.initializers.values()] if value.name}
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = name
        taken.add(name)
    for node in reversed(list(graph)):
        # A function of the user's forward has no module of its own: it takes the place of what reads it.
        if not scopes[node]:
            readers = [use.node for output in node.outputs for use in output.uses()]
            scopes[node] = next((scopes[reader] for reader in readers if scopes.get(reader)), "")
    for node in graph:
        place = scopes[node].removesuffix("_plain").removesuffix("_quant") or "output"
        word = _WORDS.get(node.op_type, node.op_type.lower())
        if node.op_type == "DequantizeLinear" and node.inputs[0] is not None and node.inputs[0].is_initializer():
            word = "real_weight" if "codes" in str(node.inputs[0].name) else "real_bias"
        name = unused(f"{place}.{word}", taken)
        node.name = name
        for output in node.outputs:
            if not output.is_graph_output():
                output.name = name if len(node.outputs) == 1 else unused(name, taken)


def _scope(node: ir.Node) -> str:
    """The path of the innermost torch module around `node`."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['']"))
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _strip(model: ir.Model) -> None:
    """Remove what the exporter notes about this machine: stack traces hold local paths."""
    graph = model.graph
    graph.name = "faqd"
    graph.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
    for value in [*graph.inputs, *graph.initializers.values()]:
        value.metadata_props.clear()
