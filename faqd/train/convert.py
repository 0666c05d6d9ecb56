"""From a trained student to the deployed one: batch norm folded, integers final, arithmetic exact.

Two flavours share weight codes and activation scales. `tensorrt`: float biases, float convolution outputs before a
residual sum. `onnxruntime`: int32 biases and codes on every convolution output. `float` is the same graph
unquantized, the honest baseline for speed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from faqd.calib.ranges import scale_from
from faqd.errors import UserError
from faqd.quant import FLOAT_BITS, SIGNED_8
from faqd.train import graph
from faqd.train.deployed import IntegerAverage, IntegerLayer, Requantize
from faqd.train.prepare import Student, input_quantizer, strided_sample
from faqd.train.quantizers import ActivationQuantizer

Flavour = Literal["tensorrt", "onnxruntime", "float"]

LARGEST_INT8 = 127
LARGEST_BIAS = 2**31 - 1


@dataclass(frozen=True)
class Deployed:
    """network: a graph module over float64 tensors. zeroed: channels per layer whose tiny batch-norm factor would
    overflow an int32 bias, made exact zeros there."""

    network: fx.GraphModule
    flavour: Flavour
    zeroed: dict[str, int]

    def requantizers(self) -> dict[str, Requantize]:
        """By module path, in graph order."""
        modules = dict(self.network.named_modules())
        targets = [str(node.target) for node in self.network.graph.nodes if node.op == "call_module"]
        return {name: module for name in targets if isinstance(module := modules[name], Requantize)}

    def __call__(self, x: Tensor) -> Any:
        with torch.no_grad():
            return self.network(x.double())


def convert(student: Student, flavour: Flavour, output_scales: dict[str, float] | None = None) -> Deployed:
    """The deployed form of `student`, which stays as it is.

    output_scales: for the onnxruntime flavour, the scale of every convolution output that training left float, by
    place; `collect_output_scales` finds them.
    """
    if student.bits.activations == FLOAT_BITS and flavour != "float":
        raise UserError("a student with 32-bit activations has no integer form; distil it with --act-bits 1 to 8.")
    network = copy.deepcopy(student.network).eval().cpu()
    zeroed: dict[str, int] = {}
    if flavour == "onnxruntime":
        _quantize_outputs(network, output_scales or {})
        _requantize_before_layers(network)
    for node in list(network.graph.nodes):
        kind = graph.role(network, node)
        if kind == "compute":
            _fold_layer(network, node, flavour, zeroed)
        elif kind == "average" and flavour != "float":
            _replace(network, node, IntegerAverage(_callable(network, node), _quantizer_of(network, node).scale))
    for node in list(network.graph.nodes):
        module = _module(network, node)
        if isinstance(module, ActivationQuantizer):
            rectify: nn.Module = nn.Identity() if module.quant.signed else nn.ReLU()
            new = Requantize(module.scale, module.quant) if flavour != "float" else rectify
            network.set_submodule(str(node.target), new)
    network.delete_all_unused_submodules()
    network.graph.eliminate_dead_code()
    network.graph.lint()
    network.recompile()
    return Deployed(network.double(), flavour, zeroed)


@torch.no_grad()
def collect_output_scales(student: Student, batches: Iterable[Tensor]) -> dict[str, float]:
    """Scales for the convolution outputs that training left float, from the deployed student's own values.

    The largest magnitude seen: these roundings were not trained, so nothing of them may be clipped.
    """
    deployed = convert(student, "tensorrt").network
    wanted = {str(node.target): node for node in _float_outputs(deployed)}
    observed: dict[str, list[Any]] = {name: [] for name in wanted}

    def watch(name: str) -> Any:
        return lambda module, inputs, output: observed[name].append(np.abs(strided_sample(output)).max(keepdims=True))

    hooks = [deployed.get_submodule(name).register_forward_hook(watch(name)) for name in wanted]
    for batch in batches:
        deployed(batch.double())
    for hook in hooks:
        hook.remove()
    return {name: scale_from(np.concatenate(values), SIGNED_8, "max") for name, values in observed.items()}


def _float_outputs(network: fx.GraphModule) -> list[fx.Node]:
    """Layers (with their batch norm folded) whose output reaches another operator unrounded."""
    found = []
    for node in network.graph.nodes:
        if not isinstance(_module(network, node), (*graph.COMPUTE, IntegerLayer)):
            continue
        readers = _after_norm(network, node).users
        rounded = all(isinstance(_module(network, r), (ActivationQuantizer, Requantize)) for r in readers)
        if not rounded and not all(reader.op == "output" for reader in readers):
            found.append(node)
    return found


def _after_norm(network: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The batch norm that alone reads `node`, or `node` itself."""
    readers = list(node.users)
    if len(readers) == 1 and graph.role(network, readers[0]) == "norm":
        return readers[0]
    return node


def _quantize_outputs(network: fx.GraphModule, scales: dict[str, float]) -> None:
    for node in _float_outputs(network):
        name = str(node.target)
        if name not in scales:
            raise ValueError(f"{name}: no output scale for the onnxruntime flavour")
        quantizer = ActivationQuantizer(SIGNED_8)
        quantizer.scale.data.fill_(scales[name])
        _insert_after(network, _after_norm(network, node), f"{name}_out", quantizer)


def _requantize_before_layers(network: fx.GraphModule) -> None:
    """onnxruntime fuses a layer only with the rounding right before it: repeat it behind pooling and flatten.

    Rounding codes again with their own scale changes nothing.
    """
    for node in list(network.graph.nodes):
        source = node.args[0] if node.args else None
        if graph.role(network, node) != "compute" or not isinstance(source, fx.Node):
            continue
        if not isinstance(_module(network, source), ActivationQuantizer):
            again = copy.deepcopy(_quantizer_of(network, node))
            _insert_after(network, source, f"{node.target}_in", again, only_for=node)


def _insert_after(
    network: fx.GraphModule, node: fx.Node, path: str, module: nn.Module, only_for: fx.Node | None = None
) -> None:
    network.add_submodule(path, module)
    with network.graph.inserting_after(node):
        new = network.graph.call_module(path, (node,))
    if only_for is None:
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    else:
        only_for.replace_input_with(node, new)


def _fold_layer(network: fx.GraphModule, node: fx.Node, flavour: Flavour, zeroed: dict[str, int]) -> None:
    """Replace a layer and its batch norm: sign into the codes, magnitude into the scale, the rest into the bias."""
    layer = network.get_submodule(str(node.target))
    end = _after_norm(network, node)
    norm = _module(network, end) if end is not node else None
    factor, offset = _affine(norm, layer)
    if flavour == "float":
        new: nn.Module = _float_layer(layer, factor, offset)
    else:
        new = _integer_layer(network, node, layer, factor, offset, flavour, zeroed)
    network.set_submodule(str(node.target), new)
    if end is not node:
        end.replace_all_uses_with(node)
        network.graph.erase_node(end)


def _affine(norm: nn.Module | None, layer: Any) -> tuple[Tensor, Tensor]:
    """float64 (channels,) each: batch norm of (sum + layer.bias) as sum * factor + offset."""
    channels = layer.weight.shape[0]
    bias = layer.bias.detach().double() if layer.bias is not None else torch.zeros(channels, dtype=torch.float64)
    if norm is None:
        return torch.ones(channels, dtype=torch.float64), bias
    bn: Any = norm
    deviation = (bn.running_var.double() + bn.eps).sqrt()
    gamma = bn.weight.detach().double() if bn.weight is not None else torch.ones_like(deviation)
    beta = bn.bias.detach().double() if bn.bias is not None else torch.zeros_like(deviation)
    return gamma / deviation, beta + gamma * (bias - bn.running_mean.double()) / deviation


def _float_layer(layer: Any, factor: Tensor, offset: Tensor) -> nn.Module:
    latent = layer.parametrizations.weight.original if parametrize.is_parametrized(layer, "weight") else layer.weight
    if isinstance(layer, nn.Linear):
        folded: Any = nn.Linear(layer.in_features, layer.out_features)
    else:
        kind = nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Conv2d
        geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
        folded = kind(layer.in_channels, layer.out_channels, *geometry)
    folded.weight.data = (latent.detach().double() * factor.reshape(-1, *[1] * (latent.dim() - 1))).float()
    folded.bias.data = offset.float()
    return folded  # type: ignore[no-any-return]


def _integer_layer(
    network: fx.GraphModule,
    node: fx.Node,
    layer: Any,
    factor: Tensor,
    offset: Tensor,
    flavour: Flavour,
    zeroed: dict[str, int],
) -> IntegerLayer:
    quantizer = layer.parametrizations.weight[0]
    with torch.no_grad():
        codes, scale = quantizer.codes(layer.parametrizations.weight.original)
    per_channel = (-1, *[1] * (codes.dim() - 1))
    codes = codes.double() * factor.sign().reshape(per_channel)
    scale = (scale.double() * factor.abs()).float().double()
    read = _quantizer_of(network, node)
    input_scale = read.scale.detach().float()
    dead = scale == 0
    bias_codes = None
    if flavour == "onnxruntime":
        # Finer biases for coarse grids: the product of code and scale stays the same, the int32 bias step shrinks.
        spread = LARGEST_INT8 // quantizer.quant.high
        codes, scale = codes * spread, (scale / spread).float().double()
        step = (input_scale.double() * scale).float().double()
        overflows = ~dead & (offset.abs() >= LARGEST_BIAS * step)
        if bool(overflows.any()):
            zeroed[str(node.target)] = int(overflows.sum())
        dead = dead | overflows
    if bool(dead.any()):
        # A zero channel is exact with any scale; an ordinary one keeps the int32 bias in range.
        alive = scale[~dead]
        ordinary = float(alive.median()) if alive.numel() else 1.0
        smallest = float(offset.abs().max()) / LARGEST_BIAS / float(input_scale) * 2
        scale = torch.where(dead, torch.tensor(max(ordinary, smallest), dtype=scale.dtype), scale)
        codes = torch.where(dead.reshape(per_channel), torch.zeros_like(codes), codes)
    if flavour == "onnxruntime":
        step = (input_scale.double() * scale.float().double()).float().double()
        bias_codes = (offset / step).round().to(torch.int32)
    input_high = max(-read.quant.low, read.quant.high)
    return IntegerLayer(layer, codes, scale, input_scale, input_high, offset, bias_codes)


def _quantizer_of(network: fx.GraphModule, node: fx.Node) -> ActivationQuantizer:
    found = input_quantizer(network, node)
    if found is None:
        raise ValueError(f"{node.name} reads a tensor that was not quantized")
    return found


def _module(network: fx.GraphModule, node: Any) -> nn.Module | None:
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def _callable(network: fx.GraphModule, node: fx.Node) -> Any:
    if node.op == "call_module":
        return network.get_submodule(str(node.target))
    if node.op == "call_method":
        return getattr(torch.Tensor, str(node.target))
    return node.target


def _replace(network: fx.GraphModule, node: fx.Node, module: nn.Module) -> None:
    """Let `node` call `module`, which takes its path, or for a function the path of its place."""
    path = str(node.target) if node.op == "call_module" else graph.places(network)[node]
    if node.op == "call_module":
        network.set_submodule(path, module)
        return
    network.add_submodule(path, module)
    node.op, node.target = "call_module", path
