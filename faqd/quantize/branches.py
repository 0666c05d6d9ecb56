"""What the outputs of a captured network are made of. Nothing is known of the task.

Where an output is a concatenation, each operand is a branch; what comes out of a sigmoid or a softmax are
probabilities.
"""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn import functional

from faqd.fidelity import Branch
from faqd.quantize import nodes
from faqd.quantize.operators.registry import NEVER_NEGATIVE
from faqd.quantize.outputs import graph_outputs

PROBABILITIES = (*NEVER_NEGATIVE, nn.Softmax, nn.Softmax2d)
SOFTMAX = (torch.softmax, functional.softmax, "softmax")


def branches_of(network: fx.GraphModule) -> dict[str, tuple[Branch, ...]]:
    """By output, in the order of its channels."""
    return {name: tuple(_branches(network, node)) for name, node in graph_outputs(network).items()}


def is_probability(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` is a sigmoid or a softmax."""
    return isinstance(nodes.module_of(network, node), PROBABILITIES) or node.target in SOFTMAX


def _branches(network: fx.GraphModule, node: fx.Node, start: int = 0) -> list[Branch]:
    """The branches of `node` (B, C, ...) in order; its first channel is number `start` of the output."""
    width = nodes.shape(node)[1]
    operands = nodes.tensor_inputs(node)
    if nodes.role(network, node) == "concat" and sum(nodes.shape(operand)[1] for operand in operands) == width:
        found: list[Branch] = []
        for operand in operands:
            found += _branches(network, operand, start + sum(b.end - b.start for b in found))
        return found
    return [Branch(start, start + width, is_probability(network, node))]
