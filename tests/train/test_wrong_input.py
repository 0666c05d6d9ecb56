"""Whatever is wrong with the input: one sentence that says what, where and what to do; nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from faqd.bundle import write_manifest
from tests.fixtures.tiny_bundles import facts_of
from tests.fixtures.toy_runs import (
    NET,
    Outcome,
    User,
    everything_in,
    faqd_deploy,
    faqd_train,
    new_user,
    succeeds,
    write_images,
    write_net,
)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


@pytest.fixture(scope="module")
def runs(user: User, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished `student` of the user's network and a finished `teacher` on the digits."""
    folder = tmp_path_factory.mktemp("runs")
    succeeds(user.distill(folder / "student", "--steps", 2))
    succeeds(faqd_train("teacher", "--arch", "resnet8", "--steps", 2, "--out", folder / "teacher"))
    return folder


def refuses(outcome: Outcome, *words: str, code: int = 2) -> None:
    """One line of error, a sentence, with these words in it."""
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert outcome.code == code, outcome.stderr
    assert errors == [outcome.stderr.splitlines()[-1]], outcome.stderr
    assert errors[0].endswith((".", ")")), errors[0]
    for word in words:
        assert word in errors[0], errors[0]
    assert not outcome.stdout


# Options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--weight-bits", "9"], ["--weight-bits 9", "1 to 8"]),
        (["--weight-bits", "4,0"], ["--weight-bits 0", "1 to 8"]),
        (["--act-bits", "16"], ["--act-bits 16", "1 to 8"]),
        (["--weight-bits", "two"], ["--weight-bits two", "expected a number"]),
        (["--weight-bits", "²"], ["--weight-bits ²", "expected a number"]),
        (["--recipe", "none"], ["--recipe none", "choose", "cifar10-resnet20"]),
        (["--recipe", "digits-teacher"], ["--recipe digits-teacher", "for teacher"]),
        (["--arch", "resnet21"], ["--arch resnet21", "resnet20", "FILE.py:callable"]),
        (["--init", "techer"], ["--init techer", "teacher, scratch or the folder of a run"]),
        (["--init", "teacher", "--arch", "resnet8"], ["--init teacher", "--init scratch"]),
        (["--feature-layer", "features.22"], ["--feature-layer features.22", "features.2"]),
        (["--feature-layer", "head"], ["--feature-layer head", "neither a feature map"]),
        (["--feature-layer", "features.2", "--affinity", "none"], ["--feature-layer features.2", "--affinity none"]),
        (["--columns", "4"], ["--columns", "--affinity fast"]),
        (["--adaptors", "--affinity", "none"], ["--adaptors", "--no-adaptors"]),
        (["--autocast", "fp16", "--scale-gradient", "mean"], ["--scale-gradient mean", "--autocast bf16"]),
        (["--image-size", "8x8x8"], ["--image-size 8x8x8", "HEIGHTxWIDTH"]),
        (["--mean", "a,b"], ["--mean a,b", "0.485"]),
        (["--mean", "nan"], ["--mean nan", "expected numbers"]),
        (["--mean", "0.5"], ["--mean and --std", "3 value(s)", "1 and 3"]),
        (["--data", "folders:x"], ["--data folders:", "folder:PATH"]),
        (["--teacher", "nowhere"], ["--teacher nowhere", "no such run folder"]),
        (["--teacher", "nowhere.py:build"], ["nowhere.py", "no such file"]),
        (["--device", "cuda"], ["--device cuda", "--device cpu"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_options_of_distill(user: User, more: list[str], words: list[str], tmp_path: Path) -> None:
    if "cuda" in more and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    refuses(user.distill(tmp_path / "out", *more), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--seed", "--data-seed"])
def test_a_seed_that_torch_does_not_know(user: User, option: str, tmp_path: Path) -> None:
    outcome = user.distill(tmp_path / "out", option, 2**70)
    assert outcome.code == 2 and f"Invalid value for '{option}'" in outcome.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1"])
def test_numbers_that_are_none(user: User, value: str, tmp_path: Path) -> None:
    outcome = user.distill(tmp_path / "out", "--lr", value)
    assert outcome.code == 2 and "Invalid value for '--lr'" in outcome.stderr
    assert not (tmp_path / "out").exists()


def test_recipe_and_network_of_a_teacher(tmp_path: Path) -> None:
    refuses(faqd_train("teacher", "--recipe", "digits", "--out", tmp_path / "out"), "--recipe digits", "for distill")
    refuses(faqd_train("teacher", "--arch", "vgg", "--out", tmp_path / "out"), "--arch vgg", "resnet20")
    refuses(faqd_train("teacher", "--arch", "no.py:build", "--out", tmp_path / "out"), "no.py", "from --arch")
    refuses(faqd_train("teacher", "--arch", "no.py:a b", "--out", tmp_path / "out"), "--arch", "FILE.py:callable")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("returns", "words"),
    [
        ("self.head(self.features(x).mean((2, 3)))[:, :7]", ["logits (7,)", "10 classes", "--teacher-weights"]),
        ("self.features(x)", ["logits (16, 4, 4)", "10 classes"]),
        ("(self.features(x).mean((2, 3)), x)", ["logits_0 (16,), logits_1 (1, 8, 8)"]),
        ("x + no", ["fails on images of 1x8x8", "'no' is not defined"]),
    ],
)
def test_a_network_that_cannot_be_a_teacher_here(returns: str, words: list[str], tmp_path: Path) -> None:
    code = NET.replace("channels=3", "channels=1").replace("self.head(self.features(x).mean((2, 3)))", returns)
    net = write_net(tmp_path / "user", code)
    refuses(faqd_train("teacher", "--arch", f"{net}:build", "--out", tmp_path / "out"), "net.py:build", *words)
    assert not (tmp_path / "out").exists()


def test_a_student_of_the_user_with_other_outputs(user: User, tmp_path: Path) -> None:
    net = write_net(tmp_path / "mine", NET.replace("classes=10", "classes=9"))
    refuses(user.distill(tmp_path / "out", "--arch", f"{net}:build"), "logits (2, 9)", "teacher's logits (2, 10)")
    assert not (tmp_path / "out").exists()


# Data ---------------------------------------------------------------------------------------------------------------


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_images_that_are_not_there(user: User, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refuses(user.distill(out, "--data", f"folder:{tmp_path / 'no'}"), "no: no such folder")
    refuses(user.distill(out, "--data", f"npz:{tmp_path / 'no.npz'}"), "no.npz: no such file")
    refuses(user.distill(out, "--data", "cifar10", "--data-root", tmp_path / "no"), "--download")
    (tmp_path / "empty").mkdir()
    refuses(user.distill(out, "--data", f"folder:{tmp_path / 'empty'}"), "empty: no image in it")
    refuses(faqd_train("distill", *user.teacher, "--out", out), "--data", "folder:images")
    assert not out.exists()


def test_a_normalisation_is_never_guessed(user: User, tmp_path: Path) -> None:
    line = ("distill", *user.teacher, "--data", user.data[1], "--out", tmp_path / "out")
    refuses(faqd_train(*line), "--mean and --std")
    refuses(faqd_train(*line, "--mean", "none"), "--mean and --std")
    assert not (tmp_path / "out").exists()


def test_an_npz_file_cut_short(user: User, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", images=np.zeros((50, 8, 8, 3), np.uint8))
    _cut_short(tmp_path / "d.npz")
    refuses(user.distill(tmp_path / "out", "--data", f"npz:{tmp_path / 'd.npz'}"), "d.npz: not a readable npz file")
    assert not (tmp_path / "out").exists()


def test_images_that_do_not_decode(user: User, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    for index in range(3):
        _cut_short(images / f"{index:04d}.png")
    refuses(user.distill(tmp_path / "out", "--data", f"folder:{images}"), "3 of 120 images do not decode", "0000.png")
    assert not (tmp_path / "out").exists()


def test_images_of_another_size_and_other_channels(user: User, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    Image.new("RGB", (9, 9)).save(images / "z.png")
    refuses(user.distill(tmp_path / "out", "--data", f"folder:{images}"), "8x8", "9x9", "--image-size")
    grey = ("--channels", "grey")
    refuses(user.distill(tmp_path / "out", *grey), "net.py:build: fails on images of 1x8x8", "--channels")
    assert not (tmp_path / "out").exists()


def test_a_teacher_without_labels(user: User, tmp_path: Path) -> None:
    refuses(faqd_train("teacher", *user.data, "--out", tmp_path / "out"), "there are none here", "--labels")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "taught"),
    [
        ("--mean", "0.5", "0.3051"),
        ("--std", "none", "0.376"),
        ("--image-size", "16", "8x8"),
        ("--channels", "rgb", "grey"),
    ],
)
def test_a_student_must_see_what_its_teacher_saw(
    runs: Path, option: str, value: str, taught: str, tmp_path: Path
) -> None:
    line = ("distill", "--teacher", runs / "teacher", "--steps", 1, "--out", tmp_path / "out")
    refuses(faqd_train(*line, option, value), option, f"trained with {taught}", "leave the option out")
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_other_classes_has_no_accuracy_on_these(runs: Path, tmp_path: Path) -> None:
    images, labels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "three.npz", images=images, labels=labels)
    line = ("--teacher", runs / "teacher", "--data", f"npz:{tmp_path / 'three.npz'}", "--batch-size", 16)
    succeeds(faqd_train("distill", *line, "--steps", 1, "--out", tmp_path / "run"))
    result = json.loads(succeeds(faqd_train("eval", tmp_path / "run", "--json", "-")).stdout)
    assert set(result) == {"images", "agreement", "no_accuracy", "snr_db"}


# The user's network and its weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import nothing_of_that_name", ["net.py: importing it failed (line 1)", "nothing_of_that_name"]),
        ("def build(:", ["net.py: importing it failed", "SyntaxError"]),
        ("import sys\nsys.exit('usage: net.py')", ["net.py: importing it failed (line 2)", "SystemExit"]),
        (NET.replace("def build", "def make"), ["net.py: has no callable named build"]),
        (NET.replace("build()", "build(classes)"), ["build needs arguments (classes)", "def build()"]),
        (NET.replace("build()", "build(*, depth)"), ["build needs arguments (depth)"]),
        (NET.replace("return Net()", "return 7"), ["build() returned int", "torch.nn.Module"]),
        (NET.replace("return Net()", "raise OSError('no')"), ["build() failed (line 24)", "OSError: no"]),
        (NET.replace("return self.head(", "return [0.5], self.head("), ["its output logits_0_0 is float", "of floats"]),
        (NET.replace("mean((2, 3)))", "mean((2, 3))).sum(1)"), ["its output logits has shape (2,)"]),
        (
            NET.replace("self.head(", "self.head(x if x.sum() > 0 else x) if False else self.tail("),
            ["net.py:build", "tail"],
        ),
        (
            NET.replace("Linear(16", "Linear(16 + 1"),
            ["these are not weights of Net", "1 of another shape", "head.weight"],
        ),
        (NET.replace("self.head", "self.tail"), ["these are not weights of Net", "2 missing", "2 unknown"]),
    ],
)
def test_a_users_network_that_is_wrong(user: User, code: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(code)
    refuses(user.distill(tmp_path / "out", "--teacher", f"{tmp_path / 'net.py'}:build"), *words)
    assert not (tmp_path / "out").exists()


class Foreign:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def test_weights_that_need_foreign_classes_are_refused_unexecuted(user: User, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    torch.save({"model": Foreign(touched)}, tmp_path / "whole.pth")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Foreign(touched)))
    for name in ("whole.pth", "plain.pt"):
        outcome = user.distill(tmp_path / "out", "--teacher-weights", tmp_path / name)
        refuses(outcome, name, "pickled classes", "torch.save(network.state_dict()")
    assert not touched.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_that_are_damaged(user: User, legacy: bool, tmp_path: Path) -> None:
    state = torch.load(user.folder / "best.pth", weights_only=True)
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    whole = (tmp_path / "w.pth").read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(12):
        (tmp_path / "w.pth").write_bytes(whole[: draw.integers(len(whole) - 1)])
        refuses(user.distill(tmp_path / "out", "--teacher-weights", tmp_path / "w.pth"), "w.pth", "damaged")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_none(user: User, tmp_path: Path) -> None:
    def says(name: str, *words: str) -> None:
        refuses(user.distill(tmp_path / "out", "--teacher-weights", tmp_path / name), name, *words)

    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "empty.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    (tmp_path / "w.safetensors").write_bytes(b"no tensors")
    (tmp_path / "w.onnx").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # scripting is old, its files are still about
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pth"))
    state = torch.load(user.folder / "best.pth", weights_only=True)
    torch.save({key: value * torch.nan for key, value in state.items()}, tmp_path / "nan.pth")
    says("empty.pth", "no state dict", "epoch, optimizer")
    says("tensor.pth", "holds a Tensor")
    says("w.safetensors", "a text, which begins with 'no tensors'")
    says("w.onnx", "empty, 0 bytes")
    says("script.pth", "TorchScript", "torch.jit.load('script.pth').state_dict()")
    says("nan.pth", "features.0.weight holds NaN")
    says("absent.pth", "no such weights file")
    refuses(
        faqd_train("distill", *user.teacher[:2], *user.data, "--out", tmp_path / "out"), "needs --teacher-weights FILE"
    )
    assert not (tmp_path / "out").exists()


def test_weights_of_a_run_are_its_own(user: User, runs: Path, tmp_path: Path) -> None:
    outcome = user.distill(tmp_path / "out", "--teacher", runs / "teacher")
    refuses(outcome, "--teacher-weights", "leave the option out")


# Runs ---------------------------------------------------------------------------------------------------------------


def _edited(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _without(path: Path, key: str) -> None:
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: _cut_short(run / "weights.safetensors"), ["weights.safetensors: damaged or cut short"]),
        (lambda run: _cut_short(run / "teacher.safetensors"), ["teacher.safetensors: damaged or cut short"]),
        (lambda run: _cut_short(run / "run.json"), ["run.json: not valid JSON"]),
        (
            lambda run: shutil.copy(run / "teacher.safetensors", run / "weights.safetensors"),
            ["weights.safetensors: weights of another network"],
        ),
        (lambda run: (run / "weights.safetensors").unlink(), ["did not finish", "--resume"]),
        (lambda run: (run / "run.json").unlink(), ["not a run folder (no run.json)"]),
        (lambda run: _edited(run / "run.json", version=2), ["version 2", "reads version 1"]),
        (lambda run: _edited(run / "run.json", format="x"), ["run.json: not the record of a run"]),
        (lambda run: _without(run / "run.json", "data"), ["run.json: has no 'data'"]),
    ],
)
def test_a_run_that_is_damaged(runs: Path, damage: Callable[[Path], object], words: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "student", run)
    damage(run)
    before = everything_in(tmp_path)
    refuses(faqd_train("eval", run), *words)
    refuses(faqd_deploy("export", run, "--out", tmp_path / "bundle"), *words)
    assert everything_in(tmp_path) == before


def test_code_that_changed_since_the_run_is_not_imported(tmp_path: Path) -> None:
    user = new_user(tmp_path / "user")
    succeeds(user.distill(tmp_path / "run", "--steps", 1))
    (user.folder / "net.py").write_text(NET + f"\nopen({str(tmp_path / 'imported')!r}, 'w')\n")
    succeeds(faqd_train("eval", tmp_path / "run"))  # by the program that the run holds
    assert not (tmp_path / "imported").exists()
    (tmp_path / "run" / "network.pt2").unlink()
    refuses(faqd_train("eval", tmp_path / "run"), "net.py: changed since the run", "restore the file")
    assert not (tmp_path / "imported").exists()
    (user.folder / "net.py").unlink()
    refuses(faqd_train("eval", tmp_path / "run"), "net.py: no such file")


def test_a_start_from_a_run_of_another_network(user: User, runs: Path, tmp_path: Path) -> None:
    refuses(user.distill(tmp_path / "out", "--init", runs / "teacher"), "--init", "another network than net.py:build")


def test_an_output_folder_that_is_taken(user: User, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = everything_in(tmp_path)
    refuses(user.distill(runs / "student"), "already holds a run", "--resume")
    refuses(user.distill(runs / "teacher", "--resume"), "holds a teacher run", "another --out")
    refuses(user.distill(tmp_path / "foreign"), "foreign: is not empty and holds no run", "another --out")
    refuses(user.distill(tmp_path / "file"), "file: is a file", "another --out")
    refuses(user.distill(tmp_path / "file" / "below"), "file/below: no folder can be made there (not a directory)")
    assert everything_in(tmp_path) == before


def test_what_a_killed_start_left_is_no_obstacle(user: User, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".run.json.123.partial").touch()
    succeeds(user.distill(tmp_path / "out", "--steps", 1))
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_that_may_not_be_written(user: User, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    refuses(user.distill(tmp_path / "out"), "no folder can be made there (permission denied)", str(tmp_path / "out"))
    tmp_path.chmod(0o700)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc here")
def test_an_output_folder_where_none_can_be(user: User) -> None:
    for outcome in (user.distill(Path("/proc/run")), faqd_train("teacher", "--arch", "resnet8", "--out", "/proc/run")):
        refuses(outcome, "/proc/run: no folder can be made there", "choose another place")


@pytest.mark.parametrize("name", ["teacher.safetensors", "checkpoint-", "weights.safetensors"])
def test_a_full_disk(user: User, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Path.write_bytes

    def until_full(path: Path, data: bytes) -> int:
        if name in str(path.relative_to(tmp_path)):
            plain(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(path, data)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("faqd.train.loop.fit.CHECKPOINT_EVERY_S", 0.0)
        patch.setattr(Path, "write_bytes", until_full)
        refuses(user.distill(out), "no space left on the disk", str(out / name), "run the same command again")
    assert not [path for path in out.rglob("*") if ".partial" in path.name or path.name.startswith(name)]
    succeeds(user.distill(out, "--resume"))


@pytest.mark.parametrize(
    ("term", "more"),
    [("logit", ["--steps", 40, "--lr", 1e30]), ("affinity", ["--steps", 3, "--affinity-weight", 1e39])],
)
def test_a_loss_that_is_no_number_stops_the_run(user: User, term: str, more: list[Any], tmp_path: Path) -> None:
    outcome = user.distill(tmp_path / "out", *more, "--init", "scratch")
    refuses(outcome, f"the {term} loss is not finite", "--lr", code=1)
    assert not (tmp_path / "out" / "weights.safetensors").exists()
    for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_a_loss_that_is_no_number_in_the_last_iteration(user: User, tmp_path: Path) -> None:
    line = ("--steps", 1, "--lr", 1e38)
    refuses(user.distill(tmp_path / "scratch", *line, "--init", "scratch"), "loss is not finite", code=1)
    assert not (tmp_path / "scratch" / "weights.safetensors").exists()
    # From trained weights there is something to fall back to.
    outcome = user.distill(tmp_path / "out", *line)
    assert outcome.code == 0 and "kept: iteration 0 of 1, the untrained student" in outcome.stderr
    assert "after the last iteration no number" in outcome.stderr


def test_a_gpu_that_is_too_small(user: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("faqd.train.loop.trainer.Trainer.step", too_much)
    refuses(user.distill(tmp_path / "out"), "too little memory for --batch-size 16", code=1)


def test_a_checkpoint_that_is_damaged(user: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faqd.train.loop.fit.CHECKPOINT_EVERY_S", 0.0)
    scratch = ("--init", "scratch")  # batch norm is only estimated again where it was trained here

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("faqd.train.loop.fit.settle_norms", interrupted)
        assert user.distill(tmp_path / "out", *scratch).code == 130
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    _edited(checkpoint / "position.json", other=1)
    refuses(
        user.distill(tmp_path / "out", *scratch, "--resume"), str(checkpoint), "does not fit this run", "start over"
    )
    _cut_short(checkpoint / "network.safetensors")
    refuses(user.distill(tmp_path / "out", *scratch, "--resume"), str(checkpoint))


# Bundles ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name in ("student.onnx", "eval.npz"):
        (folder / name).write_bytes(b"content of " + name.encode())
    write_manifest(folder, facts_of("toy"), {"student.onnx": "a", "eval.npz": "b"})
    return folder


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda b: (b / "eval.npz").write_bytes(b"other"),
            ["eval.npz: changed since the bundle was written", "export"],
        ),
        (lambda b: (b / "eval.npz").unlink(), ["eval.npz: missing from the bundle", "export"]),
        (lambda b: _edited(b / "manifest.json", version=2), ["bundle version 2", "reads version 1"]),
        (lambda b: _edited(b / "manifest.json", format="x"), ["manifest.json: not the manifest of a bundle"]),
        (lambda b: _edited(b / "manifest.json", files=["eval.npz"]), ["manifest.json: not the manifest of a bundle"]),
        (lambda b: _edited(b / "manifest.json", files={"../x": {}}), ["'../x' leaves the folder"]),
        (lambda b: _without(b / "manifest.json", "files"), ["manifest.json: not the manifest of a bundle"]),
        (lambda b: _cut_short(b / "manifest.json"), ["manifest.json: not valid JSON"]),
        (lambda b: (b / "manifest.json").unlink(), ["not a bundle (no manifest.json)", "faqd-deploy export"]),
    ],
)
def test_a_bundle_that_is_damaged(bundle: Path, damage: Callable[[Path], object], words: list[str]) -> None:
    damage(bundle)
    before = everything_in(bundle)
    refuses(faqd_deploy("verify", bundle), *words)
    refuses(faqd_deploy("build-engine", bundle), *words)
    assert everything_in(bundle) == before
