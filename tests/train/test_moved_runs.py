"""A run that was moved with its project, or copied to where its images lie elsewhere, is evaluated and exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from faqd.bundle import load_bundle
from tests.fixtures.toy_runs import faqd_deploy, faqd_train, new_user, succeeds


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
    assert told.code == 2 and f"{tmp_path / 'server' / 'images'}: no such folder" in told.stderr
    images = f"folder:{tmp_path / 'elsewhere'}"
    here = json.loads(succeeds(faqd_train("eval", moved, "--data", images, "--json", "-")).stdout)
    succeeds(faqd_deploy("export", moved, "--data", images, "--out", tmp_path / "bundle"))
    assert len(load_bundle(tmp_path / "bundle").evaluation().images) == here["images"] > 0


@pytest.mark.parametrize("change", ["gone", "another"])
def test_another_file_is_not_taken_for_its_network(change: str, moved: Path, tmp_path: Path) -> None:
    net = moved.parent / "net.py"
    if change == "gone":
        net.unlink()
    else:
        net.write_text(net.read_text() + "\n# another\n")
    told = faqd_train("eval", moved, "--data", f"folder:{tmp_path / 'elsewhere'}")
    assert told.code == 2 and f"{tmp_path / 'server' / 'net.py'}: no such file" in told.stderr
    assert "beside the run" in " ".join(told.stderr.split())


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
