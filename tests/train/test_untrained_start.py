"""A student begins where `ptq` ends, and a run that was equalized is exported and resumed as any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from faqd.files import read_json
from faqd.train.networks.tensor_files import read_tensors
from faqd.train.run.student import load_student
from tests.fixtures.toy_runs import User, faqd_deploy, faqd_train, new_user, succeeds, write_images, write_net

UNEVEN = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.silu, self.relu, self.head = nn.SiLU(), nn.ReLU(), nn.Linear(32, 10)
        with torch.no_grad():
            for here, there in ((self.first, self.second), (self.second, self.third)):
                here.weight[:4] *= 300
                there.weight[:, :4] /= 300

    def forward(self, x):
        return self.head(self.relu(self.third(self.relu(self.second(self.silu(self.first(x)))))).flatten(1))


def build():
    return Net()
"""


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    folder = tmp_path_factory.mktemp("user")
    write_net(folder, UNEVEN)
    write_images(folder / "images")
    return User(folder)


@pytest.fixture(scope="module")
def run(user: User) -> tuple[Path, str]:
    out = user.folder / "run"
    return out, succeeds(user.distill(out)).stderr


def fidelity_in(said: str) -> list[float]:
    return [float(line.rpartition("fidelity ")[2]) for line in said.splitlines() if " scales, " in line]


def test_what_ptq_finds_the_run_begins_with(user: User, run: tuple[Path, str]) -> None:
    out, said = run
    chosen = read_json(out / "run.json")["untrained"]
    assert chosen["equalized_tensors"] == 2 and chosen["equalized"][0] == "silu"
    told = succeeds(faqd_deploy("ptq", *user.teacher, *user.data, "--out", user.folder / "ptq")).stderr
    tried, of_ptq = fidelity_in(said), fidelity_in(told)
    assert tried[0] == of_ptq[0] and max(tried[1:]) > tried[0] + 0.05
    made = read_json(user.folder / "ptq" / "manifest.json")
    assert made["calibration"] == chosen["calibration"] and made["equalized"] == {"tensors": 2, "products": 1}
    shown = succeeds(faqd_deploy("inspect", user.folder / "ptq")).stdout
    ranges = ", asymmetric activations" if made["asymmetric"] else ""
    assert f"without training: {made['calibration']} scales{ranges}, 2 tensors equalized" in shown


def test_it_is_exported_and_proved(run: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = run
    said = succeeds(faqd_deploy("export", out, "--out", tmp_path / "b")).stderr
    assert "verified; of its teacher: " in said
    kept = read_json(out / "run.json")["kept"]
    fidelity = read_json(tmp_path / "b" / "verify.json")["fidelity"]["student.tensorrt.fp32.onnx"]["least"]
    assert fidelity == pytest.approx(1 - kept["measure"], abs=0.1)
    assert json.loads(succeeds(faqd_train("eval", out, "--json", "-")).stdout)["images"]


def test_an_asymmetric_run_is_exported_as_it_was_judged(user: User, tmp_path: Path) -> None:
    succeeds(user.distill(tmp_path / "run", "--asymmetric", "always"))
    quantizers = load_student(tmp_path / "run").quantizers().values()
    assert any(each.quant.low not in (-128, 0) for each in quantizers if each.asymmetric)
    succeeds(faqd_deploy("export", tmp_path / "run", "--out", tmp_path / "b"))
    kept = read_json(tmp_path / "run" / "run.json")["kept"]
    fidelity = read_json(tmp_path / "b" / "verify.json")["fidelity"]["student.tensorrt.fp32.onnx"]["least"]
    assert fidelity == pytest.approx(1 - kept["measure"], abs=0.1)


def test_a_paused_run_goes_on_to_the_same_bits(user: User, run: tuple[Path, str], tmp_path: Path) -> None:
    whole = user.folder / "run"
    succeeds(user.distill(tmp_path / "run", "--time-limit", 0.001))
    assert not (tmp_path / "run" / "weights.safetensors").is_file()
    succeeds(user.distill(tmp_path / "run", "--resume"))
    ours, wanted = (read_tensors(folder / "weights.safetensors") for folder in (tmp_path / "run", whole))
    assert ours.keys() == wanted.keys() and all((ours[name] == wanted[name]).all() for name in wanted)
    assert any(name.endswith("_equalized.factor") for name in ours)


def test_a_tapped_map_is_not_multiplied(user: User, tmp_path: Path) -> None:
    """A ReLU that is compared keeps its values; the product stands behind it."""
    succeeds(user.distill(tmp_path / "run", "--feature-layer", "relu"))
    record = read_json(tmp_path / "run" / "run.json")
    assert record["untrained"]["equalized"] == ["silu", "relu"] and record["taps"] == ["relu"]
    assert record["select_untrained"]["affinity"] < 0.1
    succeeds(faqd_deploy("export", tmp_path / "run", "--out", tmp_path / "b"))


@pytest.mark.parametrize(
    ("more", "equalized", "tried"),
    [
        ("--equalize never --calibration mse --asymmetric never", None, 0),
        ("--equalize never --asymmetric never", 0, 2),
        ("--equalize never", 0, 3),
        ("--equalize always --calibration max", 2, 2),
        ("--equalize always --calibration max --asymmetric always", 2, 1),
        ("--weight-bits 4", 2, 2),
        ("--weight-bits 3", None, 0),
        ("--init scratch", None, 0),
        ("--init scratch --asymmetric always", None, 0),
    ],
)
def test_what_is_asked_for(user: User, tmp_path: Path, more: str, equalized: int | None, tried: int) -> None:
    said = succeeds(user.distill(tmp_path / "run", *more.split())).stderr
    found = read_json(tmp_path / "run" / "run.json").get("untrained")
    assert len(fidelity_in(said)) == tried and (None if found is None else found["equalized_tensors"]) == equalized
    asymmetric = any(each.asymmetric for each in load_student(tmp_path / "run").quantizers().values())
    assert asymmetric == ("--asymmetric always" in more or (found or {}).get("asymmetric", False))


def test_no_other_run_begins_with_its_weights(user: User, run: tuple[Path, str], tmp_path: Path) -> None:
    outcome = user.distill(tmp_path / "run", "--init", run[0])
    assert outcome.code == 2 and "that run is equalized" in outcome.stderr


def test_a_good_network_begins_as_it_is(tmp_path: Path) -> None:
    user = new_user(tmp_path)
    said = succeeds(user.distill(tmp_path / "run")).stderr
    assert said.count(" scales, ") == 1 and "mse scales, not equalized" in said
    assert read_json(tmp_path / "run" / "run.json")["untrained"]["equalized_tensors"] == 0
