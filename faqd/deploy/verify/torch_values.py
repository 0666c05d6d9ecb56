"""What networks compute in torch, where a bundle is written: what the proof holds its files against."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from faqd.deploy.verify.layers import FLOAT32_BITS, FLOAT_LAYER_BITS, digest
from faqd.deploy.verify.numbers import grids
from faqd.deploy.verify.outputs import compare_outputs
from faqd.deploy.verify.test_vectors import UNDRIVEN, Drive
from faqd.deploy.verify.torch_numbers import place_of_module, torch_constants
from faqd.quantize.calibrate import float_forward
from faqd.quantize.convert import Deployed
from faqd.quantize.outputs import named_outputs, run_batches
from faqd.quantize.student import Student

STORED_VALUES = 2**24
"""Values of one output kept in a bundle, 64 MiB: dense outputs are stored for the first images only."""
BATCH = 64


def stored_outputs(network: torch.nn.Module, inputs: Tensor) -> dict[str, NDArray[np.float32]]:
    """A float network's outputs, each for as many images as STORED_VALUES allows."""
    with torch.no_grad():
        first = named_outputs(network(inputs[:2]))
    rows = {name: max(1, STORED_VALUES // values[0].numel()) for name, values in first.items()}
    found = _arrays(run_batches(network, inputs[: max(rows.values())], BATCH))
    return {name: values[: rows[name]] for name, values in found.items()}


def torch_digests(deployed: Deployed, inputs: Tensor, driven: int = 0) -> dict[str, Any]:
    """What the exported file must hold, number for number, and compute for `inputs`, value for value: codes by place,
    outputs by name. driven: how many of the inputs, the last, are driven probes."""
    constants = torch_constants(deployed)
    found, results = _traced(deployed, inputs, Drive(grids(constants), driven))
    bits = FLOAT32_BITS if deployed.integers_only else FLOAT_LAYER_BITS
    codes = {place: digest(values) for place, values in found.items()}
    outputs = {name: digest(result.numpy(), bits) for name, result in results.items()}
    return {"codes": codes, "outputs": outputs, "output_bits": bits, "driven": driven, **constants}


def torch_codes(deployed: Deployed, inputs: Tensor) -> dict[str, NDArray[Any]]:
    """The integer codes at every rounding of the deployed student, by place."""
    return _traced(deployed, inputs, UNDRIVEN)[0]


def _traced(deployed: Deployed, inputs: Tensor, drive: Drive) -> tuple[dict[str, NDArray[Any]], dict[str, Tensor]]:
    """The codes at every rounding, each before others are handed on for them, and the outputs."""
    found: dict[str, NDArray[Any]] = {}

    def watch(place: str) -> Any:
        def keep(module: Any, operands: tuple[Tensor, ...], result: Tensor) -> Tensor:
            found[place] = module.codes(operands[0]).short().numpy()
            handed_on = drive(place, found[place])
            return result if handed_on is found[place] else torch.from_numpy(handed_on) * module.scale.double()

        return keep

    modules = deployed.requantizers()
    hooks = [module.register_forward_hook(watch(place_of_module(name))) for name, module in modules.items()]
    results = named_outputs(deployed(inputs))
    for hook in hooks:
        hook.remove()
    return found, results


@torch.no_grad()
def as_trained(student: Student, deployed: Deployed, inputs: Tensor) -> dict[str, Any]:
    """The network as it was trained (batch norm apart, float32) against the deployed one: outputs, and each layer."""
    trained: dict[str, Tensor] = {}
    quantizers = student.quantizers()
    hooks = [
        module.register_forward_hook(lambda m, _, y, n=name: trained.update({n: (y / m.scale).round().short()}))
        for name, module in quantizers.items()
    ]
    few = inputs[:64]
    student.network.eval()(few)
    for hook in hooks:
        hook.remove()
    codes = torch_codes(deployed, few)
    fillings = {place_of_module(name): module.filling for name, module in deployed.requantizers().items()}
    layers = {}
    for name in (name for name in quantizers if name in codes):
        wanted = trained[name].numpy()
        found = codes[name]
        if wanted.ndim > 1:  # a tensor of the user's own has no channels
            found = fillings[name].without(found)
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
