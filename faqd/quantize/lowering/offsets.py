"""What is added in front of roundings, and taken off behind them: to round up, and where int8 holds codes moved.

Rounding up is rounding to nearest of x + scale * shift. Codes that int8 does not hold, such as 0..255, are stored as
code - m (`faqd.quant.int8_offset`): x - scale * m is rounded, and saturation at -128 is then a ReLU in front as well.
What reads them reads scale * m too little, in every value alike. Through what is linear in a constant the difference
goes on; a layer takes it into its bias, for W x = W (x - c) + c * (sum of W); anything else gets it added again. A
convolution that pads has its zeros padded in front, as the code that stands for zero.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from faqd.quant import Quant, int8_offset
from faqd.quantize import nodes
from faqd.quantize.lowering.insert_requantize import Again
from faqd.quantize.operators.arithmetic import SUBTRACT, Offset
from faqd.quantize.operators.pad import Pad
from faqd.quantize.quantizers.activation import ActivationQuantizer
from faqd.quantize.quantizers.layers import weight_quantizer

_PLAIN_SUMS = (operator.add,)


class Moved(ActivationQuantizer):
    """A rounding whose codes have `offset` taken off; behind a ReLU it is their lowest that rectifies."""

    def __init__(self, rounding: ActivationQuantizer, offset: int) -> None:
        super().__init__(Quant(rounding.quant.low - offset, rounding.quant.high - offset), rectifies=False)
        self.scale = rounding.scale
        self.offset = offset


@dataclass(frozen=True)
class Offsets:
    """Of a prepared network. added: layers and batch norms -> what is added to their output. missing: layers -> what
    all they read is too small by. float64 scalars."""

    added: dict[fx.Node, Tensor] = field(default_factory=dict)
    missing: dict[fx.Node, Tensor] = field(default_factory=dict)


def place_offsets(network: fx.GraphModule, *, for_int8: bool) -> Offsets:
    """Rewrite a prepared network whose roundings round up, or, `for_int8`, have codes that int8 holds only moved.

    On a residual it is the branch whose bias takes an addition in: the shortcut has other readers. Where no output may
    be moved, because something else reads it, the addition stands in front of the rounding.
    """
    return _Placing(network, for_int8).run()


class _Placing:
    def __init__(self, network: fx.GraphModule, for_int8: bool) -> None:
        self._network, self._for_int8 = network, for_int8
        self._offsets = Offsets()
        self._missing: dict[fx.Node, Tensor] = {}
        """Of every tensor whose values are too small, by how much."""
        self._whole: dict[fx.Node, fx.Node] = {}
        self._padded: dict[tuple[fx.Node, tuple[int, ...]], fx.Node] = {}

    def run(self) -> Offsets:
        for node in list(self._network.graph.nodes):
            module = nodes.module_of(self._network, node)
            if isinstance(module, ActivationQuantizer):
                self._round(node, module)
            elif any(read in self._missing for read in node.all_input_nodes):
                self._read(node, module)
        return self._offsets

    def _round(self, node: fx.Node, rounding: ActivationQuantizer) -> None:
        offset = int8_offset(rounding.quant) if self._for_int8 else 0
        source, scale = nodes.operand(node), rounding.scale.detach().double()
        amount = scale * (rounding.shift - offset) + self._missing.get(source, 0.0)
        if float(amount):
            self._add(source, node, amount)
        if offset:
            self._missing[node] = scale * offset
            self._network.set_submodule(str(node.target), Moved(rounding, offset))

    def _add(self, source: fx.Node, rounding: fx.Node, amount: Tensor) -> None:
        """To what is rounded: in the bias of a layer that nothing else reads, or else right in front."""
        carrier = self._carrier(source)
        if carrier is not None:
            self._offsets.added[carrier] = self._offsets.added.get(carrier, 0.0) + amount
            return
        path = f"{rounding.target}_shift"
        self._network.add_submodule(path, Offset(amount))
        with self._network.graph.inserting_before(rounding):
            rounding.replace_input_with(source, self._network.graph.call_module(path, (source,)))

    def _carrier(self, source: fx.Node) -> fx.Node | None:
        if source.op == "placeholder" or len(source.users) > 1:
            return None
        if nodes.role(self._network, source) in ("compute", "norm"):
            return source
        return self._branch(source)

    def _branch(self, node: fx.Node) -> fx.Node | None:
        """The layer or batch norm that only the sum `node` reads; None where there is none, or `node` is no sum."""
        operands = nodes.tensor_inputs(node)
        if node.target not in _PLAIN_SUMS or len(operands) != 2 or len(node.args) != 2 or node.kwargs:
            return None
        found = (n for n in operands if len(n.users) == 1 and nodes.role(self._network, n) in ("compute", "norm"))
        return next(found, None)

    def _read(self, node: fx.Node, module: nn.Module | None) -> None:
        """What a tensor that is too small means to an operator that reads it."""
        kind, read = nodes.role(self._network, node), node.all_input_nodes
        if kind == "compute" and module is not None and weight_quantizer(module) is not None:
            self._offsets.missing[node] = self._missing[nodes.operand(node)]
            self._pad_in_front(node, module)
        elif kind in ("reshape", "average") and nodes.operand(node) in self._missing:
            self._missing[node] = self._missing[nodes.operand(node)]
            if isinstance(module, Pad) and module.mode == "constant":
                self._pad_with_the_code_of_zero(node, module)
        elif kind == "concat" and self._alike(read):
            self._missing[node] = self._missing[read[0]]
        elif kind == "add" and len(read) == 2 and len(node.args) == 2 and not node.kwargs:
            first, second = (self._missing.get(each, torch.zeros((), dtype=torch.float64)) for each in read)
            amount = first - second if node.target in SUBTRACT else first + second
            if (branch := self._branch(node)) is None:
                self._missing[node] = amount
            else:
                self._offsets.added[branch] = self._offsets.added.get(branch, 0.0) + amount
        else:
            for each in read:
                if each in self._missing:
                    node.replace_input_with(each, self._made_whole(each))

    def _alike(self, joined: Iterable[fx.Node]) -> bool:
        amounts = {float(self._missing[each]) if each in self._missing else None for each in joined}
        return len(amounts) == 1

    def _made_whole(self, node: fx.Node) -> fx.Node:
        if node not in self._whole:
            path = self._unused(f"{nodes.places(self._network)[node]}_whole")
            self._network.add_submodule(path, Offset(self._missing[node]))
            with self._network.graph.inserting_after(node):
                self._whole[node] = self._network.graph.call_module(path, (node,))
            self._whole[node].meta = dict(node.meta)
        return self._whole[node]

    def _pad_in_front(self, node: fx.Node, layer: Any) -> None:
        """Take a convolution's padding off it, which would be of what is read too small, and pad with zero's code."""
        widths = _widths(layer)
        if not any(widths):
            return
        source = nodes.operand(node)
        layer.padding = (0,) * (len(widths) // 2)
        key = source, widths
        if key not in self._padded:
            path = self._unused(f"{node.target}_pad")
            pad = Pad(widths, "constant", 0.0)
            self._network.add_submodule(path, pad)
            with self._network.graph.inserting_after(source):
                padded = self._network.graph.call_module(path, (source,))
            self._missing[padded] = self._missing[source]
            self._padded[key] = self._pad_with_the_code_of_zero(padded, pad)
        node.replace_input_with(source, self._padded[key])

    def _pad_with_the_code_of_zero(self, node: fx.Node, pad: Pad) -> fx.Node:
        """And round what is padded again, which changes nothing: TensorRT computes a layer in integers only where
        codes are what it reads."""
        pad.value = float((-self._missing[node]).float())
        made = self._rounding_behind_moves(node)
        again = Again(made.quant, rectifies=False)
        again.scale = made.scale
        path = self._unused(f"{node.target}_again")
        self._network.add_submodule(path, again)
        with self._network.graph.inserting_after(node):
            rounded = self._network.graph.call_module(path, (node,))
        nodes.read_instead(node, rounded)
        self._missing[rounded] = self._missing[node]
        return rounded

    def _rounding_behind_moves(self, node: fx.Node) -> ActivationQuantizer:
        while not isinstance(module := nodes.module_of(self._network, node), ActivationQuantizer):
            node = nodes.operand(node)
        return module

    def _unused(self, path: str) -> str:
        return nodes.unused(path, {name for name, _ in self._network.named_modules()})


def _widths(layer: Any) -> tuple[int, ...]:
    """How a convolution pads, as F.pad has it: two for each axis, the last axis first; none of a linear layer."""
    given = getattr(layer, "padding", ())
    if given == "valid":
        return ()
    if given == "same":
        both = [step * (size - 1) for step, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        return tuple(width for total in reversed(both) for width in (total // 2, total - total // 2))
    return tuple(width for each in reversed(given) for width in (each, each))
