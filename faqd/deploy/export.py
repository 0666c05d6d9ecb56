"""A deployed student to ONNX Q/DQ: torch's exporter translates the network, this file states the quantization.

Each deployed module has a twin that emits standard operators at opset 19:
tensorrt:     x -> Clip(0, high * scale) or Relu -> QuantizeLinear int8, zero point 0 -> DequantizeLinear
onnxruntime:  x -> QuantizeLinear uint8 -> Clip(0, high) on the codes where high < 255 -> DequantizeLinear
Weights are int8 initializers with one scale per output channel; biases are float32, or int32 for onnxruntime.
"""

from __future__ import annotations

import ast
import copy
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from faqd import __version__
from faqd.errors import UserError
from faqd.files import written_beside
from faqd.train.convert import Deployed
from faqd.train.deployed import ChannelAffine, IntegerAverage, IntegerLayer, Requantize
from faqd.train.graph import operand, places, propagate, role, shape, unused

OPSET = 19
INPUT = "input"
OUTPUT = "logits"


def onnx_from_deployed(deployed: Deployed, example: Tensor, metadata: dict[str, str]) -> onnx.ModelProto:
    """Export a deployed student of any flavour. example: (N >= 2, C, H, W) float32, for shapes only."""
    network = copy.deepcopy(deployed.network).float()
    for name, module in list(network.named_modules()):
        twin = _quantized_twin(module, deployed.flavour)
        if twin is not None:
            network.set_submodule(name, twin)
    return onnx_from_network(network, example, metadata)


def onnx_from_network(network: fx.GraphModule, example: Tensor, metadata: dict[str, str]) -> onnx.ModelProto:
    """Export a captured network in evaluation mode: dynamic batch, readable names, no trace of this machine."""
    network = _with_plain_operators(network, example)
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        # torch's exporter warns of its own deprecations; a user can do nothing about them.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
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
    assert program is not None
    model = program.model
    _name(model)
    _strip(model)
    model.producer_name, model.producer_version = "faqd", __version__
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def output_names(count: int) -> list[str]:
    """The names of a file's outputs, in the order in which the network returns them."""
    return [OUTPUT] if count == 1 else [f"{OUTPUT}_{index}" for index in range(count)]


def save(proto: onnx.ModelProto, path: Path) -> None:
    with written_beside(path) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))


# Twins -----------------------------------------------------------------------------------------------------------


def _quantized_twin(module: nn.Module, flavour: str) -> nn.Module | None:
    if isinstance(module, IntegerLayer):
        return _LayerTwin(module)
    if isinstance(module, Requantize):
        return _OnnxruntimeTwin(module) if flavour == "onnxruntime" else _TensorrtTwin(module)
    if isinstance(module, ChannelAffine):
        return _AffineTwin(module)
    return _AverageTwin(module.average) if isinstance(module, IntegerAverage) else None


def _with_plain_operators(network: fx.GraphModule, example: Tensor) -> fx.GraphModule:
    """Averages over all pixels as GlobalAveragePool and flattening as Flatten: what backends run on codes.

    torch's exporter would write a ReduceMean and a chain of Shape, Concat and Reshape.
    """
    network = copy.deepcopy(network)
    propagate(network, example[:2])
    finder = _AverageFinder(network)
    finder.run(example[:2])
    found = {node: _plain_operator(network, node, finder.found) for node in network.graph.nodes}
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


def _plain_operator(network: fx.GraphModule, node: fx.Node, averages: set[fx.Node]) -> nn.Module | None:
    """What stands for `node`; None where torch's exporter does well."""
    if node in averages:
        flat = len(shape(node)) == 2
        return nn.Sequential(_GlobalAverage(), _Flatten()) if flat else _GlobalAverage()
    if role(network, node) != "reshape":
        return None
    before, after = shape(operand(node)), shape(node)
    if after != (before[0], math.prod(before[1:])):
        return None
    return _Flatten() if len(before) > 2 else nn.Identity()


class _AverageFinder(fx.Interpreter):
    """Finds the operators that average all pixels of a map, by what they make of a map of different values."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.network = network
        self.found: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        twin = n.op == "call_module" and isinstance(self.network.get_submodule(str(n.target)), _AverageTwin)
        if (twin or role(self.network, n) == "average") and len(shape(operand(n))) == 4:
            seen = self.env[operand(n)]
            maps = self.env[operand(n)] = torch.arange(seen.numel()).reshape(seen.shape).sin()
            result, wanted = super().run_node(n), maps.mean((2, 3))
            if result.numel() == wanted.numel() and torch.allclose(result.reshape(wanted.shape), wanted, atol=1e-5):
                self.found.add(n)
            self.env[operand(n)] = seen
        return super().run_node(n)


def _emit(operator: str, inputs: tuple[Tensor, ...], like: Tensor, dtype: torch.dtype, **attributes: Any) -> Tensor:
    result: Tensor = torch.onnx.ops.symbolic(operator, inputs, attributes, dtype=dtype, shape=like.shape, version=OPSET)
    return result


class _LayerTwin(nn.Module):
    codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias: Tensor
    bias_scale: Tensor
    bias_zero_point: Tensor

    def __init__(self, layer: IntegerLayer) -> None:
        super().__init__()
        self.operator = layer.operator
        self._layer = [layer]  # not a submodule: its float64 buffers stay out of the file
        self.integer_bias = layer.bias_codes is not None
        self.register_buffer("codes", layer.codes)
        self.register_buffer("weight_scale", layer.weight_scale.float())
        self.register_buffer("weight_zero_point", torch.zeros_like(layer.weight_scale, dtype=torch.int8))
        if layer.bias_codes is not None:
            self.register_buffer("bias", layer.bias_codes)
            self.register_buffer("bias_scale", layer.bias_scale.float())
            self.register_buffer("bias_zero_point", torch.zeros_like(layer.bias_codes))
        else:
            self.register_buffer("bias", layer.bias.float())

    def forward(self, x: Tensor) -> Tensor:
        weight = _emit(
            "DequantizeLinear",
            (self.codes, self.weight_scale, self.weight_zero_point),
            self.codes,
            torch.float32,
            axis=0,
        )
        bias = self.bias
        if self.integer_bias:
            inputs = (self.bias, self.bias_scale, self.bias_zero_point)
            bias = _emit("DequantizeLinear", inputs, self.bias, torch.float32, axis=0)
        if self.operator == "Linear":
            return _emit("Gemm", (x, weight, bias), x.new_empty(x.shape[0], bias.shape[0]), torch.float32, transB=1)
        return self._layer[0].apply_weights(x, weight, bias)


class _TensorrtTwin(nn.Module):
    scale: Tensor
    zero_point: Tensor
    bottom: Tensor
    top: Tensor

    def __init__(self, requantize: Requantize) -> None:
        super().__init__()
        quant = requantize.quant
        if quant.high > 127:
            raise UserError(
                "this student has 8-bit activations 0..255, trained with --target onnxruntime; TensorRT has no such "
                "grid. Train with --target tensorrt for an engine."
            )
        self.rectified, self.clipped = requantize.rectifies, quant.high < 127
        self.register_buffer("scale", requantize.scale.float())
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int8))
        self.register_buffer("bottom", torch.zeros(()))
        self.register_buffer("top", requantize.scale.float() * quant.high)

    def forward(self, x: Tensor) -> Tensor:
        if self.clipped:
            x = _emit("Clip", (x, self.bottom, self.top), x, torch.float32)
        elif self.rectified:
            x = x.relu()
        codes = _emit("QuantizeLinear", (x, self.scale, self.zero_point), x, torch.int8)
        return _emit("DequantizeLinear", (codes, self.scale, self.zero_point), x, torch.float32)


class _OnnxruntimeTwin(nn.Module):
    scale: Tensor
    zero_point: Tensor
    bottom: Tensor
    top: Tensor

    def __init__(self, requantize: Requantize) -> None:
        super().__init__()
        quant = requantize.quant
        self.clipped = not quant.signed and quant.high < 255
        self.register_buffer("scale", requantize.scale.float())
        self.register_buffer("zero_point", torch.tensor(128 if quant.signed else 0, dtype=torch.uint8))
        self.register_buffer("bottom", torch.zeros((), dtype=torch.uint8))
        self.register_buffer("top", torch.tensor(min(quant.high, 255), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        codes = _emit("QuantizeLinear", (x, self.scale, self.zero_point), x, torch.uint8)
        if self.clipped:
            codes = _emit("Clip", (codes, self.bottom, self.top), x, torch.uint8)
        return _emit("DequantizeLinear", (codes, self.scale, self.zero_point), x, torch.float32)


class _AverageTwin(nn.Module):
    def __init__(self, average: Any) -> None:
        super().__init__()
        self.average = average

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.average(x, *args, **kwargs)


class _AffineTwin(nn.Module):
    factor: Tensor
    offset: Tensor

    def __init__(self, affine: ChannelAffine) -> None:
        super().__init__()
        self.register_buffer("factor", affine.factor.float())
        self.register_buffer("offset", affine.offset.float())

    def forward(self, x: Tensor) -> Tensor:
        return _emit("Add", (_emit("Mul", (x, self.factor), x, torch.float32), self.offset), x, torch.float32)


class _GlobalAverage(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _emit("GlobalAveragePool", (x,), x.new_empty(*x.shape[:2], 1, 1), torch.float32)


class _Flatten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _emit("Flatten", (x,), x.new_empty(x.shape[0], math.prod(x.shape[1:])), torch.float32, axis=1)


# Names and metadata ----------------------------------------------------------------------------------------------

_WORDS = {"Clip": "clip", "Relu": "rectified", "QuantizeLinear": "codes", "DequantizeLinear": "real"}


def _name(model: ir.Model) -> None:
    """Name nodes and tensors after the torch modules they come from."""
    graph = model.graph
    scopes = {node: _scope(node) for node in graph}
    taken: set[str] = {value.name for value in [*graph.inputs, *graph.initializers.values()] if value.name}
    for value, name in zip(graph.outputs, output_names(len(graph.outputs)), strict=True):
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
