"""What is computed of a network's own tensors alone, such as a table of positions, as the numbers that it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from faqd.quantize import nodes


@torch.no_grad()
def fold_own_tensors(network: fx.GraphModule) -> None:
    """Put tensors in the place of calls that depend on no image and on no size: float32 ones, as a file has them.

    In a converted network, so that torch computes with the numbers that its file holds.
    """
    values: dict[fx.Node, Any] = {}
    places = nodes.places(network)
    taken = {name for name, _ in (*network.named_modules(), *network.named_parameters(), *network.named_buffers())}
    for node in list(network.graph.nodes):
        if node.op == "get_attr":
            values[node] = _wide(nodes.held_tensor(network, node))
        elif node.op.startswith("call") and all(read in values for read in node.all_input_nodes):
            values[node] = _called(network, node, values)
    for node, value in values.items():
        if node.op == "get_attr" or not isinstance(value, Tensor) or all(reader in values for reader in node.users):
            continue
        name = nodes.unused(f"{places[node]}_value".replace(".", "_"), taken)
        network.register_buffer(name, value.float() if value.is_floating_point() else value)
        with network.graph.inserting_before(node):
            new = network.graph.get_attr(name)
        new.meta |= {key: held for key, held in node.meta.items() if key != "nn_module_stack"}
        node.replace_all_uses_with(new)
    network.graph.eliminate_dead_code()


def _called(network: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args: Any = fx.node.map_arg(node.args, values.__getitem__)
    kwargs: Any = fx.node.map_arg(node.kwargs, values.__getitem__)
    module = nodes.module_of(network, node)
    target: Any = node.target if module is None else module.double()
    return tree_map_only(Tensor, _wide, target(*args, **kwargs))


def _wide(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value
