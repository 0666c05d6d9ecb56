"""Numbers of float islands as the file has them: torch computes with them in float64, and they are float32 ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils._pytree import tree_map_only

from faqd.quantize import nodes

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def settle_numbers(network: fx.GraphModule) -> None:
    """Round the numbers that operators without an integer form are told (an eps, a scale, an exponent) to float32.

    At ties, where a value lies all but in the middle between two codes, the last bits of such a number would decide.
    """
    for node in network.graph.nodes:
        if nodes.role(network, node) != "other" or not node.op.startswith("call"):
            continue
        module = nodes.module_of(network, node)
        if module is not None:
            _settle(module)
            continue
        if node.target is _ATTENTION and node.kwargs.get("scale") is None:
            queries: Any = node.args[0] if node.args else node.kwargs["query"]
            node.kwargs = {**node.kwargs, "scale": 1 / math.sqrt(nodes.shape(queries)[-1])}
        node.args, node.kwargs = tree_map_only(float, _float32, (node.args, dict(node.kwargs)))


def _settle(module: nn.Module) -> None:
    if type(module).__module__.startswith("torch.nn."):
        for name, value in vars(module).items():
            if isinstance(value, float):
                setattr(module, name, _float32(value))


def _float32(number: float) -> float:
    return float(np.float32(number))


def retyped(traced: fx.GraphModule, before: torch.dtype, after: torch.dtype) -> None:
    """Let functions that are told a type of numbers, as those that make tensors are, be told another one."""
    for node in traced.graph.nodes:
        if node.op != "call_function":
            continue
        args, kwargs = list(node.args), dict(node.kwargs)
        schema = getattr(getattr(node.target, "_schema", None), "arguments", ())
        place = next((index for index, argument in enumerate(schema) if argument.name == "dtype"), None)
        if place is not None and nodes.is_tensor(node) and node.meta["tensor_meta"].dtype == before:
            # The default where it is made.
            if place >= len(args):
                kwargs["dtype"] = kwargs.get("dtype") or before
            else:
                args[place] = args[place] or before
        node.args, node.kwargs = tree_map_only(
            torch.dtype, lambda kind: after if kind == before else kind, (tuple(args), kwargs)
        )
