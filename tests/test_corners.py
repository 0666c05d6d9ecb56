"""What users' networks do now and then: each of these once ended in a traceback or in a refusal without a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faqd.deploy.export import onnx_from_deployed
from faqd.deploy.torch_values import as_trained, torch_digests
from faqd.deploy.verify import verify_file
from faqd.train.capture import capture
from faqd.train.convert import collect_output_scales, convert
from faqd.train.fuse import fused
from faqd.train.placement import Bits
from faqd.train.student import load_student
from tests.networks import CHANNELS, SHAPE, calibrated, captured, conv, images, lively
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

# Own tensors that are moved -----------------------------------------------------------------------------------------


class Own(nn.Module):
    """A parameter of one number for each channel, made to fit by `formula`."""

    def __init__(self, formula: Callable[[Own, Tensor], Tensor]) -> None:
        super().__init__()
        self.formula, self.first, self.last = formula, conv(3), conv()
        self.g = nn.Parameter(torch.linspace(-1, 1, CHANNELS))
        self.register_buffer("filters", torch.linspace(-1, 1, CHANNELS * 9).reshape(CHANNELS, 9))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.formula(self, self.first(x)))  # type: ignore[no-any-return]


MOVED: dict[str, Callable[[Own, Tensor], Tensor]] = {
    "view": lambda s, x: x + torch.relu(x) * s.g.view(1, -1, 1, 1),
    "indices": lambda s, x: x * s.g[None, :, None, None],
    "one of them": lambda s, x: x / s.g[0],
    "by sizes": lambda s, x: s.g.reshape(x.shape[1], 1, 1) - x,
    "expanded": lambda s, x: x * s.g.view(1, -1, 1, 1).expand_as(x),
    "twice": lambda s, x: x * s.g.unsqueeze(-1).unsqueeze(-1),
    "a piece": lambda s, x: x + s.g.chunk(4)[1].view(2, 1, 1)[0],
    "filters": lambda s, x: F.conv2d(x, s.filters.view(CHANNELS, 1, 3, 3), groups=CHANNELS),
}


@pytest.mark.parametrize("how", MOVED)
def test_a_moved_parameter_is_a_constant(how: str) -> None:
    network = Own(MOVED[how])
    traced = captured(lively(network, 2))
    assert not any(node.op == "get_attr" for node in traced.graph.nodes)
    torch.testing.assert_close(traced(images(1)), network(images(1)))
    proved(network)


def test_a_parameter_behind_an_activation_is_rounded_alone() -> None:
    proved(Own(lambda s, x: x * torch.sigmoid(s.g).view(1, -1, 1, 1)))


def proved(network: nn.Module, shape: tuple[int, ...] = SHAPE) -> None:
    """The student of `network` computes in both flavours what torch, the referee and onnxruntime say."""
    student = calibrated(lively(network, 3), Bits(8, 8), shape=shape)
    x = images(5, 8, shape, reach=3.0)
    for flavour, modes in (("tensorrt", [False]), ("onnxruntime", [False, True])):
        scales = collect_output_scales(student, [images(0, 16, shape)])
        deployed = convert(student, flavour, scales)  # type: ignore[arg-type]
        model = onnx_from_deployed(deployed, images(1, 2, shape), {})
        assert verify_file(model, x.numpy(), torch_digests(deployed, x), modes)["failures"] == []
        equal = as_trained(student, deployed, x)["equal_codes_per_layer"]
        assert min(equal.values()) > 0.99 or flavour == "onnxruntime"  # which rounds more often
