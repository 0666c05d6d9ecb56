"""What networks compute in torch, where a bundle is written: what the proof holds its files against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from faqd.at_once import images_at_once
from faqd.bundle import STORED_VALUES
from faqd.deploy.verify.layers import FLOAT32_BITS, FLOAT_LAYER_BITS, digest
from faqd.deploy.verify.numbers import grids
from faqd.deploy.verify.outputs import compare_outputs
from faqd.deploy.verify.sketches import sketched
from faqd.deploy.verify.test_vectors import UNDRIVEN, Drive, undriven
from faqd.deploy.verify.torch_numbers import place_of_module, torch_constants
from faqd.quantize import nodes
from faqd.quantize.calibrate import float_forward
from faqd.quantize.convert import Deployed
from faqd.quantize.operators.registry import is_exact
from faqd.quantize.operators.requantize import Requantize
from faqd.quantize.outputs import named_outputs, run_batches
from faqd.quantize.student import Student

BATCH = 64


def stored_outputs(network: torch.nn.Module, inputs: Tensor) -> dict[str, NDArray[np.float32]]:
    """A float network's outputs, each for as many images as STORED_VALUES allows."""
    with torch.no_grad():
        first = named_outputs(network(inputs[:2]))
    rows = {name: max(1, STORED_VALUES // values[0].numel()) for name, values in first.items()}
    found = _arrays(run_batches(network, inputs[: max(rows.values())], BATCH))
    return {name: values[: rows[name]] for name, values in found.items()}


def torch_digests(
    deployed: Deployed, inputs: Tensor, driven: int = 0, tensors: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What the exported file must hold, number for number, and compute for `inputs`, value for value: codes by place,
    outputs by name, and sketches of what float islands compute by the name in the file.

    driven: how many of the inputs, the last, are driven probes. tensors: what results of nodes are called there.
    """
    constants = torch_constants(deployed)
    found, floats, results = _traced(deployed, inputs, Drive(grids(constants), driven), tensors or {})
    bits = FLOAT32_BITS if deployed.integers_only else FLOAT_LAYER_BITS
    codes = {place: digest(values) for place, values in found.items()}
    outputs = {name: digest(result.numpy(), bits) for name, result in results.items()}
    return {
        "codes": codes,
        "floats": floats,
        "outputs": outputs,
        "output_bits": bits,
        "driven": driven,
        **constants,
    }


def torch_codes(deployed: Deployed, inputs: Tensor) -> dict[str, NDArray[Any]]:
    """The integer codes at every rounding of the deployed student, by place."""
    return _traced(deployed, inputs, UNDRIVEN, {})[0]


class _WithFloats(fx.Interpreter):
    """Runs a deployed student and keeps sketches of what its float islands compute, without driven probes."""

    def __init__(self, network: fx.GraphModule, tensors: Mapping[str, str], probes: int, driven: int) -> None:
        super().__init__(network)
        self.sketches: dict[str, list[float]] = {}
        floats = _float_nodes(network)
        self._names = {node: tensors[node.name] for node in floats if node.name in tensors}
        self._probes, self._driven = probes, driven

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self._names and isinstance(result, Tensor) and result.is_floating_point():
            kept = undriven(result.numpy(), self._probes, self._driven)
            self.sketches[self._names[n]] = sketched(kept)
        return result


def _float_nodes(network: fx.GraphModule) -> set[fx.Node]:
    """What a deployed student computes in floats, from where it begins to the next rounding."""
    found = set[fx.Node]()
    for node in network.graph.nodes:
        module = nodes.module_of(network, node)
        begins = nodes.role(network, node) in ("other", "compute") and not is_exact(module)
        goes_on = not (found.isdisjoint(node.all_input_nodes) or isinstance(module, Requantize))
        if node.op.startswith("call") and (begins or goes_on):
            found.add(node)
    return found


def _traced(
    deployed: Deployed, inputs: Tensor, drive: Drive, tensors: Mapping[str, str]
) -> tuple[dict[str, NDArray[Any]], dict[str, list[float]], dict[str, Tensor]]:
    """The codes at every rounding, each before others are handed on for them, sketches of floats, and the outputs."""
    found: dict[str, NDArray[Any]] = {}

    def watch(place: str) -> Any:
        def keep(module: Any, operands: tuple[Tensor, ...], result: Tensor) -> Tensor:
            found[place] = module.codes(operands[0]).short().numpy()
            handed_on = drive(place, found[place])
            return result if handed_on is found[place] else torch.from_numpy(handed_on) * module.scale.double()

        return keep

    modules = deployed.requantizers()
    hooks = [module.register_forward_hook(watch(place_of_module(name))) for name, module in modules.items()]
    run = _WithFloats(deployed.network, tensors, len(inputs), drive.driven)
    with torch.no_grad():
        results = named_outputs(run.run(inputs.double()))
    for hook in hooks:
        hook.remove()
    return found, run.sketches, results


@torch.no_grad()
def as_trained(student: Student, deployed: Deployed, inputs: Tensor) -> dict[str, Any]:
    """The network as it was trained (batch norm apart, float32) against the deployed one: outputs, and each layer."""
    trained: dict[str, Tensor] = {}
    quantizers = student.quantizers()
    hooks = [
        module.register_forward_hook(lambda m, _, y, n=name: trained.update({n: (y / m.scale).round().short()}))
        for name, module in quantizers.items()
    ]
    few = inputs[: images_at_once(inputs.shape[2:], BATCH)]
    student.network.eval()(few)
    for hook in hooks:
        hook.remove()
    codes = torch_codes(deployed, few)
    roundings = {place_of_module(name): module for name, module in deployed.requantizers().items()}
    layers = {}
    for name in (name for name in quantizers if name in codes):
        wanted = trained[name].numpy()
        found = codes[name] + roundings[name].offset
        if wanted.ndim > 1:  # a tensor of the user's own has no channels
            found = roundings[name].filling.without(found)
        found = found.reshape(wanted.shape)
        layers[name] = round(float(np.mean(wanted == found)), 6)
    outputs = (_arrays(run_batches(network, inputs, BATCH)) for network in (deployed, student.network))
    return {**compare_outputs(*outputs), "equal_codes_per_layer": layers}


def float_outputs_in_torch(student: Student, inputs: Tensor) -> dict[str, NDArray[np.float32]]:
    """The outputs of the user's own modules with nothing rounded: what the lowering forgets of them, both flavours have
    forgotten too."""
    with float_forward(student):
        return stored_outputs(student.network, inputs)


def _arrays(outputs: dict[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    return {name: values.numpy() for name, values in outputs.items()}
