"""Float islands: what has no integer form stays float by itself, is proved, and costs what is beside it nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from faqd.bundle import floats_in_words
from faqd.deploy.export.torch_to_onnx import onnx_from_deployed
from faqd.deploy.verify.layers import verify_file
from faqd.deploy.verify.segments import segments
from faqd.deploy.verify.torch_values import torch_digests
from faqd.errors import UserError
from faqd.quantize import nodes
from faqd.quantize.capture.capture import capture
from faqd.quantize.config import QuantConfig
from faqd.quantize.convert import collect_output_scales, convert
from faqd.quantize.int8_share import floats_of, int8_share
from faqd.quantize.operators.registry import OPERATORS
from faqd.quantize.student import Student, student_table
from tests.fixtures.networks import calibrated, float_file_db, images, lively

SHAPE = (3, 8, 8)
BITS = QuantConfig(8, 8)
Case = Callable[[Any, Tensor], Tensor]


class Around(nn.Module):
    """A convolution, an operator on its map (N, 8, 8, 8) or on its pixels as tokens (N, 64, 8), and a layer behind."""

    def __init__(self, operator: Case) -> None:
        super().__init__()
        self.operator = operator
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm, self.group = nn.LayerNorm(8), nn.GroupNorm(2, 8)
        self.plain, self.instance = nn.LayerNorm(8, elementwise_affine=False), nn.GroupNorm(8, 8, affine=False)
        self.soft = nn.Softmax(-1)
        self.weight, self.bias = nn.Parameter(0.3 * torch.randn(8, 8)), nn.Parameter(0.1 * torch.randn(8))
        self.register_buffer("places", torch.randperm(64, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("mask", torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
        self.lstm, self.gru = nn.LSTM(8, 6, batch_first=True), nn.GRU(8, 4, batch_first=True, bidirectional=True)
        self.conv3, self.norm3 = nn.Conv3d(1, 2, 3, padding=1), nn.BatchNorm3d(2)
        self.table, self.last = nn.Linear(1, 8), nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operator(self, self.first(x)).flatten(1))  # type: ignore[no-any-return]


def tokens(x: Tensor) -> Tensor:
    """(N, 64, 8)"""
    return x.flatten(2).transpose(1, 2)


def heads(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of two heads: (N, 2, 64, 4)."""
    y = tokens(x)
    q, k, v = (t.reshape(t.shape[0], 64, 2, 4).permute(0, 2, 1, 3) for t in (y, y.sin(), y.cos()))
    return q, k, v


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def unfused(x: Tensor) -> Tensor:
    q, k, v = heads(x)
    return ((q * 0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


attended: Callable[..., Tensor] = F.scaled_dot_product_attention
CASES: dict[str, Case] = {
    "softmax": lambda s, x: tokens(x).softmax(-1),
    "softmax, a module": lambda s, x: s.soft(tokens(x)),
    "log softmax": lambda s, x: F.log_softmax(x, 1),
    "layer norm": lambda s, x: s.norm(tokens(x)),
    "layer norm without parameters": lambda s, x: s.plain(tokens(x)),
    "layer norm of a function": lambda s, x: F.layer_norm(x, (8, 8)),
    "layer norm of own tensors": lambda s, x: F.layer_norm(tokens(x), (8,), s.bias + 1, s.bias, 1e-6),
    "group norm": lambda s, x: s.group(x),
    "group norm without parameters": lambda s, x: s.instance(x),
    "RMS norm by hand": lambda s, x: rms(tokens(x), s.bias),
    "attention": lambda s, x: F.scaled_dot_product_attention(*heads(x)),
    "attention of three": lambda s, x: attended(*(t[..., :3] for t in heads(x))),
    "attention with a mask": lambda s, x: F.scaled_dot_product_attention(*heads(x), attn_mask=s.mask),
    "causal attention": lambda s, x: F.scaled_dot_product_attention(*heads(x), is_causal=True, scale=0.3),
    "attention by hand": lambda s, x: unfused(x),
    "batches of products": lambda s, x: torch.bmm(tokens(x), x.flatten(2)),
    "normalize": lambda s, x: F.normalize(x, dim=1),
    "variance": lambda s, x: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-5).sqrt(),
    "largest over channels": lambda s, x: x * x.amax(1, keepdim=True),
    "places of the largest": lambda s, x: torch.topk(x.flatten(2), 5, 2)[0],
    "running sums": lambda s, x: x.cumsum(1),
    "places from a table": lambda s, x: tokens(x)[:, s.places],
    "sine": lambda s, x: torch.cat([x.sin(), x.cos()], 1),
    "exponential": lambda s, x: x.exp() / (1 + x.abs()),
    "a logarithm": lambda s, x: (x.abs() + 1).log() * (x * x + 1).reciprocal(),
    "steps": lambda s, x: torch.floor(x * 4) + torch.erf(x),
    "the larger of two": lambda s, x: torch.maximum(x, -x) - torch.minimum(x, x * 0.5),
    "smallest over channels": lambda s, x: x - x.amin(1, keepdim=True),
    "a choice": lambda s, x: torch.where(x > 0.5, x, x * x),
    "limits from one side": lambda s, x: x.clamp(min=-0.25) + x.clamp(max=0.75),
    "mish": lambda s, x: F.mish(x),
    "rolled": lambda s, x: x.roll((1, 2), (2, 3)),
    "cubic root of sums": lambda s, x: x.abs().sum(1, keepdim=True).pow(0.3) * x,
    "weights that are computed": lambda s, x: F.linear(tokens(x), s.weight.sin(), s.bias),
    "weights of the image": lambda s, x: tokens(x) @ x.flatten(2)[:, :, :8],
    "an LSTM": lambda s, x: s.lstm(tokens(x))[0],
    "a GRU of two directions": lambda s, x: s.gru(tokens(x))[0],
    "a tensor made for each image": lambda s, x: torch.cat([tokens(x).softmax(2), torch.zeros(len(x), 2, 8)], 1),
    "numbers made in forward": lambda s, x: (
        tokens(x).softmax(2) * torch.linspace(0, 1, 8) + tokens(x)[:, torch.arange(64)]
    ),
    "windows put together": lambda s, x: F.fold(F.unfold(x, 3, padding=1), (8, 8), 3, padding=1),
    "a layer on own tensors": lambda s, x: s.norm(tokens(x) + s.table(s.places.reshape(64, 1) / 64.0).sin()),
    "circular padding": lambda s, x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "another number in the padding": lambda s, x: F.pad(x, (1, 1), value=0.5),
    "nearest pixels of an uneven ratio": lambda s, x: F.interpolate(x, (11, 13)),
    "nearest pixels by a fraction": lambda s, x: F.interpolate(x, scale_factor=1.3),
    "resized by a fraction": lambda s, x: F.interpolate(x, scale_factor=1.3, mode="bilinear"),
    "resized by a fraction, recomputed": lambda s, x: F.interpolate(
        x, scale_factor=1.3, mode="bilinear", recompute_scale_factor=True
    ),
    "cubic": lambda s, x: F.interpolate(x, (12, 5), mode="bicubic", align_corners=True),
    "cubic by a fraction": lambda s, x: F.interpolate(x, scale_factor=(0.7, 1.7), mode="bicubic"),
    "softmax in a type that is stated": lambda s, x: tokens(x).softmax(-1, dtype=torch.float32),
    "log softmax in a type that is stated": lambda s, x: F.log_softmax(x, 1, dtype=torch.float32),
    "doubles for a while": lambda s, x: x.double().softmax(1).float(),
    "a mask of floats": lambda s, x: (x > 0).float().mean(1, keepdim=True) * x,
    "sums in a type that is stated": lambda s, x: x.sum(1, keepdim=True, dtype=torch.float32) * x,
    "mirrored": lambda s, x: x.flip(3),
    "turned": lambda s, x: x.flip(2, 3).softmax(1) + x.rot90(1, (2, 3)),
    "sampled at places": lambda s, x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False),
    "sampled beyond the border": lambda s, x: F.grid_sample(
        x, 1.5 * x[:, :2].permute(0, 2, 3, 1), padding_mode="border", align_corners=True
    ),
    "nearest pixels at places": lambda s, x: F.grid_sample(
        x, x[:, :2].permute(0, 2, 3, 1).tanh(), mode="nearest", align_corners=True
    ),
    "three axes": lambda s, x: F.max_pool3d(s.norm3(s.conv3(x[:, None])), 2)[:, 0],
    "averages over three axes": lambda s, x: F.avg_pool3d(x[:, None], 2)[:, 0],
    "responses of neighbours": lambda s, x: F.local_response_norm(x, 3),
    "uneven windows": lambda s, x: F.adaptive_avg_pool2d(x, (3, 5)),
    "length of its own": lambda s, x: torch.cat(
        [s.bias.reshape(1, 8, 1).expand(len(x), -1, 1), x.flatten(2).softmax(2)], 2
    ),
}
INTEGER = (
    "weights that are computed",
    "resized by a fraction, recomputed",
    "sums in a type that is stated",
)
"""Cases that have an integer form after all."""


def around(case: Case) -> nn.Module:
    torch.manual_seed(0)
    network = Around(case)
    network(torch.zeros(2, *SHAPE))
    return lively(network, 1)


@pytest.mark.parametrize("name", CASES)
def test_what_has_no_integer_form_is_float_and_proved(name: str) -> None:
    student, x = calibrated(around(CASES[name]), BITS, shape=SHAPE), images(3, 8, SHAPE)
    assert bool(student.islands) == (name not in INTEGER)
    assert [row["weights"] for row in student_table(student)][-1] == "8 (±127)"
    scales = collect_output_scales(student, [images(0, 16, SHAPE)])
    for flavour, modes in (("tensorrt", [False]), ("onnxruntime", [False, True])):
        deployed = convert(student, flavour, scales)  # type: ignore[arg-type]
        model = onnx_from_deployed(deployed, x, {})
        assert verify_file(model, x.numpy(), torch_digests(deployed, x), modes)["failures"] == []
    unquantized = onnx_from_deployed(convert(student, "float"), x, {}).SerializeToString()
    assert min(float_file_db(unquantized, student, x).values()) > 90


def test_every_row_of_floats_has_a_case() -> None:
    captured = [capture(around(case), torch.zeros(2, *SHAPE)) for case in CASES.values()]
    met = {id(nodes.row_of(traced, node)) for traced in captured for node in traced.graph.nodes if "call" in node.op}
    assert [row.kinds for row in OPERATORS if row.role == "other" and id(row) not in met] == []


@pytest.mark.parametrize("name", [name for name in CASES if name not in INTEGER])
def test_strict_refuses_it_by_place_and_line(name: str) -> None:
    with pytest.raises(UserError, match=r"test_islands\.py:\d+\): "):
        calibrated(around(CASES[name]), QuantConfig(8, 8, strict=True), shape=SHAPE)


# Where roundings go ---------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.proj = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.act, self.down = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(2, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.norm2(x))))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.place = nn.Conv2d(3, 16, 2, 2), nn.Parameter(0.1 * torch.randn(1, 16, 16))
        self.blocks, self.norm, self.head = nn.Sequential(Block(), Block()), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.blocks(x)).mean(1))  # type: ignore[no-any-return]


def transformer() -> Student:
    torch.manual_seed(0)
    network = Transformer().eval()
    for norm in (module for module in network.modules() if isinstance(module, nn.LayerNorm)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    return calibrated(network, BITS, shape=SHAPE)


def test_a_transformer_rounds_in_front_of_its_layers_and_nowhere_else() -> None:
    assert list(transformer().quantizers()) == [
        "x",
        *(
            f"blocks.{block}.{place}"
            for block in (0, 1)
            for place in ("norm1", "scaled_dot_product_attention", "norm2", "act")
        ),
        "mean",
    ]


def test_islands_that_touch_are_one_and_are_named_with_their_line() -> None:
    islands = transformer().islands
    assert [next(iter(island.operators)) for island in islands] == [
        "blocks.0.norm1",
        "blocks.0.scaled_dot_product_attention",
        "blocks.0.norm2",
        "blocks.1.norm1",
        "blocks.1.scaled_dot_product_attention",
        "blocks.1.norm2",
        "norm",
    ]
    assert all(re.fullmatch(r" \(test_islands\.py:\d+\)", island.line) for island in islands)
    attention = calibrated(around(CASES["attention by hand"]), BITS, shape=SHAPE)
    assert {*attention.islands[-1].operators.values()} >= {"matmul", "softmax"}


def test_the_share_of_integers_is_that_of_multiply_accumulates() -> None:
    student = transformer()
    per_token = 16 * 16 * 4 + 2 * 16 * 32
    integers = 16 * 12 * 16 + 2 * 16 * per_token + 16 * 5
    floats = 2 * 2 * (16 * 16 * 8) * 2
    assert int8_share(student) == pytest.approx(integers / (integers + floats))
    facts = json.loads(json.dumps(floats_of(student)))
    assert len(facts["islands"]) == 7 and facts["int8_share"] == round(int8_share(student), 4)
    assert "float: blocks.0.norm1 (test_islands.py" in repr(student)


def test_a_network_of_integers_has_no_islands() -> None:
    student = calibrated(lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), 1), BITS)
    assert floats_of(student) == {"islands": [], "int8_share": 1.0}


def test_islands_are_said_in_two_lines_and_nothing_of_a_network_of_integers() -> None:
    first, share = floats_in_words(floats_of(transformer()))
    assert re.match(
        r"7 float islands, the first at blocks\.0\.norm1 \(test_islands\.py:\d+\): LayerNorm \(5 times\), ", first
    )
    assert re.fullmatch(r"8\d\.\d % of the multiply-accumulates run in INT8\.", share)
    assert not list(floats_in_words({"islands": [], "int8_share": 1.0})) and not list(floats_in_words({}))
    (half,) = floats_in_words({"islands": [], "int8_share": 0.4})
    assert half == "40.0 % of the multiply-accumulates run in INT8: INT8 is not worth it here."


class GroupNormed(nn.Module):
    """A residual block with group norms: sums of what islands give."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm1, self.norm2 = nn.GroupNorm(2, 8), nn.GroupNorm(2, 8)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.stem(x)))
        return self.last(F.relu(x + self.norm2(self.conv2(F.relu(self.conv1(x))))))  # type: ignore[no-any-return]


def test_a_sum_beside_an_island_is_float_and_rounded_once_for_the_layer_that_reads_it() -> None:
    torch.manual_seed(0)
    student = calibrated(GroupNormed().eval(), BITS, shape=SHAPE)
    assert {name: q.quant.label for name, q in student.quantizers().items()} == {
        "x": "8 (-128..127)",
        "relu": "8 (0..127)",
        "relu_1": "8 (0..127)",
        "relu_2": "8 (0..127)",
    }


class Kept(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        return self.last(y + self.second(y))  # type: ignore[no-any-return]


def test_what_is_excluded_is_read_as_floats_by_what_is_excluded() -> None:
    student, x = (
        calibrated(lively(Kept(), 1), QuantConfig(8, 8, exclude=("relu", "add")), shape=SHAPE),
        images(3, 8, SHAPE),
    )
    (addition,) = (node for node in student.network.graph.nodes if node.name == "add")
    assert "relu" in [read.name for read in addition.all_input_nodes]
    deployed = convert(student, "tensorrt")
    assert (
        verify_file(onnx_from_deployed(deployed, x, {}), x.numpy(), torch_digests(deployed, x), [False])["failures"]
        == []
    )


@pytest.mark.parametrize("name", ["attention of three", "layer norm", "normalize", "cubic root of sums"])
def test_the_numbers_of_an_island_are_float32_ones_in_torch_as_well(name: str) -> None:
    """1 / sqrt(3) in float64 and in the file's float32 would round codes at ties to either side."""
    network = convert(calibrated(around(CASES[name]), BITS, shape=SHAPE), "tensorrt").network
    given = [(n.args, n.kwargs) for n in network.graph.nodes if nodes.role(network, n) == "other"]
    numbers = [number for number in tree_leaves(given) if isinstance(number, float)]
    numbers += [module.eps for module in network.modules() if isinstance(module, nn.LayerNorm)]
    assert numbers and all(number == float(np.float32(number)) for number in numbers)


# Faults ---------------------------------------------------------------------------------------------------------------


def faulty(model: onnx.ModelProto, how: str) -> onnx.ModelProto:
    wrong: onnx.ModelProto = onnx.ModelProto.FromString(model.SerializeToString())
    tensors = {tensor.name: tensor for tensor in wrong.graph.initializer}

    def change(name: str, index: Any, by: float) -> None:
        values = numpy_helper.to_array(tensors[name]).copy()
        values[index] += by * np.abs(values).max()
        tensors[name].CopyFrom(numpy_helper.from_array(values, name))

    if how == "eps":
        node = next(node for node in wrong.graph.node if node.op_type == "LayerNormalization")
        next(a for a in node.attribute if a.name == "epsilon").f *= 10
    elif how == "one weight of a norm":
        change("blocks.1.norm2.weight", 3, 1e-3)
    elif how == "one bias of a norm":
        change("norm.bias", 3, 1e-2)
    elif how == "scale of the attention":
        change("blocks.0.scaled_dot_product_attention.scale", (), 1e-3)
    else:
        change("add.offset", (0, 2, 3), 1e-3)
    return wrong


@pytest.mark.parametrize(
    "how",
    ["eps", "one weight of a norm", "one bias of a norm", "scale of the attention", "one entry of a table"],
)
def test_a_wrong_number_in_an_island_is_found(how: str) -> None:
    student, x = transformer(), images(3, 16, SHAPE)
    deployed = convert(student, "tensorrt")
    model, digests = onnx_from_deployed(deployed, x, {}), torch_digests(deployed, x)
    assert verify_file(model, x.numpy(), digests, [False])["failures"] == []
    assert verify_file(faulty(model, how), x.numpy(), digests, [False])["failures"]


def test_an_island_is_computed_once_for_all_that_read_it() -> None:
    """Each node that computes is a part of one segment: verification stays linear in the number of blocks."""
    model = onnx_from_deployed(convert(transformer(), "tensorrt"), images(3, 2, SHAPE), {})
    computed = [
        node.name
        for segment in segments(model)
        for node in segment.model.graph.node
        if node.op_type != "DequantizeLinear"
    ]
    assert len(computed) == len(set(computed))
