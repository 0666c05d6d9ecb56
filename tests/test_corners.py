"""What users' networks do now and then: each of these once ended in a traceback or in a refusal without a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from faqd.train.capture import capture
from faqd.train.fuse import fused
from faqd.train.student import load_student
from tests.networks import lively
from tests.toy_runs import NET, User, faqd_train, new_user, succeeds, write_net

# Frozen parameters ------------------------------------------------------------------------------------------------

BLUR = """
        self.register_buffer("blur", torch.ones(16, 1, 3, 3) / 9)

    def forward(self, x):
        x = nn.functional.conv2d(self.features(x), self.blur, groups=16)
        return self.head(x.mean((2, 3)))


def build():
"""
FROZEN: dict[str, str] = {
    "the first layer": NET.replace("return Net()", "net = Net()\n    net.features[0].requires_grad_(False)\n    return net"),
    "the network": NET.replace("return Net()", "return Net().requires_grad_(False)"),
    "a filter": NET.partition("\n    def forward")[0] + BLUR + "    return Net()\n",
}


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


@pytest.mark.parametrize("frozen", FROZEN)
def test_a_student_of_a_frozen_teacher_learns_and_keeps_its_buffers(user: User, frozen: str, tmp_path: Path) -> None:
    net = write_net(tmp_path, FROZEN[frozen])
    line = ("--teacher", f"{net}:build", "--teacher-weights", net.parent / "best.pth", *user.data)
    succeeds(faqd_train("distill", *line, "--steps", 2, "--batch-size", 16, "--out", tmp_path / "run"))
    trained, before = load_student(tmp_path / "run").network, torch.load(tmp_path / "best.pth", weights_only=True)
    latent = "parametrizations.weight.original"
    state = {name.replace(latent, "weight"): value for name, value in trained.state_dict().items()}
    assert not torch.equal(state["features.0.weight"], before["features.0.weight"])
    if frozen == "a filter":
        assert torch.equal(state["conv2d.weight"], before["blur"])


# Batch norm into the layer before it --------------------------------------------------------------------------------

PAIRS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "a linear layer, without factors": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 8, bias=False), nn.BatchNorm1d(8, affine=False)),
        True,
    ),
    "a convolution, without factors": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)),
        True,
    ),
    "a transposed convolution": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 2), nn.BatchNorm2d(8)), True),
    "a grouped transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 2, 2, groups=3, bias=False), nn.BatchNorm2d(6)),
        False,
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_teacher_with_batch_norm_taken_in_computes_the_same(pair: str) -> None:
    make, is_taken_in = PAIRS[pair]
    network = lively(make(), 1)
    norm: nn.Module = network.get_submodule(str(len(network) - 1))  # type: ignore[arg-type]
    norm.running_mean = torch.linspace(-1, 1, len(norm.running_mean))  # type: ignore[arg-type]
    x: Tensor = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    smaller = fused(capture(network, x))
    assert is_taken_in != any(isinstance(module, type(norm)) for module in smaller.modules())
    torch.testing.assert_close(smaller(x), network(x))
