"""A network, a measure and a metric by the name of a module, as torchvision.models:mobilenet_v2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from faqd.benchmarks.measure.user_metric import load_metric
from faqd.errors import UserError
from faqd.train.networks.source import NetworkSource, user_function, user_source
from faqd.user_file import module_of
from tests.fixtures.toy_runs import NET, User, faqd_deploy, faqd_train, new_user, succeeds

FUNCTIONS = """
def measure(outputs, found):
    (values,) = outputs.values()
    return float(values.mean())


def figures(outputs, found):
    return {"mean": measure(outputs, found)}


width = 4
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> User:
    """In the working folder a package whose __init__ takes `build` from beside itself, as packages of networks do."""
    made = new_user(tmp_path / "mine")
    package = tmp_path / "zoo_of_mine"
    package.mkdir()
    (package / "net.py").write_text(NET)
    (package / "__init__.py").write_text(f"from .net import build\n{FUNCTIONS}")
    (package / "broken.py").write_text("import no_such_package\n")
    (tmp_path / "bare_folder").mkdir()
    monkeypatch.chdir(tmp_path)
    return made


def test_what_is_a_module() -> None:
    assert module_of("torchvision.models:mobilenet_v2") == ("torchvision.models", "mobilenet_v2")
    for other in ("net.py:build", "a/net.py:build", "net.pt2", "resnet20", "runs/a:b", "C:\\net:build", "a.b:", ":c"):
        assert module_of(other) is None


def test_a_teacher_and_a_student_of_a_module_go_all_the_way(user: User) -> None:
    line = ("--teacher", "zoo_of_mine:build", "--teacher-weights", user.folder / "best.pth", *user.data)
    line += ("--batch-size", "16", "--steps", "2", "--select", "zoo_of_mine:measure")
    succeeds(faqd_train("distill", *line, "--out", "run"))
    record = json.loads(Path("run/run.json").read_text())
    assert record["teacher"]["module"] == "zoo_of_mine" and record["teacher"]["file"] is None
    assert record["recipe"]["init"] == "teacher"
    succeeds(faqd_deploy("export", "run", "--out", "bundle"))
    assert json.loads(Path("bundle/manifest.json").read_text())["architecture"] == "zoo_of_mine:build"
    assert "network zoo_of_mine, " in succeeds(faqd_deploy("inspect", "run")).stdout
    again = faqd_train("distill", *line[:-4], "--arch", "zoo_of_mine:build", "--steps", 2, "--out", "same")
    assert json.loads(Path("same/run.json").read_text())["recipe"]["init"] == "teacher", again.stderr


def test_a_module_is_held_to_the_file_that_defines_the_callable(user: User) -> None:
    source = user_source("zoo_of_mine:build", 3, (8, 8))
    assert NetworkSource.from_json(source.to_json(), Path("run")) == source
    Path("zoo_of_mine/net.py").write_text(NET + "\n# another\n")
    with pytest.raises(UserError, match=r"zoo_of_mine: changed since the run was made"):
        source.build()
    shutil.rmtree("zoo_of_mine")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("no_such_module:build", "no module no_such_module can be imported here. Install its package, or start in"),
        ("zoo_of_mine.nothing:build", "a file is named with its ending, as zoo_of_mine/nothing.py:build"),
        ("zoo_of_mine.broken:build", "importing it failed: ModuleNotFoundError: No module named 'no_such_pa"),
        ("zoo_of_mine:width", "has no callable named width"),
        ("zoo_of_mine:nothing", "has no callable named nothing"),
        ("sys:exit", "the code of exit is in no file"),
    ],
)
def test_what_cannot_be_imported_is_a_sentence(user: User, spec: str, said: str) -> None:
    line = ("--teacher-weights", user.folder / "best.pth", *user.data)
    for outcome in (
        faqd_train("distill", "--teacher", spec, *line, "--out", "run"),
        faqd_deploy("ptq", "--teacher", spec, *line, "--out", "bundle"),
        faqd_train("inspect", "--teacher", spec, "--image-size", "8"),
        faqd_train("teacher", "--arch", spec, "--data", "digits", "--out", "run"),
    ):
        assert outcome.code == 2 and said in outcome.stderr, outcome.stderr
    assert not Path("run").exists() and not Path("bundle").exists()


def test_a_measure_and_a_metric_of_a_module(user: User) -> None:
    outputs = {"logits": np.full((2, 3), 0.5)}
    assert user_function("zoo_of_mine:measure", "--select")(outputs, {}) == 0.5
    metric = load_metric("zoo_of_mine:figures")
    assert metric.function(outputs, {}) == {"mean": 0.5} and metric.path.name == "__init__.py"
    for spec, said in (
        ("no_such_module:fn", "no module no_such_module can be imported here"),
        ("bare_folder:fn", "bare_folder is in no file"),
        ("zoo_of_mine.broken:fn", "importing it failed: ModuleNotFoundError"),
        ("zoo_of_mine:other", "no function other there; it has build, measure, figures"),
    ):
        with pytest.raises(UserError, match=said):
            load_metric(spec)
