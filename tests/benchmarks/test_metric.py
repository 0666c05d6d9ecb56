"""--metric: the user's own function, and what it may do wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from faqd.benchmarks.measure.user_metric import load_metric
from faqd.train.networks.source import user_function
from tests.benchmarks.test_bench import call
from tests.fixtures.tiny_bundles import make_bundle

GOOD = """
import numpy as np

def score(outputs, eval):
    assert set(eval) == {"images", "teacher", "preprocess", "labels"}
    assert eval["images"].dtype == np.uint8 and eval["preprocess"]["channels"] == "grey"
    right = outputs["logits"].argmax(1) == eval["labels"]
    return {"top1": right.mean(), "images": len(eval["images"])}

def distance(outputs, eval):
    return {"worst": float(abs(outputs["map"] - eval["teacher"]["map"]).max()), "labels": int("labels" in eval)}

def crash(outputs, eval):
    values = outputs["logits"]
    return values["boxes"]

def nan(outputs, eval):
    return {"x": float("nan")}

def array(outputs, eval):
    return {"x": outputs["logits"]}

def nothing(outputs, eval):
    pass

def leaves(outputs, eval):
    raise SystemExit(0)

def huge(outputs, eval):
    return {"x": 10**400}

def changes(outputs, eval):
    eval["teacher"]["logits"][:] = 0

def changes_outputs(outputs, eval):
    outputs["logits"] -= 1
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("metric") / "bundle").folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(GOOD)
    return path


def test_the_figures_stand_beside_the_teachers(
    bundle: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--skip-latency", "--metric", f"{file}:score", "--json", tmp_path / "r.json", "--report")
    assert call(monkeypatch, bundle, *arguments, tmp_path / "r.html") == 0
    found = json.loads((tmp_path / "r.json").read_text())
    teacher, student = found["networks"][:2]
    assert student["metric"] == {"top1": student["accuracy"]["top1"]["value"], "images": 120}
    assert teacher["metric"] == {"top1": 0.9, "images": 120}
    assert found["metric"]["source"].endswith("mine.py:score") and len(found["metric"]["sha256"]) == 64
    assert "teacher: top1 0.9" in capsys.readouterr().out
    assert "Your metric" in (tmp_path / "r.html").read_text()


def test_dense_outputs_without_labels(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_bundle(tmp_path / "dense", dense=True, labels=False).folder
    arguments = ("--skip-latency", "--metric", f"{file}:distance", "--json", tmp_path / "r.json")
    assert call(monkeypatch, folder, *arguments) == 0
    teacher, student = json.loads((tmp_path / "r.json").read_text())["networks"][:2]
    assert teacher["metric"] == {"worst": 0.0, "labels": 0} and student["metric"]["worst"] > 0


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("mine.py:crash", r"failed on tiny 8/8: line 15: IndexError"),
        ("mine.py:nan", "x is nan; return finite numbers"),
        ("mine.py:array", "x is a ndarray; return a plain number"),
        ("mine.py:nothing", "returned nothing; return a dict"),
        ("mine.py:absent", "no function absent there; it has score, distance"),
        ("mine.py:leaves", "failed on tiny 8/8: line 27: SystemExit: 0"),
        ("mine.py:huge", "x is inf; return finite numbers"),
        ("mine.py:changes", "failed on tiny 8/8: line 33: ValueError: assignment destination is read-only"),
        ("mine.py:changes_outputs", "failed on tiny 8/8: line 36: ValueError"),
        ("exits.py:score", "importing it failed: line 1: SystemExit: 4"),
        ("mine.py", "expected FILE.py:function"),
        ("other.py:score", "no such file"),
        ("broken.py:score", "importing it failed: line 2: SyntaxError"),
        ("raises.py:score", "importing it failed: line 3: ZeroDivisionError"),
    ],
)
def test_what_goes_wrong_is_a_sentence_with_its_line(
    bundle: Path,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spec: str,
    said: str,
) -> None:
    (file.parent / "broken.py").write_text("x = 1\ndef score(:\n")
    (file.parent / "raises.py").write_text("\n\nx = 1 / 0\n")
    (file.parent / "exits.py").write_text("raise SystemExit(4)\n")
    monkeypatch.chdir(file.parent)
    assert call(monkeypatch, bundle, "--skip-latency", "--metric", spec) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and len(error.splitlines()) == 1


def test_a_file_is_executed_once_and_may_import_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside_the_metric.py").write_text("EXECUTED = []\n")
    file = tmp_path / "counting.py"
    file.write_text(
        "from beside_the_metric import EXECUTED\n"
        "EXECUTED.append(__name__)\n"
        "def score(outputs, eval): return {'executed': len(EXECUTED)}\n"
        "def other(outputs, eval): return {'executed': len(EXECUTED)}\n"
    )
    metric, other = load_metric(f"{file}:score"), load_metric(f"{file}:other")
    select = user_function(f"{file}:score", "--select")
    assert metric.function({}, {}) == other.function({}, {}) == select({}, {}) == {"executed": 1}
