"""Students that train side by side end, to the last bit, as each would alone: resumed, joined later or left behind."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from faqd.train import distill as distillation
from faqd.train.loop import fit as loop
from faqd.train.loop import trainer as job
from faqd.train.loop.batches import Batches
from faqd.train.loop.trainer import Job
from faqd.train.losses import objective
from tests.fixtures.toy_runs import NET, Outcome, User, everything_in, new_user, succeeds, write_net

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
STEPS = 8
# The network drops values at random, which must not depend on who else is there.
NET_WITH_DROPOUT = (
    NET.replace("self.head(self", "self.head(self.dropout(self")
    .replace("((2, 3))", "((2, 3)))")
    .replace("self.head =", "self.dropout = nn.Dropout(0.2)\n        self.head =")
)
LINE = ("--steps", STEPS, "--batch-size", 16, "--affinity", "fast", "--act-bits", 4)
LISTS = ("--weight-bits", "1,4", "--seeds", 2)
ALONE = {
    f"w{bits}a4-s{seed}": ("--weight-bits", bits, "--seed", seed, "--data-seed", seed)
    for bits in (1, 4)
    for seed in (0, 1)
}
FROM_SCRATCH = ("--init", "scratch")
WEIGHTS = "weights.safetensors"


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    user = new_user(tmp_path_factory.mktemp("user"))
    write_net(user.folder, NET_WITH_DROPOUT)
    return user


def distilled(user: User, out: Path, *more: object) -> Outcome:
    return user.distill(out, *LINE, *more)


@pytest.fixture(scope="module")
def alone(user: User, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights of every student, trained by itself."""
    folder = tmp_path_factory.mktemp("alone")
    for name, options in ALONE.items():
        succeeds(distilled(user, folder / name, *options))
    return {name: (folder / name / WEIGHTS).read_bytes() for name in ALONE}


def weights_in(folder: Path) -> dict[str, bytes]:
    return {path.name: (path / WEIGHTS).read_bytes() for path in folder.iterdir() if (path / WEIGHTS).is_file()}


def test_each_of_many_is_the_same_student_alone(user: User, alone: dict[str, bytes], tmp_path: Path) -> None:
    succeeds(distilled(user, tmp_path / "all", *LISTS))
    assert weights_in(tmp_path / "all") == alone
    # Where training does not help, two seeds of one width keep the untrained student that they share.
    assert len(set(alone.values())) >= 3
    for name in alone:
        lines = [json.loads(line) for line in (tmp_path / "all" / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["iteration"] for line in lines] == [5, STEPS]


def test_seeds_from_scratch_share_every_batch(user: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []
    plain = Batches.at

    def counted(batches: Batches, iteration: int) -> Any:
        shown.append(iteration)
        return plain(batches, iteration)

    monkeypatch.setattr(Batches, "at", counted)
    succeeds(distilled(user, tmp_path / "all", *LISTS, *FROM_SCRATCH))
    assert shown == list(range(STEPS))
    succeeds(distilled(user, tmp_path / "one", "--weight-bits", 4, "--seed", 1, *FROM_SCRATCH))
    together = weights_in(tmp_path / "all")
    assert together["w4a4-s1"] == (tmp_path / "one" / WEIGHTS).read_bytes()
    assert len(set(together.values())) == 4


@pytest.fixture(scope="module")
def killed(user: User, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of many that were killed between two checkpoints, within one, and between two final weights."""
    folder = tmp_path_factory.mktemp("killed")
    # One stream of batches each, so that all four members are under way at once.
    cases = {
        "checkpoint": {"when": ["write", ".checkpoint-00000005", 3], "every_s": 0.0},
        "between": {"when": ["write", ".checkpoint-00000005", 5], "every_s": 0.0},
        "weights": {"when": ["write", f".{WEIGHTS}", 2], "every_s": 1e9},
    }
    line = ("distill", *user.teacher, *user.data, *LINE, *LISTS, *FROM_SCRATCH)
    asked = [
        {
            **case,
            "signal": "SIGKILL",
            "said": str(folder / "said"),
            "line": [*map(str, line), "--out", str(folder / name)],
        }
        for name, case in cases.items()
    ]
    runner = [sys.executable, str(Path(__file__).parents[1] / "fixtures" / "killed_runs.py")]
    result = subprocess.run(runner, input=json.dumps(asked), capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [-signal.SIGKILL] * len(cases)
    return folder


@pytest.fixture(scope="module")
def whole(user: User, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "all"
    succeeds(distilled(user, folder, *LISTS, *FROM_SCRATCH))
    return folder


@pytest.mark.parametrize(
    ("name", "checkpoints", "finished"),
    [
        ("checkpoint", [5, 4, 4, 4], []),
        ("between", [5, 5, 4, 4], []),
        ("weights", [], ["w1a4-s0"]),
    ],
)
def test_killed_members_go_on_from_where_each_was(
    user: User, killed: Path, whole: Path, name: str, checkpoints: list[int], finished: list[str]
) -> None:
    run = killed / name
    found = sorted(run.glob("*/checkpoint-*"))
    assert [int(path.name[-8:]) for path in found] == checkpoints
    assert list(weights_in(run)) == finished
    said = succeeds(distilled(user, run, *LISTS, *FROM_SCRATCH, "--resume")).stderr
    assert [f"{run / member}: this run is finished." in said for member in sorted(ALONE)] == [
        member in finished for member in sorted(ALONE)
    ]
    files, wanted = everything_in(run), everything_in(whole)
    assert files.keys() == wanted.keys()
    assert all(files[file] == wanted[file] for file in wanted if not file.endswith("metrics.jsonl"))


def test_a_longer_list_trains_the_new_ones_only(user: User, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "all"
    shutil.copytree(whole, run)
    before = weights_in(run)
    longer = ("--weight-bits", "1,4,2", "--seeds", 2)
    assert succeeds(distilled(user, run, *longer, *FROM_SCRATCH, "--resume")).stderr.count("is finished") == 4
    after = weights_in(run)
    assert after.keys() == {*before, "w2a4-s0", "w2a4-s1"} and after.items() >= before.items()


def test_each_goes_on_with_its_own_threads_to_the_end(
    user: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch norm is settled after the last iteration: sums of floats as well."""
    threads, settled = torch.get_num_threads(), []
    line = (tmp_path / "all", *LISTS, *FROM_SCRATCH)
    succeeds(distilled(user, *line, "--time-limit", 0.001))
    position = tmp_path / "all" / "w1a4-s0" / "checkpoint-00000001" / "position.json"
    position.write_text(json.dumps({**json.loads(position.read_text()), "threads": threads + 1}))
    plain = job.settle_norms

    def watched(*arguments: Any) -> None:
        settled.append(torch.get_num_threads())
        plain(*arguments)

    monkeypatch.setattr(loop, "settle_norms", watched)
    try:
        succeeds(distilled(user, *line, "--resume"))
    finally:
        torch.set_num_threads(threads)
    assert settled == [threads] * 3 + [threads + 1]


def test_one_that_diverges_leaves_the_others_alone(
    user: User, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = objective.distill_job

    def one_diverges(plan: Any, *more: Any) -> Job:
        job = plain(plan, *more)
        if plan.out.name == "w4a4-s0":
            vars(job)["losses"] = lambda answer, batch, generator: {"logit": answer[0].sum() * torch.inf}
        return job

    monkeypatch.setattr(distillation, "distill_job", one_diverges)
    outcome = distilled(user, tmp_path / "all", *LISTS, *FROM_SCRATCH)
    assert outcome.code == 1 and f"{tmp_path / 'all' / 'w4a4-s0'}: the logit loss is not finite" in outcome.stderr
    expected = weights_in(whole)
    del expected["w4a4-s0"]
    assert weights_in(tmp_path / "all") == expected


# One process per folder ---------------------------------------------------------------------------------------------


def test_a_file_system_without_locks_trains_all_the_same(
    user: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    succeeds(distilled(user, tmp_path / "run"))
