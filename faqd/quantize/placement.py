"""Where quantizers go in a captured network, and which grid each one has: the whole policy in one place.

1. A convolution or linear layer reads codes. So does an average, whose result gets a scale of its own, and a product of
   two tensors, on both sides.
2. At an addition, one operand may stay float: the output of a convolution that nothing else reads (TensorRT fuses
   convolution, sum, activation and rounding into one kernel only so). All other operands are quantized.
3. A quantized tensor is quantized for every reader. Operators that only move values pass codes through. So does a
   concatenation: all tensors that it joins have one scale and one grid.
4. Grids: the network input, activations other than ReLU and its limited kin, and whatever can be negative have 8 signed
   bits; behind a ReLU, the chosen bits; averages of non-negative values, 0..127. Weights have the chosen bits, 8 in the
   first and the last layer. Asymmetric (`QuantConfig`): all 256 codes instead, but of the network input, and of what
   is read beside zeros that no code can stand for once the codes are moved (`_beside_zeros`).
5. Layers that `QuantConfig.exclude` names stay float, and nothing is rounded on their account; nor on that of what has
   no integer form, and of sums, products and averages beside it (`islands`). They read floats where there are any.
6. Products of two activations stay float as well, unless `QuantConfig.attention` says int8: then each operand is
   rounded right in front of them, so that queries, keys and values have scales of their own. These codes are never
   moved: only a layer's bias makes up for that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from faqd.errors import UserError
from faqd.quant import (
    FLOAT_BITS,
    POOLED_8,
    SIGNED_8,
    Quant,
    activation_quant,
    asymmetric_quant,
    weight_quant,
)
from faqd.quantize import nodes
from faqd.quantize.attention import integer_products
from faqd.quantize.capture.validate import float_by_themselves
from faqd.quantize.config import QuantConfig
from faqd.quantize.islands import with_shores
from faqd.quantize.operators.arithmetic import SUBTRACT, Scaled
from faqd.quantize.operators.layer import CONVOLUTIONS, TRANSPOSED
from faqd.quantize.operators.registry import NEVER_NEGATIVE
from faqd.quantize.operators.row import Role
from faqd.quantize.quantizers.layers import latent_weight


@dataclass(frozen=True)
class Placement:
    """activations: the node whose output is rounded -> its grid. weights: the layer node -> its weight grid.

    shared: groups of nodes in `activations` that have one scale. floats: the nodes that stay float, of which `alone` by
    themselves, because they have no integer form. asymmetric: those in `activations` whose lowest code calibration
    chooses.
    """

    activations: dict[fx.Node, Quant]
    weights: dict[fx.Node, Quant]
    shared: list[list[fx.Node]]
    floats: set[fx.Node]
    alone: set[fx.Node]
    asymmetric: set[fx.Node]


def place(traced: fx.GraphModule, bits: QuantConfig) -> Placement:
    """Decide every quantizer of `traced` (shapes propagated). UserError for an operator that has no rule."""
    excluded = excluded_nodes(traced, bits.exclude)
    products = integer_products(traced, excluded) if bits.attention == "int8" else set()
    alone = float_by_themselves(traced, excluded | products, bits.strict)
    floats = excluded | with_shores(traced, alone)
    reader = _Reader(traced, floats)
    weights = _weight_grids(reader, bits)
    if bits.activations == FLOAT_BITS:
        return Placement({}, weights, [], floats, alone, set())
    rounded: set[fx.Node] = set()
    for node in traced.graph.nodes:
        kind = "constant" if nodes.is_own(node) else reader.role(node)  # of its own tensors: a number in the file
        if kind in ("compute", "average"):
            rounded |= reader.sources(nodes.operand(node))
        elif kind == "multiply":
            rounded.update(*(reader.sources(operand) for operand in nodes.tensor_inputs(node)))
    for node in traced.graph.nodes:
        if reader.role(node) == "add":
            rounded |= _operands_to_round(reader, node, rounded)
    multiplied = {operand for product in products for operand in nodes.tensor_inputs(product)}
    rounded |= multiplied
    groups = _groups(reader, rounded)
    movable = rounded - _beside_zeros(reader) - multiplied if bits.asymmetric else set()
    ordered = [node for node in traced.graph.nodes if node in rounded]
    grids = {node: _grid(reader, groups[node], bits, movable.issuperset(groups[node])) for node in ordered}
    shared = {id(group): group for group in groups.values() if len(group) > 1}
    asymmetric = {node for node, grid in grids.items() if grid == SIGNED_8 and movable.issuperset(groups[node])}
    return Placement(grids, weights, list(shared.values()), floats, alone, asymmetric)


def excluded_nodes(traced: fx.GraphModule, patterns: tuple[str, ...]) -> set[fx.Node]:
    """The nodes in whose place one of the regular expressions is found. UserError for one that fits nothing."""
    names = nodes.places(traced)
    found: set[fx.Node] = set()
    for pattern in patterns:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise UserError(f"--exclude {pattern}: not a regular expression ({error}).") from None
        fits = {
            node
            for node, name in names.items()
            if node.op.startswith("call") and any(map(expression.search, (name, node.meta.get(nodes.PART_OF, name))))
        }
        if not fits:
            layers = [names[n] for n in traced.graph.nodes if nodes.role(traced, n) == "compute"]
            raise UserError(
                f"--exclude {pattern}: fits no module path of the network; its layers are {', '.join(layers)}."
            )
        found |= fits
    return found


def _operands_to_round(reader: _Reader, addition: fx.Node, rounded: set[fx.Node]) -> set[fx.Node]:
    sources = [reader.sources(operand) for operand in nodes.tensor_inputs(addition)]
    single = [next(iter(s)) for s in sources if len(s) == 1]
    free = [s for s in single if s not in rounded and reader.ends_a_layer(s) and len(s.users) == 1]
    kept_float = max(free, key=reader.layers_before, default=None)
    return {node for group in sources for node in group if node is not kept_float}


def _groups(reader: _Reader, rounded: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each rounded node the nodes that share its scale, itself included, in graph order."""
    groups = {node: [node] for node in reader.traced.graph.nodes if node in rounded}
    for node in reader.traced.graph.nodes:
        if reader.role(node) != "concat":
            continue
        joined = reader.sources(node)
        if joined <= rounded and len(joined) > 1:
            members = {member for source in joined for member in groups[source]}
            union = [member for member in groups if member in members]
            groups |= dict.fromkeys(union, union)
    return groups


def _beside_zeros(reader: _Reader) -> set[fx.Node]:
    """The nodes whose codes stay around zero: the network input, and what is read with zeros between or beside it."""
    found = {node for node in reader.traced.graph.nodes if node.op == "placeholder"}
    for node in reader.traced.graph.nodes:
        module: Any = nodes.module_of(reader.traced, node)
        counted = isinstance(module, nn.AvgPool1d | nn.AvgPool2d) and module.count_include_pad and module.padding != 0
        if isinstance(module, TRANSPOSED) or counted:
            found |= reader.sources(nodes.operand(node))
    return found


def _grid(reader: _Reader, group: list[fx.Node], bits: QuantConfig, asymmetric: bool) -> Quant:
    if any(reader.can_be_negative(node) or reader.role(node) == "curve" for node in group):
        return SIGNED_8
    if all(reader.role(node) == "average" for node in group):
        return asymmetric_quant(0) if asymmetric else POOLED_8
    return activation_quant(bits.activations, bits.target, asymmetric=asymmetric)


def _weight_grids(reader: _Reader, bits: QuantConfig) -> dict[fx.Node, Quant]:
    layers = [n for n in reader.traced.graph.nodes if reader.role(n) == "compute" and not nodes.is_own(n)]
    if not layers:
        raise UserError("the network has no convolution or linear layer to quantize.")
    if bits.weights == FLOAT_BITS:
        return {}
    axis = 0 if bits.per_channel else None
    whole = _Reader(reader.traced, set())  # where the first layer stays float, no other one becomes the first
    first = {node for node in layers if whole.layers_before(node) == 1}
    last = {node for node in layers if not whole.layer_follows(node)}
    outer = {node.target for node in first | last}
    return {node: weight_quant(8 if node.target in outer else bits.weights, axis) for node in layers}


def _has_plain_kernel(layer: nn.Module | None) -> bool:
    """Whether a convolution gives multiples or means of the values that it reads, as a blur does: in each channel all
    weights are small whole multiples of one."""
    if not isinstance(layer, CONVOLUTIONS):
        return False
    weights = latent_weight(layer).detach().flatten(1)
    return _are_multiples(weights[:1]) and _are_multiples(weights)  # of most layers the first channel tells


def _are_multiples(weights: Tensor) -> bool:
    magnitudes = weights.double().abs()
    least = magnitudes.where(magnitudes > 0, torch.inf).amin(1, keepdim=True)
    ratios = magnitudes / least
    return bool((ratios - ratios.round()).abs().max() < 1e-5 and ratios.max() <= MOST_MULTIPLE)


MOST_MULTIPLE = 36
"""Of the least weight of a kernel, as in one of five binomial numbers by five."""
_MULTIPLES = (Scaled, nn.LeakyReLU, nn.PReLU)
"""What gives multiples of the values that it reads."""


class _Reader:
    """Questions about one captured network, answered by walking its graph once: paths that part and meet again, as
    around every gate, double with each."""

    def __init__(self, traced: fx.GraphModule, excluded: set[fx.Node]) -> None:
        self.traced = traced
        self._excluded = excluded
        self._depth: dict[fx.Node, int] = {}
        self._sources: dict[fx.Node, set[fx.Node]] = {}
        self._negative: dict[fx.Node, bool] = {}
        self._combined: dict[fx.Node, set[fx.Node]] = {}
        self._multiplied: dict[fx.Node, set[fx.Node]] = {}
        for node in traced.graph.nodes:
            before = max((self._depth[n] for n in node.all_input_nodes), default=0)
            self._depth[node] = before + (self.role(node) == "compute")
            self._sources[node] = self._find_sources(node)
            self._negative[node] = self._find_negative(node)
            self._combined[node] = self._find_combined(node)
            self._multiplied[node] = self._find_multiplied(node)

    def role(self, node: fx.Node) -> Role:
        return "other" if node in self._excluded else nodes.role(self.traced, node)

    def sources(self, node: fx.Node) -> set[fx.Node]:
        """The nodes that made the values of `node`, behind operators that only move or join them."""
        return self._sources[node]

    def _find_sources(self, node: fx.Node) -> set[fx.Node]:
        if self.role(node) == "reshape" and nodes.is_tensor(nodes.operand(node)):
            return self._sources[nodes.operand(node)]
        if self.role(node) == "concat":
            joined = set().union(*(self._sources[operand] for operand in nodes.tensor_inputs(node)))
            return {node} if any(self._needs_its_own_scale(source, joined) for source in joined) else joined
        return {node}

    def _needs_its_own_scale(self, source: fx.Node, joined: set[fx.Node]) -> bool:
        """Whether what is joined cannot share the scale of `source`: that of the network input is its largest value;
        and multiples or means of codes that are rounded to those very codes would be ties, every second half."""
        return source.op == "placeholder" or bool(self._multiplied[source] & joined)

    def _find_multiplied(self, node: fx.Node) -> set[fx.Node]:
        """The nodes of whose codes `node` gives multiples or means, however they are written."""
        kind, module = self.role(node), nodes.module_of(self.traced, node)
        if kind in ("average", "norm") or self._is_multiple(node) or (kind == "compute" and _has_plain_kernel(module)):
            return self._combined[nodes.operand(node)]
        if kind in ("rectify", "clamp", "reshape", "concat") or isinstance(module, Scaled):
            return set().union(*(self._multiplied[operand] for operand in nodes.tensor_inputs(node)))
        return set()

    def _find_combined(self, node: fx.Node) -> set[fx.Node]:
        """The nodes that made the values of `node`, and those whose codes it is computed from."""
        read = nodes.tensor_inputs(node)
        if self.role(node) == "add":
            return self._sources[node].union(*(self._sources[operand] for operand in read))
        if self.role(node) in ("rectify", "clamp", "norm", *nodes.MOVES) or isinstance(
            nodes.module_of(self.traced, node), _MULTIPLES
        ):
            return self._sources[node].union(*(self._combined[operand] for operand in read))
        return self._sources[node]

    def _is_multiple(self, node: fx.Node) -> bool:
        module = nodes.module_of(self.traced, node)
        if isinstance(module, Scaled) and isinstance(module.factor, float) and isinstance(module.offset, float):
            return abs(module.factor) != 1.0 or module.offset != 0.0
        return isinstance(module, _MULTIPLES)

    def can_be_negative(self, node: fx.Node) -> bool:
        return self._negative[node]

    def _find_negative(self, node: fx.Node) -> bool:
        kind = nodes.role(self.traced, node)  # a sign is a fact of what stays float as well
        module: Any = self.traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        if kind == "rectify" or isinstance(module, NEVER_NEGATIVE) or (kind == "clamp" and module.low >= 0):
            return False
        if kind == "reshape":
            return self._negative[nodes.operand(node)]
        if kind in ("average", "add", "multiply", "concat") and node.target not in SUBTRACT:
            return any(self._negative[operand] for operand in nodes.tensor_inputs(node))
        return True

    def ends_a_layer(self, node: fx.Node) -> bool:
        """Whether `node` is a convolution or linear layer, or the batch norm that is folded into one."""
        if self.role(node) == "norm":
            before = nodes.operand(node)
            return self.role(before) == "compute" and len(before.users) == 1
        return self.role(node) == "compute"

    def layers_before(self, node: fx.Node) -> int:
        """Convolution and linear layers on the longest path to `node`, itself included."""
        return self._depth[node]

    def layer_follows(self, node: fx.Node) -> bool:
        return any(self.role(reader) == "compute" for reader in nodes.depending_on(node))
