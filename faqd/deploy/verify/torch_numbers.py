"""The numbers of a deployed student in torch: what its file has to state, and `constants` finds there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from faqd.deploy.verify.numbers import exactly, in_any_order
from faqd.quant import CODES_8
from faqd.quantize import nodes
from faqd.quantize.convert import Deployed
from faqd.quantize.operators.activation import Curve
from faqd.quantize.operators.arithmetic import SUBTRACT
from faqd.quantize.operators.clamp import Clamp
from faqd.quantize.operators.layer import COMPUTE, IntegerLayer
from faqd.quantize.operators.pool import IntegerAverage
from faqd.quantize.operators.registry import numbers_of
from faqd.quantize.operators.requantize import Flavour, Requantize
from faqd.quantize.operators.resize import Interpolate


def torch_constants(deployed: Deployed) -> dict[str, Any]:
    """Every number of the deployed student that its file states, as `constants.wrong_constants` looks for it.

    `layers`: of integers. `roundings`: scale, the codes that may occur, the limits that the file has to state (None
    where nothing that comes in is beyond), and whether all that comes in is zero or above. `others`: of the operators
    between them. What --exclude let in besides layers is not listed.
    """
    network = deployed.network
    positive = _never_negative(network)
    calls = [(n, str(n.target), network.get_submodule(n.target)) for n in network.graph.nodes if n.op == "call_module"]
    return {
        "layers": [_layer(name, module) for _, name, module in calls if isinstance(module, IntegerLayer)],
        "roundings": [
            _rounding(name, module, node.all_input_nodes[0] in positive, deployed.flavour)
            for node, name, module in calls
            if isinstance(module, Requantize)
        ],
        "others": [
            {"layer": place_of_module(name), "number": number, "sha256": in_any_order(values.numpy())}
            for _, name, module in calls
            for number, values in _others(module).items()
        ],
    }


def _never_negative(network: fx.GraphModule) -> set[fx.Node]:
    """The tensors of a deployed student that have no negative values, whatever comes in."""
    found: set[fx.Node] = set()
    for node in network.graph.nodes:
        if _makes_no_negative(network, node) or (
            _keeps_signs(network, node) and found >= set(nodes.values_of(network, node))
        ):
            found.add(node)
    return found


def _makes_no_negative(network: fx.GraphModule, node: fx.Node) -> bool:
    module = nodes.module_of(network, node)
    if isinstance(module, Requantize):
        return not module.quant.signed
    if isinstance(module, Curve):
        return module.never_negative
    return module.low >= 0 if isinstance(module, Clamp) else nodes.role(network, node) == "rectify"


def _keeps_signs(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an operator makes nothing negative of what is not."""
    kinds = ("average", "add", "multiply", *nodes.MOVES)
    known = isinstance(nodes.module_of(network, node), (Requantize, IntegerAverage, Interpolate))
    return known or (nodes.role(network, node) in kinds and node.target not in SUBTRACT)


def _layer(name: str, layer: IntegerLayer) -> dict[str, Any]:
    stored = {"codes": layer.stored_codes, "weight_scale": layer.weight_scale.float(), "bias": layer.bias.float()}
    if layer.bias_codes is not None:
        stored |= {"bias": layer.bias_codes, "bias_scale": layer.bias_scale}
    return {"layer": place_of_module(name), **{key: exactly(values.numpy()) for key, values in stored.items()}}


def _rounding(name: str, rounding: Requantize, nonnegative: bool, flavour: Flavour) -> dict[str, Any]:
    quant = rounding.quant
    all_codes = quant.high - quant.low + 1 == CODES_8  # which a file says by its zero point
    # TensorRT's codes are signed: where nothing negative comes in, its file need not say that they end at zero.
    from_below = rounding.saturates and (flavour == "onnxruntime" or quant.signed or rounding.rectifies)
    return {
        "layer": place_of_module(name),
        "scale": float(rounding.scale),
        "grid": [0 if nonnegative else quant.low, quant.high],
        "low": quant.low if from_below or all_codes else None,
        "high": quant.high if rounding.saturates or all_codes else None,
        "nonnegative": nonnegative,
    }


def _others(module: torch.nn.Module) -> dict[str, Tensor]:
    if isinstance(module, COMPUTE):
        return {name: values.detach() for name, values in module.named_parameters()}
    return numbers_of(module)


def place_of_module(name: str) -> str:
    """What the nodes of a module are called after in the file."""
    return name.removesuffix("_plain").removesuffix("_quant")
