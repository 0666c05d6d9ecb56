"""From a trained student to the deployed one: batch norm folded, integers final, arithmetic exact.

Two flavours share weight codes and activation scales. `tensorrt`: float biases, float convolution outputs before a
residual sum. `onnxruntime`: int32 biases, and codes on convolution outputs that are added. `float` is the same graph
unquantized, the honest baseline for speed.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from faqd.calib.ranges import scale_max
from faqd.errors import UserError
from faqd.quant import FLOAT_BITS, SIGNED_8
from faqd.quantize import nodes
from faqd.quantize.attention import product_on_codes
from faqd.quantize.lowering.fold_batch_norm import Changes, fold_layer, quantizer_of
from faqd.quantize.lowering.fold_own_tensors import fold_own_tensors
from faqd.quantize.lowering.insert_requantize import (
    Again,
    flatten_behind_rounding,
    quantize_sums,
    reach_that_matters,
    requantize_behind_moves,
    round_before_moves,
    summed_layers,
    unrounded_layers,
)
from faqd.quantize.lowering.number_types import retyped, settle_numbers
from faqd.quantize.lowering.offsets import Moved, Offsets, place_offsets
from faqd.quantize.lowering.pad_channels import fill_up_channels, image_layers
from faqd.quantize.operators.clamp import Clamp
from faqd.quantize.operators.registry import exact_form_of
from faqd.quantize.operators.requantize import Flavour, Requantize
from faqd.quantize.quantizers.activation import ActivationQuantizer
from faqd.quantize.student import Student, computes_floats, input_quantizer

HIGHEST_OUTPUT = 126 + (5**0.5 - 1) / 2
"""What the largest output of a layer is in codes. Outputs of low-bit layers are often simple fractions of the largest:
at 127, half of it would be 63.5, a tie that float32 and exact arithmetic round differently."""


@dataclass(frozen=True)
class Deployed:
    """network: a graph module over float64 tensors. changes: what this flavour cannot hold as trained. integers_only:
    no layer multiplies floats, and there is no operator that only --exclude let in."""

    network: fx.GraphModule
    flavour: Flavour
    changes: Changes
    integers_only: bool

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

    output_scales: for the onnxruntime flavour, the scale of every convolution output that training left float and
    a sum reads, by place; `collect_output_scales` finds them.
    """
    return _converted(student, flavour, output_scales or {}, for_int8=flavour == "tensorrt")


def _converted(student: Student, flavour: Flavour, output_scales: dict[str, float], *, for_int8: bool) -> Deployed:
    """for_int8: whether codes have to be those of int8."""
    if student.config.activations == FLOAT_BITS and flavour != "float":
        raise UserError("a student with 32-bit activations has no integer form; distil it with --act-bits 1 to 8.")
    network = copy.deepcopy(student.network).eval().cpu()
    changes = Changes()
    fold_own_tensors(network)
    integers_only = not any(computes_floats(network, node) for node in network.graph.nodes)
    nodes.unshare(network)
    offsets = Offsets()
    if flavour != "float":
        _absorb_clamps(network)
        offsets = place_offsets(network, for_int8=for_int8)
    if flavour == "onnxruntime":
        flatten_behind_rounding(network)
        round_before_moves(network)
        quantize_sums(network, output_scales)
    if flavour != "float":
        requantize_behind_moves(network, flavour == "onnxruntime")
    unrounded = set(unrounded_layers(network)) if flavour == "onnxruntime" else set()
    of_the_image = image_layers(network, unrounded)
    for node in list(network.graph.nodes):
        kind = nodes.role(network, node)
        if kind == "compute":
            fold_layer(network, node, flavour, changes, offsets, of_the_image, stays_float=node in unrounded)
        elif kind == "average" and flavour != "float" and input_quantizer(network, node) is not None:
            row = nodes.row_of(network, node)
            assert row is not None and row.on_codes is not None
            _replace(network, node, row.on_codes(_called(network, node), quantizer_of(network, node).scale))
        elif flavour != "float" and (product := product_on_codes(network, node)) is not None:
            _replace(network, node, product)
    for node in network.graph.nodes:
        new = _deployed_module(network, node, flavour, offsets)
        if new is not None:
            network.set_submodule(str(node.target), new)
    if flavour == "onnxruntime":
        fill_up_channels(network, of_the_image)
    network.delete_all_unused_submodules()
    network.graph.eliminate_dead_code()
    settle_numbers(network)
    retyped(network, torch.float32, torch.float64)
    network.graph.lint()
    network.recompile()
    return Deployed(network.double(), flavour, changes, integers_only and not changes.floats and not changes.unrounded)


def _deployed_module(network: fx.GraphModule, node: fx.Node, flavour: Flavour, offsets: Offsets) -> nn.Module | None:
    """What stands for a quantizer, or for a batch norm that was not folded; None for any other module."""
    module = nodes.module_of(network, node)
    if isinstance(module, ActivationQuantizer):
        if flavour == "float":
            return nn.ReLU() if module.rectifies else nn.Identity()
        offset = module.offset if isinstance(module, Moved) else 0
        return Requantize(module.scale, module.quant, module.rectifies, not isinstance(module, Again), offset)
    exact = None if flavour == "float" else exact_form_of(module)
    added = [offsets.added[node]] if node in offsets.added else []
    return None if exact is None else exact(module, len(nodes.shape(node)), *added)


def _absorb_clamps(network: fx.GraphModule) -> None:
    """Limits that only a rounding reads become limits of its codes: rounding is monotone, so nothing else changes.

    Not where roundings share a scale: what reads their concatenation needs the grid that holds them all.
    """
    uses = Counter(id(m.scale) for m in network.modules() if isinstance(m, ActivationQuantizer))
    for node in network.graph.nodes:
        clamp = nodes.module_of(network, node)
        if not isinstance(clamp, Clamp) or len(node.users) != 1:
            continue
        (reader,) = node.users
        quantizer = nodes.module_of(network, reader)
        if not isinstance(quantizer, ActivationQuantizer) or uses[id(quantizer.scale)] > 1:
            continue
        scale = float(quantizer.scale.detach().float())
        low, high = (float(np.rint(np.float64(np.float32(limit)) / scale)) for limit in (clamp.low, clamp.high))
        if not low <= 0 < high:
            continue  # limits that leave no grid around zero stay an operator of their own
        limited = copy.deepcopy(quantizer)
        limited.quant = replace(
            quantizer.quant, low=int(max(low, quantizer.quant.low)), high=int(min(high, quantizer.quant.high))
        )
        limited.rectifies = low == 0
        network.set_submodule(str(reader.target), limited)
        node.replace_all_uses_with(nodes.operand(node))
    network.graph.eliminate_dead_code()


@torch.no_grad()
def collect_output_scales(student: Student, batches: Iterable[Tensor]) -> dict[str, float]:
    """Scales for the convolution outputs that training left float before a sum, from the deployed student's own values.

    The largest magnitude seen that matters becomes HIGHEST_OUTPUT: these roundings were not trained, so nothing of them
    may be clipped that would be seen behind the sum.
    """
    deployed = _converted(student, "tensorrt", {}, for_int8=False).network
    wanted = {str(node.target): reach_that_matters(deployed, node) for node in summed_layers(deployed)}
    observed: dict[str, list[float]] = {name: [] for name in wanted}

    def watch(name: str) -> Any:
        return lambda module, inputs, output: observed[name].append(min(float(output.abs().max()), wanted[name]))

    hooks = [deployed.get_submodule(name).register_forward_hook(watch(name)) for name in wanted]
    for batch in batches:
        deployed(batch.double())
    for hook in hooks:
        hook.remove()
    room = SIGNED_8.high / HIGHEST_OUTPUT
    return {name: room * scale_max(np.asarray(values, np.float32), SIGNED_8) for name, values in observed.items()}


def _called(network: fx.GraphModule, node: fx.Node) -> Any:
    if node.op == "call_module":
        return network.get_submodule(str(node.target))
    return node.target


def _replace(network: fx.GraphModule, node: fx.Node, module: nn.Module) -> None:
    """Let `node` call `module`, which takes its path, or for a function the path of its place."""
    path = nodes.places(network)[node]
    if node.op == "call_module":
        network.set_submodule(path, module)
    else:
        network.add_submodule(path, module)
    node.op, node.target = "call_module", path
