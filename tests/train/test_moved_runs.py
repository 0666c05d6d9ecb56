"""A run that was moved with its project, or copied to where its images lie elsewhere, is evaluated and exported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from faqd.bundle import load_bundle
from faqd.deploy.onnx_model.session import OnnxSession
from tests.fixtures.toy_runs import everything_in, faqd_deploy, faqd_train, new_user, succeeds, write_net


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """A finished run `run`, with its network, in a folder that is called otherwise; its images are elsewhere."""
    user = new_user(tmp_path / "server")
    succeeds(user.distill(user.folder / "run"))
    (user.folder / "images").rename(tmp_path / "elsewhere")
    user.folder.rename(tmp_path / "laptop")
    return tmp_path / "laptop" / "run"


def test_its_network_is_found_and_its_images_are_told(moved: Path, tmp_path: Path) -> None:
    told = faqd_train("eval", moved)
    assert told.code == 2 and f"{tmp_path / 'server' / 'images'}: the images of this run were there" in told.stderr
    assert "--data folder:PATH" in told.stderr
    images = f"folder:{tmp_path / 'elsewhere'}"
    here = json.loads(succeeds(faqd_train("eval", moved, "--data", images, "--json", "-")).stdout)
    succeeds(faqd_deploy("export", moved, "--data", images, "--out", tmp_path / "bundle"))
    assert len(load_bundle(tmp_path / "bundle").evaluation().images) == here["images"] > 0


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ('"weight_bits": 8', '"weight_bits": 4', "says weight_bits 4, and its weights were trained with 8"),
        ('"act_bits": 8', '"act_bits": 4', "says act_bits 4, and its weights were trained with 8"),
        ('"target": "tensorrt"', '"target": "onnxruntime"', "says target onnxruntime, and its weights"),
    ],
)
def test_a_record_that_says_other_bits_than_were_trained_is_refused(
    before: str, after: str, told: str, tmp_path: Path
) -> None:
    user = new_user(tmp_path)
    record = user.folder / "run" / "run.json"
    succeeds(user.distill(record.parent))
    text = record.read_text(encoding="utf-8")
    assert before in text
    record.write_text(text.replace(before, after), encoding="utf-8")
    bundle = tmp_path / "bundle"
    for said in (faqd_train("eval", record.parent), faqd_deploy("export", record.parent, "--out", bundle)):
        assert said.code == 2 and told in said.stderr
    assert not bundle.exists()


@pytest.mark.parametrize("key", ["exclude", "strict", "asymmetric", "attention"])
def test_a_recipe_of_before_a_choice_existed_is_read(key: str, moved: Path, tmp_path: Path) -> None:
    record = json.loads((moved / "run.json").read_text())
    del record["recipe"][key]
    (moved / "run.json").write_text(json.dumps(record))
    succeeds(faqd_train("eval", moved, "--data", f"folder:{tmp_path / 'elsewhere'}"))


@pytest.mark.parametrize("change", ["gone", "another"])
def test_another_file_is_not_taken_for_its_network(change: str, moved: Path, tmp_path: Path) -> None:
    """In a run of before, which holds no program of it."""
    without_program(moved, "it was too strange")
    net = moved.parent / "net.py"
    if change == "gone":
        net.unlink()
    else:
        net.write_text(net.read_text() + "\n# another\n")
    told = faqd_train("eval", moved, "--data", f"folder:{tmp_path / 'elsewhere'}")
    assert told.code == 2 and f"{tmp_path / 'server' / 'net.py'}: no such file" in told.stderr
    assert "beside the run" in " ".join(told.stderr.split()) and "it was too strange." in told.stderr


def without_program(run: Path, reason: str) -> None:
    record = json.loads((run / "run.json").read_text())
    for role in ("network", "teacher"):
        (run / record[role].pop("program")).unlink(missing_ok=True)
        del record[role]["program_sha256"]
        record[role]["no_program"] = reason
    (run / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize("change", ["gone", "another"])
def test_a_run_travels_without_the_code_of_its_network(change: str, tmp_path: Path) -> None:
    """To the same bytes of every file; code that is not the run's is not executed."""
    user = new_user(tmp_path / "server")
    succeeds(user.distill(user.folder / "run", "--weight-bits", 4))
    succeeds(faqd_deploy("export", user.folder / "run", "--out", tmp_path / "with"))
    (user.folder / "run").rename(tmp_path / "laptop")
    if change == "gone":
        (user.folder / "net.py").unlink()
    else:
        (user.folder / "net.py").write_text("raise SystemExit('not mine')\n")
    succeeds(faqd_deploy("export", tmp_path / "laptop", "--out", tmp_path / "without"))
    assert everything_in(tmp_path / "with") == everything_in(tmp_path / "without")
    succeeds(faqd_train("eval", tmp_path / "laptop"))
    program = tmp_path / "laptop" / "network.pt2"
    program.write_bytes(program.read_bytes() + b"x")
    told = faqd_train("eval", tmp_path / "laptop")
    assert told.code == 2 and "network.pt2: changed since the run was made" in told.stderr


ANOTHER = """
from torch import nn
def build():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )
"""


def test_a_student_of_another_network_travels_with_its_teacher(tmp_path: Path) -> None:
    user = new_user(tmp_path / "server")
    write_net(tmp_path / "other", ANOTHER)
    other = f"{tmp_path / 'other' / 'net.py'}:build"
    succeeds(user.distill(user.folder / "run", "--arch", other, "--batch-size", 8))
    record = json.loads((user.folder / "run" / "run.json").read_text())
    assert [record[role]["program"] for role in ("network", "teacher")] == ["network.pt2", "teacher.pt2"]
    succeeds(faqd_deploy("export", user.folder / "run", "--out", tmp_path / "with"))
    for net in (user.folder / "net.py", tmp_path / "other" / "net.py"):
        net.unlink()
    succeeds(faqd_deploy("export", user.folder / "run", "--out", tmp_path / "without"))
    bundles = [load_bundle(tmp_path / name) for name in ("with", "without")]
    images = bundles[0].network_input(bundles[0].evaluation().images)
    for file in bundles[0].onnx_files():  # in which a module that only reshapes may have another name
        found, wanted = (OnnxSession(bundle.path(file)).run({"input": images})["logits"] for bundle in bundles)
        assert np.array_equal(found, wanted), file


def test_a_network_that_no_program_holds_is_told_when_it_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = new_user(tmp_path)

    def refused(*_: object) -> None:
        raise ValueError("its program computes something else")

    monkeypatch.setattr("faqd.train.run.program._refuse_another", refused)
    succeeds(user.distill(user.folder / "run"))
    assert not list((user.folder / "run").glob("*.pt2")) and not list((user.folder / "run").glob(".*"))
    succeeds(faqd_train("eval", user.folder / "run"))
    (user.folder / "net.py").unlink()
    told = faqd_train("eval", user.folder / "run")
    assert told.code == 2 and "The run holds no program of it: its program computes something else." in told.stderr


def test_a_published_set_is_told_by_its_root(tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeeds(faqd_train("teacher", "--recipe", "digits-teacher", "--arch", "resnet8", "--steps", 2, "--out", run))
    told = faqd_train("eval", run, "--data", "folder:images")
    assert told.code == 2 and "the run is of digits" in told.stderr


def test_where_images_are_is_told_by_the_option_that_finds_them(tmp_path: Path) -> None:
    """The other one would do nothing."""
    user = new_user(tmp_path)
    run, digits = user.folder / "run", user.folder / "digits"
    succeeds(user.distill(run, "--target", "onnxruntime"))
    succeeds(faqd_train("teacher", "--recipe", "digits-teacher", "--arch", "resnet8", "--steps", 2, "--out", digits))
    for command in (("eval",), ("export", "--out", tmp_path / "bundle")):
        tool = faqd_train if command[0] == "eval" else faqd_deploy
        told = tool(command[0], run, *command[1:], "--data-root", tmp_path)
        assert told.code == 2 and "no published data set to look for" in told.stderr
        assert "say with --data where that is" in told.stderr and not (tmp_path / "bundle").exists()
    told = faqd_train("eval", digits, "--data-root", tmp_path)
    assert told.code == 2 and "they come with scikit-learn; leave it out" in told.stderr
    for line, said in (
        (("--float-type", "fp32"), "--float-type: a student of --target onnxruntime has no TensorRT file"),
        (("--labels",), "--labels: the run knows"),
        (("--labels", "--eval-data", "npz:e.npz"), "--labels: --eval-data npz:e.npz has no subfolders"),
    ):
        told = faqd_deploy("export", run, *line, "--out", tmp_path / "bundle")
        assert told.code == 2 and said in told.stderr, told.stderr
