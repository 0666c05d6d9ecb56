"""Where quantizers go in a captured network, and which grid each one has: the whole policy in one place.

1. A convolution or linear layer reads codes. So does an average, whose result gets a scale of its own.
2. At an addition, one operand may stay float: the output of a convolution that nothing else reads (TensorRT fuses
   convolution, sum, activation and rounding into one kernel only so). All other operands are quantized.
3. A quantized tensor is quantized for every reader. Operators that only move values pass codes through.
4. Grids: the network input and whatever can be negative have 8 signed bits; behind a ReLU, the chosen bits;
   averages of non-negative values, 0..127. Weights have the chosen bits, 8 in the first and the last layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from faqd.errors import UserError
from faqd.quant import (
    FLOAT_BITS,
    POOLED_8,
    SIGNED_8,
    Quant,
    Rounding,
    Target,
    activation_quant,
    check_bits,
    weight_quant,
)
from faqd.train import graph
from faqd.train.quantizers import ScaleGradient
from faqd.train.support import refuse_unknown


@dataclass(frozen=True)
class Bits:
    """What a student is quantized to. activations: 1-8, or 32 for float. per_channel: weight scales.

    weights: 1-8, or 32 where the activations are float as well: a student without any quantizer.
    rounding: of what is behind a ReLU. scale_gradient: by which those scales learn; a lowered file shows none of it.
    """

    weights: int = 8
    activations: int = 8
    target: Target = "tensorrt"
    per_channel: bool = True
    rounding: Rounding = "nearest"
    scale_gradient: ScaleGradient = "lsq"

    def __post_init__(self) -> None:
        if self.weights == FLOAT_BITS and self.activations != FLOAT_BITS:
            raise UserError("--weight-bits 32: choose 1 to 8; float weights go with --act-bits 32 only.")
        if self.weights != FLOAT_BITS:
            check_bits("--weight-bits", self.weights, 8)
        if self.activations != FLOAT_BITS:
            check_bits("--act-bits", self.activations, 8)

    @property
    def label(self) -> str:
        return f"{self.weights}/{self.activations}"


@dataclass(frozen=True)
class Placement:
    """activations: the node whose output is rounded -> its grid. weights: the layer node -> its weight grid."""

    activations: dict[fx.Node, Quant]
    weights: dict[fx.Node, Quant]


def place(traced: fx.GraphModule, bits: Bits) -> Placement:
    """Decide every quantizer of `traced` (shapes propagated). UserError for an operator that has no rule."""
    refuse_unknown(traced)
    reader = _Reader(traced)
    weights = _weight_grids(reader, bits)
    if bits.activations == FLOAT_BITS:
        return Placement({}, weights)
    rounded: set[fx.Node] = set()
    for node in traced.graph.nodes:
        if reader.role(node) in ("compute", "average"):
            rounded.add(reader.source(graph.operand(node)))
    for node in traced.graph.nodes:
        if reader.role(node) == "add":
            rounded |= _operands_to_round(reader, node, rounded)
    grids = {node: _grid(reader, node, bits) for node in traced.graph.nodes if node in rounded}
    return Placement(grids, weights)


def _operands_to_round(reader: _Reader, addition: fx.Node, rounded: set[fx.Node]) -> set[fx.Node]:
    sources = [reader.source(operand) for operand in graph.tensor_inputs(addition)]
    free = [s for s in sources if s not in rounded and reader.ends_a_layer(s) and len(s.users) == 1]
    kept_float = max(free, key=reader.layers_before, default=None)
    return {source for source in sources if source is not kept_float}


def _grid(reader: _Reader, node: fx.Node, bits: Bits) -> Quant:
    if reader.can_be_negative(node):
        return SIGNED_8
    if reader.role(node) == "average":
        return POOLED_8
    return activation_quant(bits.activations, bits.target)


def _weight_grids(reader: _Reader, bits: Bits) -> dict[fx.Node, Quant]:
    layers = [node for node in reader.traced.graph.nodes if reader.role(node) == "compute"]
    if not layers:
        raise UserError("the network has no convolution or linear layer: there is nothing to quantize.")
    if bits.weights == FLOAT_BITS:
        return {}
    axis = 0 if bits.per_channel else None
    first = {node for node in layers if reader.layers_before(node) == 1}
    last = {node for node in layers if not reader.layer_follows(node)}
    return {node: weight_quant(8 if node in first | last else bits.weights, axis) for node in layers}


class _Reader:
    """Questions about one captured network, answered by walking its graph."""

    def __init__(self, traced: fx.GraphModule) -> None:
        self.traced = traced
        self._depth: dict[fx.Node, int] = {}
        for node in traced.graph.nodes:
            before = max((self._depth[n] for n in node.all_input_nodes), default=0)
            self._depth[node] = before + (self.role(node) == "compute")

    def role(self, node: fx.Node) -> graph.Role:
        return graph.role(self.traced, node)

    def source(self, node: fx.Node) -> fx.Node:
        """The node that made the values of `node`, behind operators that only move them."""
        while self.role(node) == "reshape":
            node = graph.operand(node)
        return node

    def can_be_negative(self, node: fx.Node) -> bool:
        kind = self.role(node)
        if kind == "rectify":
            return False
        if kind in ("average", "reshape", "add", "concat"):
            return any(self.can_be_negative(operand) for operand in graph.tensor_inputs(node))
        return True

    def ends_a_layer(self, node: fx.Node) -> bool:
        """Whether `node` is a convolution or linear layer, or the batch norm that is folded into one."""
        if self.role(node) == "norm":
            before = graph.operand(node)
            return self.role(before) == "compute" and len(before.users) == 1
        return self.role(node) == "compute"

    def layers_before(self, node: fx.Node) -> int:
        """Convolution and linear layers on the longest path to `node`, itself included."""
        return self._depth[node]

    def layer_follows(self, node: fx.Node) -> bool:
        stack, seen = list(node.users), set()
        while stack:
            current = stack.pop()
            if current in seen:
                continue
            seen.add(current)
            if self.role(current) == "compute":
                return True
            stack.extend(current.users)
        return False
