"""A run that is killed anywhere and resumed ends with the weights, to the last bit, of one that was never stopped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from faqd.train.loop.checkpoint import Position, load_checkpoint, save_checkpoint
from faqd.train.run.folder import held
from tests.fixtures.toy_runs import Outcome, User, everything_in, faqd_train, new_user, succeeds

STEPS = 14
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
# 96 of 120 images train: with 16 per iteration, epochs end at 6 and 12.
LINE = ("--batch-size", 16, "--steps", STEPS, "--affinity", "fast", "--weight-bits", 4, "--act-bits", 4)
TEACHER = ("teacher", "--arch", "resnet8", "--steps", 6, "--batch-size", 16)


@dataclass(frozen=True)
class Case:
    """When which signal comes, and the checkpoint that is there afterwards. See killed_runs.py."""

    when: list[Any]
    checkpoint: int | None
    signal: str = "SIGKILL"
    every_s: float = 0.0


CASES = {
    "before the first iteration": Case(["iteration", 0], None),
    "after one iteration": Case(["iteration", 1], 1),
    "within an epoch": Case(["iteration", 9], 9),
    "at the last iteration": Case(["iteration", STEPS - 1], STEPS - 1),
    "in the first write of a checkpoint": Case(["write", ".checkpoint-00000001", 1], None),
    "in the second write of a checkpoint": Case(["write", ".checkpoint-00000005", 2], 4),
    "while an older checkpoint goes": Case(["removal", "checkpoint-00000006"], 7),
    "before the results": Case(["conclude"], STEPS - 1),
    "in the final weights": Case(["write", ".weights.safetensors", 1], STEPS - 1),
    "without any checkpoint": Case(["iteration", 13], None, every_s=1e9),
    "by Ctrl-C": Case(["iteration", 5], 5, "SIGINT"),
    "by Ctrl-C in a checkpoint": Case(["write", ".checkpoint-00000005", 1], 4, "SIGINT"),
}


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


def command(user: User, out: Path, *more: object) -> list[str]:
    return [str(word) for word in ("distill", *user.teacher, *user.data, *LINE, "--out", out, *more)]


def resumed(user: User, out: Path, *more: object) -> Outcome:
    return faqd_train(*command(user, out, "--resume", *more))


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def whole(user: User, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    succeeds(resumed(user, run))
    return run


@pytest.fixture(scope="module")
def stopped(user: User, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one stopped run per case, what it said beside it, and a stopped teacher."""
    folder = tmp_path_factory.mktemp("stopped")
    lines = {name: command(user, folder / name) for name in CASES}
    lines["teacher"] = [str(word) for word in (*TEACHER, "--out", folder / "teacher")]
    cases = {**CASES, "teacher": Case(["iteration", 4], 4)}
    asked = [{**asdict(case), "line": lines[name], "said": str(folder / f"{name}.txt")} for name, case in cases.items()]
    runner = [sys.executable, str(Path(__file__).parents[1] / "fixtures" / "killed_runs.py")]
    result = subprocess.run(runner, input=json.dumps(asked), capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [130 if case.signal == "SIGINT" else -9 for case in cases.values()]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_stopped_run_resumes_to_the_same_bits(user: User, whole: Path, stopped: Path, name: str) -> None:
    run, case = stopped / name, CASES[name]
    found = sorted(path.name for path in run.glob("checkpoint-*"))[-1:]
    assert found == ([] if case.checkpoint is None else [f"checkpoint-{case.checkpoint:08d}"])
    assert not (run / "weights.safetensors").exists()
    succeeds(resumed(user, run))
    assert metrics(run) == metrics(whole)
    files, wanted = everything_in(run), everything_in(whole)
    assert files.keys() == wanted.keys()
    for file in ("weights.safetensors", "teacher.safetensors", "run.json"):
        assert files[file] == wanted[file], file


def test_a_teacher_resumes_too(stopped: Path, tmp_path: Path) -> None:
    succeeds(faqd_train(*TEACHER, "--out", stopped / "teacher", "--resume"))
    succeeds(faqd_train(*TEACHER, "--out", tmp_path / "whole"))
    weights = [everything_in(run)["weights.safetensors"] for run in (stopped / "teacher", tmp_path / "whole")]
    assert weights[0] == weights[1]


def test_metrics_written_after_the_checkpoint_are_cut_back(user: User, whole: Path, tmp_path: Path) -> None:
    # No checkpoint: the run starts over, and so do its metrics.
    record = (whole / "run.json").read_bytes()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_bytes(record)
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines[:2]) + '{"iteration": 13, "ep')
    succeeds(resumed(user, tmp_path / "run"))
    assert metrics(tmp_path / "run") == metrics(whole)


def test_ctrl_c_says_in_one_line_how_to_go_on(stopped: Path) -> None:
    for name, iteration in (("by Ctrl-C", 5), ("by Ctrl-C in a checkpoint", 4)):
        said = (stopped / f"{name}.txt").read_text().splitlines()
        goes_on = f"interrupted; the same command with --resume goes on from iteration {iteration}."
        assert said[-1] == f"error: {stopped / name}: {goes_on}"
        understood = ("folder:", "images: ", "teacher net.py:build: ", "training: ", "batch norm: ")
        start = ("mse scales, not equalized: ", "feature layer: ", "export rehearsed ", "net.py:build: batch norm ")
        before = (*understood, *start)
        other = [line for line in said[:-1] if not line.startswith(before) and ": iteration " not in line]
        assert other == []


def test_two_processes_do_not_train_in_one_folder(user: User, stopped: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped / next(iter(CASES)), run)
    (run / "weights.safetensors").unlink(missing_ok=True)
    before = everything_in(run)
    with held(run):
        outcome = faqd_train(*command(user, run), "--resume")
    assert outcome.code == 2 and "another process trains in it" in outcome.stderr
    assert everything_in(run) == before


def test_a_finished_run_stays_as_it_is(user: User, whole: Path) -> None:
    before = everything_in(whole)
    assert "this run is finished" in succeeds(resumed(user, whole)).stderr
    assert everything_in(whole) == before


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("--lr", "0.5", "recipe.training.lr: None there, 0.5 now"),
        ("--weight-bits", "2", "recipe.weight_bits: 4 there, 2 now"),
        ("--mean", "0.5,0.5,0.5", "data.mean: none there, (0.5, 0.5, 0.5) now"),
        ("--arch", "resnet8", "student.architecture: None there, resnet8 now"),
        ("--feature-layer", "features.5", "taps: None there, ['features.5'] now"),
    ],
)
def test_other_options_are_named(user: User, whole: Path, option: str, value: str, name: str) -> None:
    before = everything_in(whole)
    outcome = resumed(user, whole, option, value)
    assert outcome.code == 2
    assert name.replace("(", "[").replace(")", "]") in outcome.stderr
    assert everything_in(whole) == before


def test_an_absent_folder_starts_and_a_taken_one_needs_resume(user: User, whole: Path, tmp_path: Path) -> None:
    succeeds(resumed(user, tmp_path / "new"))
    assert everything_in(tmp_path / "new")["weights.safetensors"] == everything_in(whole)["weights.safetensors"]
    outcome = faqd_train(*command(user, whole))
    assert outcome.code == 2 and "--resume" in outcome.stderr


def test_a_time_limit_pauses_with_success_and_the_pieces_make_the_whole(
    user: User, whole: Path, tmp_path: Path
) -> None:
    run, pieces = tmp_path / "run", 0
    while not (run / "weights.safetensors").is_file():
        outcome = succeeds(resumed(user, run, "--time-limit", 0.001))
        pieces += 1
        if pieces < STEPS:
            assert f"paused by --time-limit after iteration {pieces} of {STEPS}" in outcome.stderr
            assert [path.name for path in run.glob("checkpoint-*")] == [f"checkpoint-{pieces:08d}"]
    assert pieces == STEPS
    assert everything_in(run)["weights.safetensors"] == everything_in(whole)["weights.safetensors"]
    assert metrics(run) == metrics(whole)


def test_the_optimizer_goes_on_in_the_layout_of_the_weights(tmp_path: Path) -> None:
    """A fused one, as on GPUs, refuses another."""
    network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before, after = (torch.optim.SGD(network.parameters(), 0.1, momentum=0.9) for _ in range(2))
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    before.step()
    save_checkpoint(tmp_path, network, before, Position(1))
    load_checkpoint(tmp_path / "checkpoint-00000001", network, after)
    for parameter in network.parameters():
        ours, wanted = (each.state[parameter]["momentum_buffer"] for each in (after, before))
        assert ours.equal(wanted) and ours.stride() == parameter.stride()
