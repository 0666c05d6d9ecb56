"""Tokens are maps of the positions that they stand for: what is left out, what is chosen, what is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import faqd
from faqd.errors import UserError
from faqd.quantize import nodes
from faqd.quantize.capture.capture import capture
from faqd.quantize.config import QuantConfig
from faqd.quantize.prepare import insert_quantizers
from faqd.train.data.sanity_checks import warn_of_taps
from faqd.train.loop.distributed import CPU
from faqd.train.loop.teacher_forward import target_of
from faqd.train.losses.distillation import AffinityForm, affinity_loss
from faqd.train.losses.layouts import Layout, Layouts, with_maps
from faqd.train.losses.taps import tap_costs, tap_names, tap_pairs
from tests.fixtures import transformer
from tests.fixtures.toy_runs import faqd_train, new_user, succeeds, write_net
from tests.fixtures.transformer import Vit

EXAMPLE = torch.zeros(2, 3, 8, 8)


class Swin(nn.Module):
    """Channels last: windows, shifted and put together again, every second pixel joined, a sum behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.down, self.head = nn.Conv2d(3, 16, 2, 2), nn.Linear(64, 32), nn.Linear(32, 5)
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in (16, 32))
        self.inner = nn.ModuleList(nn.Linear(c, c) for c in (16, 32))

    def block(self, i: int, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        y = self.norms[i](x).roll((1, 1), (1, 2))
        y = y.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        y = self.inner[i](F.gelu(F.scaled_dot_product_attention(y, y, y)))
        y = y.reshape(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return x + y.roll((-1, -1), (1, 2))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(0, self.patch(x).permute(0, 2, 3, 1))
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        x = self.block(1, self.down(x))
        return self.head(x.mean((1, 2)))  # type: ignore[no-any-return]


class Mixer(nn.Module):
    """As many positions as channels, which tell nothing apart but where they come from."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.along, self.across = nn.Conv2d(3, 16, 2, 2), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        x = x + self.along(F.layer_norm(x, (16,)).mT).mT
        x = x + F.gelu(self.across(F.layer_norm(x, (16,))))
        return self.head(x.mean(1))  # type: ignore[no-any-return]


class Convolutions(nn.Module):
    """Channels last inside of a block alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide, self.narrow = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 32), nn.Linear(32, 8)
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.narrow(F.gelu(self.wide(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return self.last(x).mean((2, 3))  # type: ignore[no-any-return]


def pair_of(network: nn.Module, example: Tensor = EXAMPLE) -> tuple[fx.GraphModule, faqd.Student]:
    traced = capture(network.eval(), example)
    return traced, insert_quantizers(traced, QuantConfig(8, 8), example)


def chosen(network: nn.Module) -> tuple[list[str], list[str]]:
    """Places and sizes."""
    traced, student = pair_of(network)
    pairs = tap_pairs(traced, student, None)
    return tap_names(traced, student, pairs), [cost.partition(",")[0] for cost in tap_costs(student, pairs, "l2", 15)]


@pytest.mark.parametrize(
    ("network", "places", "sizes"),
    [
        # Whoever reads the class token alone reads no other behind the last attention.
        (partial(Vit, "class"), ["blocks.0.add_1"], ["16 x 4 x 4 tokens"]),
        (partial(Vit, "registers"), ["blocks.1.add_1"], ["16 x 4 x 4 tokens"]),
        *((partial(Vit, kind), ["blocks.1.add_1"], ["16 x 4 x 4 tokens"]) for kind in ("none", "all", "one")),
        (Swin, ["add", "add_1"], ["16 x 4 x 4", "32 x 2 x 2"]),
        (Mixer, ["add_1"], ["16 x 4 x 4 tokens"]),
        (Convolutions, ["add"], ["8 x 4 x 4"]),
    ],
)
def test_the_stream_is_chosen_where_a_layer_still_reads_it(
    network: Callable[[], nn.Module], places: list[str], sizes: list[str]
) -> None:
    assert chosen(network()) == (places, sizes)


def node_at(traced: fx.GraphModule, place: str) -> fx.Node:
    return next(node for node, name in nodes.places(traced).items() if name == place)


@pytest.mark.parametrize(("kind", "front"), [("class", 1), ("registers", 3), ("none", 0)])
def test_tokens_in_front_are_left_out(kind: str, front: int) -> None:
    network = Vit(kind)
    traced, student = pair_of(network)
    for graph in (traced, student.network):
        node = node_at(graph, "blocks.0.add_1")
        assert Layouts(graph).of(node) == Layout(16, 4, 4, "tokens", front)
    node = node_at(traced, "blocks.0.add_1")
    x = torch.randn(2, 3, 8, 8)
    _, (tokens,) = nodes.with_taps(traced, [node.name])(x)
    _, (found,) = with_maps(traced, [node.name])(x)
    assert tokens.shape == (2, front + 16, 16)
    for row, column in ((0, 0), (1, 2), (3, 3)):
        assert torch.equal(found[:, :, row, column], tokens[:, front + 4 * row + column])
    # The teacher writes over what nothing else reads: a view of it must not be among that.
    (target,) = target_of(traced, [node.name], CPU)(x).maps.values()
    torch.testing.assert_close(target, found)


@pytest.mark.parametrize("form", get_args(AffinityForm))
def test_the_loss_of_tokens_is_that_of_the_map(form: AffinityForm) -> None:
    """In value and gradient, whose class token has none."""
    traced, _ = pair_of(Vit("class"))
    name = node_at(traced, "blocks.0.add_1").name
    x, teacher = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(2, 12, 4, 4, dtype=torch.float64)
    traced.double()
    _, (tokens, _) = nodes.with_taps(traced, [name, name])(x)
    plain = tokens.detach()[:, 1:].mT.reshape(2, 16, 4, 4).contiguous().requires_grad_()
    _, (found,) = with_maps(traced, [name])(x)
    losses = [affinity_loss(m, teacher, form, generator=torch.Generator().manual_seed(1)) for m in (found, plain)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0.0)
    whole = tokens.detach().requires_grad_()
    again = affinity_loss(
        whole[:, 1:].mT.unflatten(2, (4, 4)), teacher, form, generator=torch.Generator().manual_seed(1)
    )
    (gradient,) = torch.autograd.grad(again, whole)
    (wanted,) = torch.autograd.grad(losses[1], plain)
    torch.testing.assert_close(gradient[:, 1:], wanted.flatten(2).mT)
    assert not gradient[:, 0].any()


def test_any_place_of_tokens_or_of_a_map_is_a_tap_and_nothing_else() -> None:
    traced, student = pair_of(Vit("class"))
    for place, channels in (("blocks.1.add", 16), ("blocks.0.up", 32), ("patch", 16), ("blocks.0.norm1", 16)):
        pairs = tap_pairs(traced, student, [place])
        assert tap_costs(student, pairs, "l2", 15)[0].startswith(f"{channels} x 4 x 4")
    for place in ("blocks.0.scaled_dot_product_attention", "head"):
        with pytest.raises(UserError, match=r"neither a feature map .* nor tokens"):
            tap_pairs(traced, student, [place])
    with pytest.raises(UserError, match="no feature map of that name"):
        tap_pairs(traced, student, ["blocks.7.add"])


def test_equal_tokens_are_told_of() -> None:
    network = Vit("class")
    traced, _ = pair_of(network)
    said: list[str] = []
    constant, alive = (node_at(traced, place).name for place in ("transpose", "blocks.0.add_1"))
    with torch.no_grad():
        network.patch.weight.zero_()
    traced, _ = pair_of(network)
    warn_of_taps(traced, [constant, alive], torch.randn(2, 3, 8, 8), said.append)
    assert len(said) == 1 and "one value in all pixels" in said[0]


def test_a_loop_of_ones_own_takes_tokens() -> None:
    network = Vit("class").eval()
    student = faqd.prepare(network, EXAMPLE, faqd.QuantConfig(8, 8))
    images = torch.randn(8, 3, 8, 8)
    faqd.calibrate(student, [images])
    loss = faqd.DistillationLoss(network, student)
    assert loss.feature_layers == ["blocks.0.add_1"]
    loss(images).backward()
    assert loss.terms["affinity"] > 0
    assert faqd.DistillationLoss(network, student, feature_layers=["blocks.1.add"]).feature_layers == ["blocks.1.add"]


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--adaptors", "--affinity", "l2_batch", "--feature-layer", "blocks.0.add"),
        ("--affinity", "fast", "--feature-layer", "blocks.0.add_1=blocks.0.up"),
    ],
)
def test_a_transformer_is_distilled(tmp_path: Path, options: tuple[Any, ...]) -> None:
    user, out = new_user(tmp_path / "user"), tmp_path / "run"
    net = write_net(tmp_path / "net", Path(transformer.__file__).read_text())
    line = ("--teacher", f"{net}:build", "--teacher-weights", net.parent / "best.pth", *user.data)
    outcome = succeeds(faqd_train("distill", *line, "--steps", 3, "--batch-size", 16, "--out", out, *options))
    record = json.loads((out / "run.json").read_text())
    assert record["select"]["affinity"] > 0 and len(record["taps"]) == 1
    assert "x 4 x 4 tokens" in outcome.stderr
