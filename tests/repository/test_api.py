"""The names of `import faqd`: a student in a loop of one's own, saved, loaded, exported with proof, and run."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import faqd
from tests.fixtures.networks import lively
from tests.repository.test_walls import ROOT

SHAPE = (3, 8, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU())
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


def pixels(count: int, seed: int = 0) -> Tensor:
    """Network input behind mean 0.5 and std 0.25."""
    drawn = torch.randint(0, 256, (count, *SHAPE), generator=torch.Generator().manual_seed(seed))
    return (drawn / 255 - 0.5) / 0.25


MEAN_STD: dict[str, Any] = {"mean": (0.5,), "std": (0.25,)}


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return lively(Net(), 1).eval()


def student_of(teacher: nn.Module, **config: Any) -> faqd.Student:
    student = faqd.prepare(teacher, pixels(2), faqd.QuantConfig(**config))
    faqd.calibrate(student, pixels(64))
    return student


def trained(student: faqd.Student, loss: nn.Module, steps: int, rate: float = 1e-3) -> list[float]:
    optimizer = torch.optim.Adam(student.parameters(), rate)
    student.train()
    values = []
    for step in range(steps):
        optimizer.zero_grad()
        value = loss(pixels(16, step))
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    return values


def distance(student: faqd.Student, teacher: nn.Module) -> float:
    with torch.no_grad():
        return float((student.eval()(pixels(64, 99)) - teacher(pixels(64, 99))).square().mean())


def test_a_student_learns_in_a_loop_of_ones_own_and_its_teacher_does_not(teacher: nn.Module) -> None:
    before = copy.deepcopy(teacher.state_dict())
    student = student_of(teacher, weights=2, activations=4)
    untrained = distance(student, teacher)
    loss = faqd.DistillationLoss(teacher, student)
    values = trained(student, loss, 60)
    assert loss.feature_layers == ["stem.2", "body.3"] and set(loss.terms) == {"logit", "affinity"}
    assert values[0] == pytest.approx(2.0) and values[-1] < 1.5
    assert distance(student, teacher) < 0.5 * untrained
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    statistics = "stem.1.running_mean"
    assert torch.equal(student.network.get_buffer(statistics), teacher.get_buffer(statistics))


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        ({"affinity": "none"}, {"logit"}),
        ({"logit": "kl", "affinity": "fast"}, {"logit", "affinity"}),
        ({"logit": "mse", "feature_layers": ["body.1"], "affinity_weight": 3.0}, {"logit", "affinity"}),
    ],
)
def test_forms_of_the_loss(options: dict[str, Any], terms: set[str], teacher: nn.Module) -> None:
    student = student_of(teacher)
    loss = faqd.DistillationLoss(teacher, student, **options)
    value = loss(pixels(8))
    value.backward()
    assert set(loss.terms) == terms
    assert value.item() == pytest.approx(1 + options.get("affinity_weight", len(terms) - 1))
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_scales_stay_where_they_can_be_used_without_a_call_after_each_step(teacher: nn.Module) -> None:
    student = student_of(teacher, weights=4, activations=4)
    loss = faqd.DistillationLoss(teacher, student)
    before = {name: quantizer.scale.item() for name, quantizer in student.quantizers().items()}
    trained(student, loss, 3, rate=10.0)
    loss(pixels(8))
    for name, quantizer in student.quantizers().items():
        assert 0.98**4 * before[name] <= quantizer.scale.item() <= 1.02**4 * before[name]


def test_a_student_is_saved_and_loaded(teacher: nn.Module) -> None:
    one, other = student_of(teacher, weights=4), student_of(lively(Net(), 2).eval(), weights=4)
    trained(one, faqd.DistillationLoss(teacher, one), 3)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.eval()(pixels(4)), other.eval()(pixels(4)))
    trained(other, faqd.DistillationLoss(teacher, other), 1)
    assert "stem.0" in repr(one) and "8 (-128..127)" in repr(one) and repr(one) == repr(other)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, on any autograd function
def test_a_compiled_student_computes_the_same(teacher: nn.Module) -> None:
    student = student_of(teacher, weights=4, activations=4).eval()
    compiled: Callable[[Tensor], Tensor] = torch.compile(student, backend="eager")
    assert torch.equal(compiled(pixels(4)), student(pixels(4)))


def test_from_a_student_to_arrays(teacher: nn.Module, tmp_path: Path) -> None:
    student = student_of(teacher).train()
    bundle = faqd.export(student, tmp_path / "bundle", pixels(32).split(8), name="net", classes="abcde", **MEAN_STD)
    assert student.training and bundle.manifest["name"] == "net 8/8" and bundle.manifest["classes"] == [*"abcde"]
    assert bundle.manifest["layers"][0]["name"] == "stem.0" and not list(tmp_path.glob(".*"))
    with faqd.Engine(tmp_path / "bundle") as engine:
        found = engine(pixels(4).numpy())
        assert isinstance(found, np.ndarray) and engine.runs_on == "onnxruntime"
    assert np.abs(found - student.eval()(pixels(4)).detach().numpy()).max() < 0.1 * np.abs(found).max()
    again = faqd.lower(student, "onnxruntime", {}, pixels(4))
    assert again.digests["layers"] and again.onnx.graph.node


def test_several_outputs_come_by_name(tmp_path: Path) -> None:
    class Two(Net):
        def forward(self, x: Tensor) -> Any:
            maps = self.body(self.stem(x))
            return {"scores": self.head(maps.mean((2, 3))), "maps": maps}

    student = student_of(lively(Two(), 1).eval())
    faqd.export(student, tmp_path / "bundle", pixels(16), **MEAN_STD)
    found = faqd.Engine(tmp_path / "bundle")(pixels(2).numpy())
    assert isinstance(found, dict) and {name: value.shape[0] for name, value in found.items()} == {
        "scores": 2,
        "maps": 2,
    }


def refused(make: Callable[[], object]) -> str:
    with pytest.raises(faqd.UserError) as told:
        make()
    return str(told.value)


def test_what_does_not_fit_is_refused_in_a_sentence(teacher: nn.Module, tmp_path: Path) -> None:
    student = student_of(teacher)
    assert "are not what mean" in refused(lambda: faqd.export(student, tmp_path / "a", pixels(8)))
    assert not (tmp_path / "a").exists()
    faqd.export(student, tmp_path / "b", pixels(8), **MEAN_STD)
    assert "already holds a bundle" in refused(lambda: faqd.export(student, tmp_path / "b", pixels(8), **MEAN_STD))
    assert "not a bundle" in refused(lambda: faqd.Engine(tmp_path))
    engine = faqd.Engine(tmp_path / "b")
    assert "images are uint8, and this bundle takes float32" in refused(lambda: engine(np.zeros((1, *SHAPE), np.uint8)))
    assert "--weight-bits 9" in refused(lambda: faqd.QuantConfig(weights=9))
    assert "--feature-layer nowhere" in refused(
        lambda: faqd.DistillationLoss(teacher, student, feature_layers=["nowhere"])
    )
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = faqd.nothing


def test_every_public_name_has_a_home_and_a_docstring() -> None:
    assert set(faqd.__all__) - {"__version__"} == set(faqd._HOMES) and set(faqd.__all__) <= set(dir(faqd))
    for name in faqd._HOMES:
        assert getattr(faqd, name).__doc__, name


def test_the_page_of_the_names_is_what_their_docstrings_say() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "docs/api_page.py")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (ROOT / "docs/api.md").read_text("utf-8") == done.stdout, "write it again: see docs/api_page.py"


def test_importing_the_package_imports_no_library() -> None:
    code = "import faqd, sys; sys.exit(', '.join({'torch', 'numpy', 'onnx', 'click'} & set(sys.modules)) or None)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
