"""Batches that other processes decode: the same bits as from memory, however many there are and whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from faqd.errors import UserError
from faqd.train.data import pool as pools
from faqd.train.data.listed_files import listed
from faqd.train.data.pictures import PictureFiles, Pictures
from faqd.train.loop.feed import Feed
from faqd.train.loop.trainer import Trainer
from tests.fixtures.toy_runs import PLAIN, Outcome, User, faqd_deploy, faqd_train, new_user, succeeds
from tests.train.test_data import random_images, save_folder

CPU = torch.device("cpu")
LINE = ("--image-size", 8, "--steps", 9, "--weight-bits", 4, "--act-bits", 4)
KILLED = """
import os, signal, sys
from faqd.command import run
from faqd.train.cli import cli
from faqd.train.data import pool
from faqd.train.loop import fit
from faqd.train.loop.trainer import Trainer

pool.IN_MEMORY, fit.CHECKPOINT_EVERY_S = 0, 0.0
plain = Trainer.step

def step(trainer, batch, total):
    if trainer.iteration == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    plain(trainer, batch, total)

Trainer.step = step
run(cli, sys.argv[1:])
"""


def as_it_is(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return image


def dies(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    os._exit(3)


def pictures_in(folder: Path, fit: Any = as_it_is) -> Pictures:
    files = listed(folder)
    return Pictures(PictureFiles(files, np.arange(len(files)), fit), (8, 8, 3))


def test_any_number_of_workers_gives_the_batches_of_memory_in_any_order(tmp_path: Path) -> None:
    save_folder(tmp_path, random_images(40))
    (tmp_path / "5.png").write_bytes(b"torn")
    pictures = pictures_in(tmp_path)
    whole = torch.from_numpy(pictures[:]).permute(0, 3, 1, 2)
    state = torch.get_rng_state()
    for workers in (0, 1, 3):
        feed = Feed(pictures_in(tmp_path), lambda i: [(i * 3 + k) % 40 for k in range(7)], workers, CPU)
        for iteration in (0, 1, 2, 9, 10, 4):
            expected = whole[[(iteration * 3 + k) % 40 for k in range(7)]]
            assert torch.equal(feed.at(iteration), expected)
        assert feed._pictures.findings.broken == {"5.png": "do not decode"}
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_changed_file_is_one_sentence_from_any_process(workers: int, tmp_path: Path) -> None:
    save_folder(tmp_path, random_images(40))
    feed = Feed(pictures_in(tmp_path), lambda i: list(range(i * 8, i * 8 + 8)), workers, CPU)
    os.utime(tmp_path / "7.png", ns=(0, 1))
    with pytest.raises(UserError, match=r"^\S*7.png: changed, or gone, .*--resume, or give another --out\.$"):
        for iteration in range(5):
            feed.at(iteration)


def test_a_process_that_dies_is_one_sentence(tmp_path: Path) -> None:
    save_folder(tmp_path, random_images(8))
    with pytest.raises(UserError, match=r"a process that decodes images ended .*fewer --workers"):
        Feed(pictures_in(tmp_path, dies), lambda i: [0, 1], 1, CPU).at(0)


def test_a_long_wait_is_told_with_a_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(tmp_path, random_images(8))
    feed = Feed(pictures_in(tmp_path), lambda i: [0, 1], 0, CPU)
    monkeypatch.setattr(Feed, "waited", 0.05)
    assert feed.in_words() == "training waited for images 5 % of the time."
    monkeypatch.setattr(Feed, "waited", 0.31)
    assert feed.in_words().startswith("training waited for images 31 % of the time, with --workers 0. More of them")


# --- whole runs ---


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


@pytest.fixture(scope="module")
def whole(user: User, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In memory, never stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    succeeds(user.distill(run, *LINE))
    return run


def streamed(user: User, out: Path, *more: object) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools, "IN_MEMORY", 0)
        return user.distill(out, *LINE, *more)


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in ("seconds", "waited")} for line in lines]


def assert_same(run: Path, whole: Path) -> None:
    for name in ("weights.safetensors", "run.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert metrics(run) == metrics(whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_pictures_is_the_run_in_memory(workers: int, user: User, whole: Path, tmp_path: Path) -> None:
    outcome = succeeds(streamed(user, tmp_path / "run", "--workers", workers))
    assert_same(tmp_path / "run", whole)
    assert "training waited for images " in outcome.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert lines and all(0 <= json.loads(line)["waited"] <= 1 for line in lines)


def test_labels_stay_with_the_pictures(tmp_path: Path) -> None:
    for name, seed in (("ant", 0), ("bee", 1)):
        save_folder(tmp_path / "images" / name, random_images(60, seed=seed))
    data = ("--data", f"folder:{tmp_path / 'images'}", "--labels", *PLAIN, "--image-size", 8)
    line = ("teacher", "--arch", "resnet8", *data, "--steps", 9, "--batch-size", 16, "--workers", 2)
    succeeds(faqd_train(*line, "--out", tmp_path / "memory"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools, "IN_MEMORY", 0)
        succeeds(faqd_train(*line, "--out", tmp_path / "pictures"))
    assert_same(tmp_path / "pictures", tmp_path / "memory")


def test_what_needs_no_training_and_what_is_reported_is_the_same(user: User, whole: Path, tmp_path: Path) -> None:
    said = []
    with pytest.MonkeyPatch.context() as patch:
        for name, limit in (("memory", pools.IN_MEMORY), ("pictures", 0)):
            patch.setattr(pools, "IN_MEMORY", limit)
            succeeds(faqd_deploy("ptq", *user.teacher, *user.data, "--image-size", 8, "--out", tmp_path / name))
            said.append(succeeds(faqd_train("eval", whole)).stdout)
    assert said[0] == said[1] and "images: " in said[0]
    for file in ("student.tensorrt.onnx", "eval.npz"):
        assert (tmp_path / "memory" / file).read_bytes() == (tmp_path / "pictures" / file).read_bytes(), file


def test_a_killed_run_on_pictures_goes_on_to_the_same_bits(user: User, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = ["distill", *user.teacher, *user.data, "--batch-size", 16, *LINE, "--out", run, "--workers", 2]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.Popen([sys.executable, "-c", KILLED, *map(str, line)], env=environment, start_new_session=True)
    assert killed.wait() == -9 and (run / "checkpoint-00000007").is_dir()
    assert_ends(killed.pid)
    succeeds(streamed(user, run, "--workers", 1, "--resume"))
    assert_same(run, whole)


def assert_ends(group: int) -> None:
    """Nothing is left of a group of processes, now or soon."""
    for _ in range(600):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("the processes that decode outlive the one that they decode for")


def test_broken_files_are_counted_through_a_pause_and_named(user: User, tmp_path: Path) -> None:
    there = new_user(tmp_path / "user")
    for number in (3, 50, 80, 110):
        (there.folder / "images" / f"{number:04}.png").write_bytes(b"torn" * number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools, "LOOKED_AT", 10)
        patch.setattr(pools, "BROKEN_PERCENT", 50)
        succeeds(streamed(there, tmp_path / "run", "--time-limit", 0.001))
        # The toy folder is all read in calibration; of a large one these would have been in batches before the pause.
        path = tmp_path / "run" / "checkpoint-00000001" / "position.json"
        position = json.loads(path.read_text())
        path.write_text(json.dumps({**position, "broken": {"seen/before.png": "are empty files"}}))
        outcome = succeeds(streamed(there, tmp_path / "run", "--resume"))
    broken = json.loads((tmp_path / "run" / "run.json").read_text())["broken_images"]
    assert broken.pop("seen/before.png") == "are empty files" and "(seen/before.png)" in outcome.stderr
    assert broken == position["broken"] and 2 <= len(broken) <= 4
    assert f"{len(broken)} of 120 images do not decode ({', '.join(broken)})" in outcome.stderr


def test_a_file_that_changes_in_training_stops_the_run(user: User, tmp_path: Path) -> None:
    there = new_user(tmp_path / "user")
    plain = Trainer.step

    def step(trainer: Trainer, *arguments: Any) -> None:
        for path in (there.folder / "images").iterdir():
            os.utime(path)
        plain(trainer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        outcome = streamed(there, tmp_path / "run", "--workers", 0)
    assert outcome.code == 2 and "changed, or gone, since the images were listed" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_a_list_that_grew_is_another_run(tmp_path: Path) -> None:
    there = new_user(tmp_path / "user")
    succeeds(there.distill(tmp_path / "run", *LINE, "--time-limit", 0.001))
    (there.folder / "images" / "new.png").write_bytes((there.folder / "images" / "0001.png").read_bytes())
    outcome = there.distill(tmp_path / "run", *LINE, "--resume")
    assert outcome.code == 2 and "files: 120 files, the newest of" in outcome.stderr
    assert "121 files, the newest of" in outcome.stderr
