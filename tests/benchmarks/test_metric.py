"""--metric: the user's own function, and what it may do wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from faqd.benchmarks.measure.user_metric import load_metric
from faqd.benchmarks.report.figures import difference_of
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

def same(outputs, eval):
    return {"x": float(eval["images"].mean())}

def whole_only(outputs, eval):
    whole = len(np.unique(eval["images"].reshape(len(eval["images"]), -1), axis=0)) == 120
    return {"top1" if whole else "x": 0.5}

def whole_or_raise(outputs, eval):
    return {"x": 1 / ("top1" in whole_only(outputs, eval))}
"""
BOOTSTRAP = ("--skip-latency", "--bootstrap", "400", "--metric")


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
        ("mine.py:crash", r"failed on tiny teacher: line 15: IndexError"),
        ("mine.py:nan", "x is nan; return finite numbers"),
        ("mine.py:array", "x is a ndarray; return a plain number"),
        ("mine.py:nothing", "returned nothing; return a dict"),
        ("mine.py:absent", "no function absent there; it has score, distance"),
        ("mine.py:leaves", "failed on tiny teacher: line 27: SystemExit: 0"),
        ("mine.py:huge", "x is inf; return finite numbers"),
        ("mine.py:changes", "failed on tiny teacher: line 33: ValueError: assignment destination is read-only"),
        ("mine.py:changes_outputs", "failed on tiny teacher: line 36: ValueError"),
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


@pytest.mark.parametrize("name", ["score", "same"])
def test_a_difference_has_an_interval_by_images_that_both_saw(
    name: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(tmp_path / "bundle", noise=0.5, engine_noise=0.5).folder
    stored = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in stored:
        page = ("--report", path.with_suffix(".html"))
        assert call(monkeypatch, bundle, *BOOTSTRAP, f"{file}:{name}", "--json", path, *page) == 0
    found, again = (json.loads(path.read_text()) for path in stored)
    teacher, student = found["networks"][:2]
    assert student["metric_difference"] == again["networks"][1]["metric_difference"], "the same images are drawn"
    assert teacher["metric_difference"] is None and student["engine_file"]["metric_difference"].keys() == (
        student["metric_difference"].keys()
    )
    for figure, difference in student["metric_difference"].items():
        assert difference["value"] == pytest.approx(student["metric"][figure] - teacher["metric"][figure])
    difference = student["metric_difference"]["top1" if name == "score" else "x"]
    width = difference["high"] - difference["low"]
    gap = student["accuracy"]["gap_to_teacher"]
    normal = 2 * 1.96 * math.sqrt((gap["gained"] + gap["lost"]) / gap["n"] - gap["value"] ** 2) / math.sqrt(gap["n"])
    assert gap["lost"] > 10 and width == pytest.approx(normal if name == "score" else 0, rel=0.2)
    assert difference["low"] <= difference["value"] <= difference["high"]
    written = capsys.readouterr().out + stored[0].with_suffix(".html").read_text()
    for text in (difference_of(student, "top1" if name == "score" else "x"), "400 resamples of 120 images"):
        assert written.count(text) >= 3, "after each run, and on the page"
    assert call(monkeypatch, "--from", stored[0]) == 0
    assert "400 resamples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*BOOTSTRAP, "mine.py:whole_only"), "returned no top1 on images drawn with repeats; return the same names"),
        ((*BOOTSTRAP, "mine.py:whole_or_raise"), "tiny teacher, images drawn with repeats: line 46: ZeroDivisionError"),
        (("--bootstrap", "400"), "--bootstrap: it resamples images for --metric, which is not given"),
        (("--bootstrap", "99", "--metric", "mine.py:same"), "99 is not in the range x>=100"),
    ],
)
def test_a_bootstrap_that_cannot_be(
    bundle: Path,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(file.parent)
    assert call(monkeypatch, bundle, *arguments) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


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
