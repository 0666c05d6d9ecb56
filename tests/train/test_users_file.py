"""The user's file: executed once in a process, and whatever kind of network its function returns."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from faqd.errors import UserError
from faqd.quantize.capture.capture import capture
from faqd.quantize.capture.program import as_plain_modules
from faqd.quantize.config import QuantConfig
from faqd.quantize.prepare import insert_quantizers
from faqd.quantize.student import student_table
from faqd.train.networks.source import NetworkSource, user_source
from faqd.train.run.lesson import output_shapes
from tests.fixtures.toy_runs import NET, User, faqd_deploy, faqd_train, new_user, succeeds, write_net

REGISTERS = """
import torch
torch.library.Library("faqd_test_of_users_file", "DEF").define("once(Tensor x) -> Tensor")
"""
COUNTS = """
with open({counted!r}, "a") as file:
    file.write("x")
"""


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


def source(folder: Path, code: str) -> NetworkSource:
    folder.mkdir(exist_ok=True)
    (folder / "net.py").write_text(code)
    return user_source(f"{folder / 'net.py'}:build", 3, (8, 8))


@pytest.mark.filterwarnings("ignore:.*torch.library:UserWarning")
def test_a_file_that_registers_an_operator_is_executed_once(user: User, tmp_path: Path) -> None:
    counted = tmp_path / "count"
    net = write_net(tmp_path / "mine", NET)
    net.write_text(NET + REGISTERS + COUNTS.format(counted=str(counted)))
    line = ("--teacher", f"{net}:build", "--teacher-weights", net.parent / "best.pth", *user.data)
    succeeds(faqd_train("distill", *line, "--batch-size", 16, "--steps", 1, "--out", tmp_path / "run"))
    succeeds(faqd_deploy("export", tmp_path / "run", "--eval-samples", 8, "--out", tmp_path / "bundle"))
    assert counted.read_text() == "x"


HABITS = {
    "gradients off": "import torch\ntorch.set_grad_enabled(False)\n",
    "float64": "import torch\ntorch.set_default_dtype(torch.float64)\n",
    "float16 when it builds": (
        "\nplain = build\ndef build():\n    torch.set_default_dtype(torch.float16)\n    return plain()\n"
    ),
    "another folder": "import os\nos.chdir('/')\n",
    "no search path": "import sys\nsys.path.clear()\n",
    "words": "print('hello')\n",
}


@pytest.mark.parametrize("habit", HABITS)
def test_what_a_file_changes_for_the_process_ends_with_it(
    habit: str, user: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = torch.is_grad_enabled(), torch.get_default_dtype(), Path.cwd(), list(sys.path)
    net = write_net(tmp_path / "mine", NET)
    net.write_text(NET + HABITS[habit])
    if "float16" in habit:
        assert (
            "let the callable return network.float()"
            in faqd_train(
                "distill", "--teacher", f"{net}:build", "--teacher-weights", "mine/best.pth", *user.data, "--out", "run"
            ).stderr
        )
    else:
        line = ("--teacher", "mine/net.py:build", "--teacher-weights", "mine/best.pth")
        told = succeeds(faqd_train("distill", *line, *user.data, "--batch-size", 16, "--steps", 1, "--out", "run"))
        assert (tmp_path / "run" / "run.json").is_file() and "hello" not in told.stdout
        shown = succeeds(faqd_train("inspect", *line, "--image-size", 8, "--json", "-"))
        assert json.loads(shown.stdout)
    assert (torch.is_grad_enabled(), torch.get_default_dtype(), Path.cwd(), list(sys.path)) == before


def test_a_file_finds_in_its_folder_of_choice_what_it_reads_later(tmp_path: Path) -> None:
    (tmp_path / "width.txt").write_text("7")
    code = f"import os, pathlib\nos.chdir({str(tmp_path)!r})\n" + NET.replace(
        "return Net()", "return Net(classes=int(pathlib.Path('width.txt').read_text()))"
    )
    made = source(tmp_path, code)
    assert [made.build().get_submodule("head").out_features for _ in range(2)] == [7, 7]


FORWARDS = {
    "assert": "assert x.shape[-1] == 224, 'size 224'",
    "another error": "{}['no']",
    "an end": "raise SystemExit(3)",
}


@pytest.mark.parametrize("kind", FORWARDS)
def test_a_forward_that_fails_is_a_sentence_in_every_command(kind: str, user: User, tmp_path: Path) -> None:
    net = write_net(
        tmp_path, NET.replace("        return self.head", f"        {FORWARDS[kind]}\n        return self.head")
    )
    line = ("--teacher", f"{net}:build")
    assert faqd_train("inspect", *line, "--image-size", 8).code == 2
    told = faqd_deploy("ptq", *line, "--teacher-weights", net.parent / "best.pth", *user.data, "--out", tmp_path / "b")
    assert told.code == 2 and not (tmp_path / "b").exists() and "net.py:build: fails on images" in told.stderr


def test_a_network_without_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="on the meta device"):
        source(tmp_path, NET.replace("return Net()", "return Net().to('meta')")).build()
    with pytest.raises(UserError, match="returned dict"):
        source(tmp_path / "b", NET + "\nbuild = dict\n").build()


def test_a_neighbour_is_executed_once_whatever_others_import(tmp_path: Path) -> None:
    code = NET.replace("return Net()", "from toy_wide import WIDTH\n    return Net(classes=WIDTH)")
    sources = []
    for width in (4, 8):
        made = source(tmp_path / str(width), code)
        counted = str(tmp_path / f"count{width}")
        (tmp_path / str(width) / "toy_wide.py").write_text(f"WIDTH = {width}\n" + COUNTS.format(counted=counted))
        sources.append(made)
    for made, width in zip(sources * 2, (4, 8, 4, 8), strict=True):
        assert made.build().get_submodule("head").out_features == width
    assert [(tmp_path / f"count{width}").read_text() for width in (4, 8)] == ["x", "x"]


def test_one_network_of_the_file_is_another_one_each_time(tmp_path: Path) -> None:
    made = source(tmp_path, NET.replace("return Net()", "return ONLY") + "\n\nONLY = Net()\n")
    first, second = made.build(), made.build()
    with torch.no_grad():
        first.get_parameter("head.bias").fill_(7.0)
    assert (
        not (second.get_parameter("head.bias") == 7).any() and not (made.build().get_parameter("head.bias") == 7).any()
    )


def test_a_changed_file_is_another_one(tmp_path: Path) -> None:
    assert source(tmp_path, NET).build().get_submodule("head").out_features == 10
    assert source(tmp_path, NET.replace("classes=10", "classes=9")).build().get_submodule("head").out_features == 9


def test_lazy_modules_get_their_sizes(tmp_path: Path) -> None:
    lazy = NET.replace("nn.Conv2d(channels, 8,", "nn.LazyConv2d(8,").replace("nn.Linear(16,", "nn.LazyLinear(")
    network = source(tmp_path, lazy).build()
    assert network.get_parameter("features.0.weight").shape == (8, 3, 3, 3) and type(network.head) is nn.Linear
    with pytest.raises(UserError, match=r"a first run of the lazy modules that build\(\) returned failed \(line \d+\)"):
        source(tmp_path / "wrong", lazy.replace("mean((2, 3))", "mean((2, 9))")).build()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "wrap", ["nn.DataParallel({})", "torch.optim.swa_utils.AveragedModel({})", "torch.compile(nn.DataParallel({}))"]
)
def test_what_is_wrapped_around_a_network_is_taken_off(wrap: str, tmp_path: Path) -> None:
    network = source(tmp_path, NET.replace("return Net()", f"return {wrap.format('Net()')}")).build()
    assert type(network).__name__ == "Net"
    capture(network, torch.zeros(2, 3, 8, 8))


# Exported programs ------------------------------------------------------------------------------------------------

EXPORTED = NET.replace(
    "return Net()",
    "batch = {'x': {0: torch.export.Dim('batch')}}\n"
    "    return torch.export.export(Net().eval(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=batch)",
)


KEPT = EXPORTED.replace("shapes=batch)", "shapes=batch).module()").replace("def build", "def made")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("code", [EXPORTED, KEPT + "\nONLY = made()\n\n\ndef build():\n    return ONLY\n"])
def test_an_exported_program_is_taken_by_the_whole_command(user: User, code: str, tmp_path: Path) -> None:
    made = source(tmp_path / "net", code)
    assert list(made.build().state_dict()) == list(torch.load(user.folder / "best.pth", weights_only=True))
    line = ("--teacher", f"{made.file}:build", *user.teacher[2:], *user.data, "--batch-size", 16, "--steps", 1)
    succeeds(faqd_train("distill", *line, "--out", tmp_path / "run"))


class Many(nn.Module):
    """What exported programs write in operators of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.up = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ConvTranspose2d(8, 8, 2, 2),
        )
        self.last, self.drop, self.flat = nn.Linear(8, 5), nn.Dropout(), nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.norm(self.first(x)).relu_()
        z = nn.functional.interpolate(nn.functional.max_pool2d(y, 2), scale_factor=2)
        w = nn.functional.interpolate(nn.functional.avg_pool2d(y, 2), size=y.shape[-2:], mode="bilinear")
        u = self.up(nn.functional.hardtanh(nn.functional.adaptive_avg_pool2d(y, 4), 0, 6))
        y = torch.cat([y, z, w, u], 1)[:, 4:20:2]
        first, second = y.chunk(2, 1)
        y = torch.cat([second, first], 1) + nn.functional.silu(y) * 0.5 - nn.functional.leaky_relu(y, 0.1)
        y = self.drop(nn.functional.pad(y, (1, 1, 1, 1)))
        y = y + self.flat(y.flatten(2)).reshape(y.shape)
        return {"scores": self.last(y.mean((2, 3)).view(x.shape[0], -1)), "map": y}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_an_exported_program_is_the_network_with_its_layers(dynamic: bool) -> None:
    torch.manual_seed(0)
    network, x = Many().eval(), torch.randn(2, 3, 8, 8)
    shapes = {"x": {0: torch.export.Dim("batch")}} if dynamic else None
    plain = as_plain_modules(torch.export.export(network, (x,), dynamic_shapes=shapes))
    assert list(plain.train().eval().state_dict()) == list(network.state_dict())
    found, wanted = plain(x), network(x)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    if not dynamic:
        with pytest.raises(UserError, match=r"takes two images and not three: .*dynamic_shapes"):
            output_shapes(plain, NetworkSource(3, (8, 8), 0, file="net.py", callable="build"), "")
        return
    rows = student_table(insert_quantizers(capture(plain, x), QuantConfig(8, 8), x))
    assert [row["name"] for row in rows] == ["first", "up", "flat", "last"]


@pytest.mark.filterwarnings("ignore")
def test_a_program_exported_in_training_mode_is_refused() -> None:
    with pytest.raises(UserError, match=r"is one in training mode; export the network after network\.eval\(\)"):
        as_plain_modules(torch.export.export(Many(), (torch.zeros(2, 3, 8, 8),)))
