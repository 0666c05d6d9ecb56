"""Products of two activations: float by themselves, with --attention int8 of codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from faqd.quant import SIGNED_8
from faqd.quantize import nodes
from faqd.quantize.attention import spell_out
from faqd.quantize.calibrate import calibrate
from faqd.quantize.capture.capture import capture
from faqd.quantize.config import Attention, QuantConfig
from faqd.quantize.convert import convert
from faqd.quantize.int8_share import int8_share
from faqd.quantize.operators.attention import ATTENTION, PRODUCTS, IntegerProduct
from faqd.quantize.prepare import insert_quantizers
from faqd.quantize.student import Student

X = torch.randn(6, 8, 3, 4, generator=torch.Generator().manual_seed(0))
Heads = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


class Attends(nn.Module):
    """attend: a function of (network, queries, keys, values), each (N, 2, 12, 4)."""

    def __init__(self, attend: Heads) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend = attend
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.table, self.register = nn.Parameter(torch.randn(2, 12, 12)), nn.Parameter(torch.randn(1, 12, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        q, k, v = (part(x).unflatten(2, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        found: Tensor = self.out(self.attend(self, q, k, v).transpose(1, 2).flatten(2))
        return found


def by_hand(network: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (0.5 * q @ k.transpose(-2, -1)).softmax(-1) @ v


ATTENTIONS: dict[str, Heads] = {
    "plain": lambda net, q, k, v: F.scaled_dot_product_attention(q, k, v),
    "scaled": lambda net, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.2),
    "causal": lambda net, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "with a table": lambda net, q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=net.table),
    "by hand": by_hand,
}


def student_of(attend: Heads, attention: Attention = "int8", exclude: tuple[str, ...] = ()) -> Student:
    config = QuantConfig(exclude=exclude, attention=attention)
    student = insert_quantizers(capture(Attends(attend).eval(), X[:2]), config, X[:2])
    calibrate(student.eval(), X)
    return student


@pytest.mark.parametrize("name", ATTENTIONS)
def test_both_products_are_of_codes_with_scales_of_their_own(name: str) -> None:
    student = student_of(ATTENTIONS[name])
    network = student.network
    products = [node for node in network.graph.nodes if node.target in PRODUCTS]
    read = [nodes.module_of(network, operand) for product in products for operand in product.all_input_nodes]
    assert len(products) == 2 and len({id(module) for module in read}) == 4
    assert all(getattr(module, "quant", None) == SIGNED_8 for module in read)
    assert int8_share(student) == 1.0
    with torch.no_grad():
        wanted = student.float_network(X)
        assert float((network(X) - wanted).square().mean() / wanted.square().mean()) < 1e-3


@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name != "by hand"])
def test_attention_spelled_out_is_what_it_was(name: str) -> None:
    traced = capture(Attends(ATTENTIONS[name]).eval(), X[:2])
    nodes.propagate(traced, X[:2])
    names = {node.name for node in traced.graph.nodes}
    with torch.no_grad():
        wanted = traced(X)
        spell_out(traced)
        torch.testing.assert_close(traced(X), wanted)
    left = {node.name: node.target for node in traced.graph.nodes}
    assert names <= left.keys() and ATTENTION not in left.values(), "what taps call a node is a node still"


@pytest.mark.parametrize(
    "attend",
    [
        lambda net, q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=net.table > 0),
        lambda net, q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
    ],
    ids=["truth values", "shared keys"],
)
def test_what_has_no_such_form_stays_as_it_is(attend: Heads) -> None:
    student = student_of(attend)
    assert ATTENTION in {node.target for node in student.network.graph.nodes} and student.islands


def test_it_stays_float_unasked_and_where_it_is_excluded() -> None:
    for student in (student_of(by_hand, "float"), student_of(by_hand, exclude=("matmul",))):
        assert int8_share(student) < 1.0
        assert not any(isinstance(module, IntegerProduct) for module in convert(student, "tensorrt").network.modules())


def test_a_product_with_a_table_stays_float() -> None:
    def attend(network: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: Tensor = network.register @ v + (q @ k.transpose(-2, -1)) @ v
        return found

    network = student_of(attend).network
    floats = [node for node in network.graph.nodes if node.target in PRODUCTS and len(nodes.tensor_inputs(node)) == 2]
    rounded = [all("quant" in read.name for read in node.all_input_nodes) for node in floats]
    assert rounded.count(True) == 2


@pytest.mark.parametrize("flavour", ["tensorrt", "onnxruntime"])
def test_sums_are_those_of_integers(flavour: str) -> None:
    deployed = convert(student_of(by_hand), flavour, {})  # type: ignore[arg-type]
    found = [module for module in deployed.network.modules() if isinstance(module, IntegerProduct)]
    assert len(found) == 2
    draw = torch.Generator().manual_seed(0)
    for product in found:
        left, right = (torch.randint(-128, 128, (3, 5, 5), generator=draw) for _ in range(2))
        scales = product.left_scale.double(), product.right_scale.double()
        assert torch.equal(product(left * scales[0], right * scales[1]), (left @ right) * (scales[0] * scales[1]))
