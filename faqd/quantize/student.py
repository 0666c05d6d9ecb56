"""A network in training with its quantizers, and what each of its layers has."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from faqd.quant import FLOAT_BITS
from faqd.quantize import nodes
from faqd.quantize.config import QuantConfig
from faqd.quantize.islands import Island
from faqd.quantize.operators.norm import NORM
from faqd.quantize.quantizers.activation import ActivationQuantizer
from faqd.quantize.quantizers.layers import latent_weight, operator_name, weight_quantizer


class Student(nn.Module):
    """A network in training with its quantizers: `network` is a graph module, `config` what it was prepared for.

    taps: float node name -> student node name, for every node of the float network. islands: what has no integer form.
    float_network: what it was prepared from, whose parameters are no part of the student's. norms_stand_still: batch
    norms keep the float network's statistics in training mode too, from which a few hundred steps of fine-tuning only
    lose. `print(student)` shows every layer with its ranges, and the islands.
    """

    network: fx.GraphModule
    float_network: fx.GraphModule

    def __init__(
        self,
        network: fx.GraphModule,
        config: QuantConfig,
        taps: dict[str, str],
        float_network: fx.GraphModule,
        islands: list[Island],
    ) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.taps = taps
        self.islands = islands
        self.norms_stand_still = True
        self.__dict__["float_network"] = float_network  # registered, its parameters would be trained and saved

    def forward(self, x: Tensor) -> Any:
        """What the user's forward returns, for network input (N, C, H, W)."""
        return self.network(x)

    def train(self, mode: bool = True) -> Student:
        super().train(mode)
        if self.norms_stand_still:
            for module in self.modules():
                if isinstance(module, NORM):
                    module.eval()
        return self

    def quantizers(self) -> dict[str, ActivationQuantizer]:
        """Activation quantizers by module path, in graph order."""
        modules = dict(self.network.named_modules())
        names = [str(n.target) for n in self.network.graph.nodes if n.op == "call_module"]
        return {
            name.removesuffix(SUFFIX): module
            for name in names
            if isinstance(module := modules[name], ActivationQuantizer)
        }

    def __repr__(self) -> str:
        rows = [(row["name"], row["operator"], row["weights"], row["inputs"]) for row in student_table(self)]
        rows.insert(0, ("layer", "operator", "weights", "inputs"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        islands = (f"float: {', '.join(island.operators)}{island.line}" for island in self.islands)
        named = "\n".join(f"  {line}" for line in (*lines, *islands))
        return f"Student {self.config.label} for {self.config.target}\n{named}"


SUFFIX = "_quant"


def student_table(student: Student) -> list[dict[str, Any]]:
    """What every layer that reads the image has, in graph order: name, operator, weight shape, groups, weight grid and
    bits, input grid."""
    network = student.network
    names = nodes.places(network)
    rows = []
    for node in network.graph.nodes:
        if nodes.role(network, node) != "compute" or nodes.is_own(node):
            continue
        layer = network.get_submodule(str(node.target))
        quantizer = weight_quantizer(layer)
        read = input_quantizer(network, node) if quantizer else None
        rows.append(
            {
                "name": names[node],
                "operator": operator_name(layer),
                "weight_shape": list(latent_weight(layer).shape),
                "groups": getattr(layer, "groups", 1),
                "weights": quantizer.quant.label if quantizer else "float",
                "weight_bits": quantizer.quant.bits if quantizer else FLOAT_BITS,
                "inputs": read.quant.label if read else "float",
            }
        )
    return rows


def input_quantizer(network: fx.GraphModule, node: fx.Node) -> ActivationQuantizer | None:
    """The quantizer whose codes `node` reads, behind operators that only move or join values; None where it reads
    float."""
    return origin(network, nodes.operand(node))


def origin(network: fx.GraphModule, node: fx.Node) -> ActivationQuantizer | None:
    """The quantizer that made the values of `node`, behind operators that only move or join them."""
    # What a concatenation joins has one scale.
    while nodes.role(network, node) in nodes.MOVES:
        node = nodes.operand(node)
    module = nodes.module_of(network, node)
    return module if isinstance(module, ActivationQuantizer) else None


def computes_floats(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether --exclude left `node` something to compute whose last bits depend on how it is done."""
    kind, module = nodes.role(network, node), nodes.module_of(network, node)
    if kind == "compute":
        return module is None or weight_quantizer(module) is None
    if kind == "average":
        return input_quantizer(network, node) is None
    unknown = kind == "other" and "tensor_meta" in node.meta and node.op.startswith("call")
    return unknown and not isinstance(module, ActivationQuantizer)
