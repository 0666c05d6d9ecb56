"""FILE.pt2, a network with its weights: read as the network that it is, and nothing in it is executed."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from faqd.errors import UserError
from faqd.quantize.capture.capture import capture
from faqd.train.networks.program_file import read_program
from tests.fixtures.toy_runs import User, faqd_deploy, faqd_train, new_user, succeeds

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """Sizes and a buffer that a program keeps as symbols and constants."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 10)
        self.register_buffer("scale", torch.full((8, 1, 1), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.first(x))) * self.scale
        return self.head(y.reshape(x.shape[0], 8, -1).mean(-1))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    network, file = Net().eval(), tmp_path_factory.mktemp("program") / "net.pt2"
    shapes = {"x": {0: torch.export.Dim.DYNAMIC}}
    torch.export.save(torch.export.export(network, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=shapes), file)
    return network, file


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


def test_it_is_the_network_with_its_weights(program: tuple[nn.Module, Path]) -> None:
    network, file = program
    x = torch.randn(5, 3, 8, 8)
    read = read_program(file)
    assert list(read.state_dict()) == list(network.state_dict())
    torch.testing.assert_close(read(x), network(x), rtol=0, atol=0)
    assert {node.name for node in capture(read, x[:2]).graph.nodes} >= {"first", "norm", "head"}


def test_it_is_a_teacher_for_every_command(program: tuple[nn.Module, Path], user: User, tmp_path: Path) -> None:
    line = ("--teacher", program[1], *user.data)
    known = succeeds(faqd_train("inspect", "--teacher", program[1], "--json", "-"))
    told = succeeds(faqd_train("inspect", "--teacher", program[1], "--image-size", "8x8", "--json", "-"))
    assert known.stdout == told.stdout, "the file states what its network takes"
    succeeds(faqd_train("distill", *line, "--batch-size", 16, "--steps", 1, "--out", tmp_path / "run"))
    succeeds(faqd_deploy("export", tmp_path / "run", "--eval-samples", 8, "--out", tmp_path / "bundle"))
    succeeds(faqd_deploy("ptq", *line, "--eval-samples", 8, "--out", tmp_path / "ptq"))


class Trap:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.marker), "w")


def written(file: Path, source: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """A copy of an archive, each member as `change` makes it of its name and content; None leaves it out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return file


SYMBOL = re.compile(rb"Symbol\('s\d+', positive=True, integer=True\)")
HOSTILE: dict[str, tuple[Callable[[str, bytes, Path], bytes | None], str]] = {
    "another function than torch's operators": (
        lambda name, content, marker: content.replace(b"torch.ops.aten.relu.default", b"torch.hub.load"),
        r"calls torch\.hub\.load, which is none of torch's own operators",
    ),
    "an operator of a library": (
        lambda name, content, marker: content.replace(b"torch.ops.aten.relu.default", b"torch.ops.mine.relu.default"),
        r"calls torch\.ops\.mine\.relu\.default",
    ),
    "a size that is a call": (
        lambda name, content, marker: SYMBOL.sub(f"open('{marker}', 'w').fileno()".encode(), content),
        "for a size, which is no arithmetic of sizes",
    ),
    "a size with an attribute": (
        lambda name, content, marker: SYMBOL.sub(b"Symbol('s0').__class__", content),
        "for a size, which is no arithmetic of sizes",
    ),
    "a pickled object for the inputs": (
        lambda name, content, marker: pickle.dumps(Trap(marker)) if "sample_inputs" in name else content,
        "cannot read this program",
    ),
    "a pickled object for a weight": (
        lambda name, content, marker: (
            content.replace(b'"use_pickle": false', b'"use_pickle": true')
            if name.endswith("weights_config.json")
            else pickle.dumps(Trap(marker))
            if "weights/weight_" in name
            else content
        ),
        "cannot read this program",
    ),
    "an object among the constants": (
        lambda name, content, marker: content.replace(b'"weight_0"', b'"custom_obj_0"'),
        "is a pickled object and no tensor",
    ),
    "no graph": (lambda name, content, marker: None if "/models/" in name else content, "holds no program"),
    "a graph cut short": (
        lambda name, content, marker: content[:100] if "/models/" in name else content,
        "or damaged",
    ),
    "a weight that is missing": (
        lambda name, content, marker: None if name.endswith("/weight_0") else content,
        "cannot read this program",
    ),
    "another version": (
        lambda name, content, marker: b"99" if name.endswith("archive_version") else content,
        "cannot read this program",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_plain_program_is_refused_and_not_executed(
    name: str, program: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    change, message = HOSTILE[name]
    marker = tmp_path / "executed"
    file = written(tmp_path / "net.pt2", program[1], lambda member, content: change(member, content, marker))
    with pytest.raises(UserError, match=message):
        read_program(file)
    assert not marker.exists()


def test_a_compiled_library_beside_the_graph_is_refused(program: tuple[nn.Module, Path], tmp_path: Path) -> None:
    file = written(tmp_path / "net.pt2", program[1], lambda member, content: content)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("net/data/aotinductor/model/net.so", b"")
    with pytest.raises(UserError, match=r"holds net/data/aotinductor/.*neither a tensor nor a graph"):
        read_program(file)


def test_a_flipped_bit_is_found(program: tuple[nn.Module, Path], tmp_path: Path) -> None:
    weights = next(value for value in program[0].state_dict().values() if value.dim() == 4)
    content = bytearray(program[1].read_bytes())
    content[content.index(weights.numpy().tobytes()) + 3] ^= 1
    (tmp_path / "net.pt2").write_bytes(content)
    with pytest.raises(UserError, match=r"damaged, net/data/weights/\w+ is not what was written"):
        read_program(tmp_path / "net.pt2")


def test_a_program_of_an_older_torch_is_said_to_be_one(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "net.pt2", "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
    with pytest.raises(UserError, match="written by an older torch; export it again"):
        read_program(tmp_path / "net.pt2")


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.pt2").write_text("weights")
    with pytest.raises(UserError, match=r"no program of torch\.export\.save, or damaged"):
        read_program(tmp_path / "net.pt2")
