"""Two processes under torchrun train what one would: gloo on the CPU, batch norm frozen."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from faqd.train.data.datasets import Augmentation
from faqd.train.data.listed_files import listed
from faqd.train.data.pictures import PictureFiles, Pictures, Read
from faqd.train.loop.batches import Batches, Images
from faqd.train.loop.distributed import ProcessGroup
from faqd.train.loop.feed import DecodedPixels
from faqd.train.networks.tensor_files import read_tensors
from tests.fixtures.toy_runs import User, new_user, succeeds
from tests.train.test_data import random_images, save_folder

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
TOLERANCE = 5e-3
"""Relative, of every loss: sums are rounded in another order, and a value on the edge of a code may tip over."""
LINE = ("--batch-size", 16, "--steps", 12, "--lr", 0.01, "--weight-bits", "2,4", "--act-bits", 4)
KILLED = """
import os, signal, sys
from faqd.command import run
from faqd.train.loop import fit as loop
from faqd.train.cli import cli
from faqd.train.loop.trainer import Trainer

plain, loop.CHECKPOINT_EVERY_S, loop.CHECK_EVERY = Trainer.step, 0.0, 1

def step(trainer, batch, total):
    if trainer.iteration == 7 and trainer.processes.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    plain(trainer, batch, total)

Trainer.step = step
run(cli, sys.argv[1:])
"""
STREAMED = """
import sys
from faqd.command import run
from faqd.train.cli import cli
from faqd.train.data import pool

pool.IN_MEMORY = 0
if __name__ == "__main__":  # the processes that decode load this file too
    run(cli, sys.argv[1:])
"""
ENDED = """
import sys
from pathlib import Path
from faqd.train.cli import cli

cli(sys.argv[1:], standalone_mode=False)
threads = sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
print([name for name in threads if "gloo" in name])
"""


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


def line(user: User, out: Path, *more: object) -> list[str]:
    return [str(word) for word in ("distill", *user.teacher, *user.data, *LINE, "--out", out, *more)]


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)


def alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def together(user: User, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("together") / "all"
    result = torchrun("-m", "faqd.train", *line(user, out, "--json", "-"))
    assert result.returncode == 0, result.stderr
    # One process speaks: a single JSON document, and each student's line once.
    assert [record["recipe"]["weight_bits"] for record in json.loads(result.stdout)] == [2, 4]
    assert result.stderr.count("w2a4-s0: student 2/4") == result.stderr.count("w4a4-s0: student 4/4") == 1
    return out


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key not in ("seconds", "waited")} for entry in lines]


def test_two_processes_reproduce_the_losses_of_one(user: User, together: Path, tmp_path: Path) -> None:
    succeeds(user.distill(tmp_path / "all", *LINE))
    for name in ("w2a4-s0", "w4a4-s0"):
        ours, wanted = metrics(together / name), metrics(tmp_path / "all" / name)
        assert [entry["iteration"] for entry in ours] == [5, 10, 12]
        for found, expected in zip(ours, wanted, strict=True):
            assert found == pytest.approx(expected, rel=TOLERANCE, abs=0)
        # More happened than the tolerance forgives.
        first, last = wanted[0]["select_logit_loss"], wanted[-1]["select_logit_loss"]
        assert abs(last - first) > 3 * TOLERANCE * first


def test_parts_in_two_processes_reproduce_the_losses_of_one(user: User, together: Path, tmp_path: Path) -> None:
    result = torchrun("-m", "faqd.train", *line(user, tmp_path / "run", "--weight-bits", 4, "--accumulate", 4))
    assert result.returncode == 0, result.stderr
    for found, expected in zip(metrics(tmp_path / "run"), metrics(together / "w4a4-s0"), strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=0)


def test_two_processes_share_the_cache_of_a_teacher(user: User, together: Path, tmp_path: Path) -> None:
    cache = ("--weight-bits", 4, "--cache-teacher", tmp_path / "cache")
    result = torchrun("-m", "faqd.train", *line(user, tmp_path / "two", *cache))
    assert result.returncode == 0, result.stderr
    assert "is taken" in succeeds(user.distill(tmp_path / "one", *LINE, *cache)).stderr
    for found, expected in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=0)


def test_processes_that_were_killed_resume_to_the_same_bits(user: User, together: Path, tmp_path: Path) -> None:
    script, out = tmp_path / "killed.py", tmp_path / "all"
    script.write_text(KILLED)
    result = torchrun(str(script), *line(user, out))
    # Who trained with it ends in a sentence, whether it notices or is ended by torchrun.
    assert result.returncode != 0 and re.search("error: (another of the processes|.*interrupted)", result.stderr)
    assert "fit.py" not in result.stderr
    assert {path.name for path in out.glob("*/checkpoint-*")} == {"checkpoint-00000007"}
    result = torchrun("-m", "faqd.train", *line(user, out, "--resume"))
    assert result.returncode == 0, result.stderr
    assert_same(out, together)


def assert_same(out: Path, together: Path) -> None:
    for name in ("w2a4-s0", "w4a4-s0"):
        assert metrics(out / name) == metrics(together / name)
        ours, wanted = (read_tensors(run / name / "weights.safetensors") for run in (out, together))
        assert all(ours[key].equal(wanted[key]) for key in wanted)


def test_torchrun_starts_a_killed_process_again_and_ends_with_the_same_bits(
    user: User, together: Path, tmp_path: Path
) -> None:
    script, out = tmp_path / "killed.py", tmp_path / "all"
    script.write_text(KILLED)
    result = torchrun("--max-restarts", "1", str(script), *line(user, out))
    assert result.returncode == 0, result.stderr
    assert "(exitcode: -9) local_rank: 1" in result.stderr
    assert_same(out, together)
    # Without a kill a folder that holds a run is refused as ever.
    result = torchrun("-m", "faqd.train", *line(user, out))
    assert result.returncode != 0 and "already holds a run" in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads the threads' names from /proc")
def test_no_thread_of_the_group_outlives_the_run(user: User, tmp_path: Path) -> None:
    """One that asks for Python while the interpreter ends kills the process after its work, now and then."""
    script = tmp_path / "ended.py"
    script.write_text(ENDED)
    result = torchrun(str(script), *line(user, tmp_path / "run", "--steps", 2))
    assert result.returncode == 0, result.stderr
    # The lines of two processes may meet in one.
    assert re.findall(r"\[.*?\]", result.stdout) == ["[]", "[]"], result.stdout


def test_two_processes_on_pictures_train_what_they_do_in_memory(user: User, together: Path, tmp_path: Path) -> None:
    script, out = tmp_path / "streamed.py", tmp_path / "all"
    script.write_text(STREAMED)
    result = torchrun(str(script), *line(user, out, "--image-size", 8, "--workers", 1))
    assert result.returncode == 0, result.stderr
    assert "training waited for images " in result.stderr
    assert_same(out, together)


def test_files_that_either_process_passed_over_are_named(tmp_path: Path) -> None:
    there, script = new_user(tmp_path / "user"), tmp_path / "streamed.py"
    for number in range(0, 120, 10):
        (there.folder / "images" / f"{number:04}.png").write_bytes(b"torn" * (number + 1))
    # Before training hardly anything is read, so that only the process whose share has a file meets it.
    few = "from faqd.train.data import pictures\nfrom faqd.train.loop import calibration_images\n"
    few += "pool.HEAD = pictures.HEAD = calibration_images.CALIBRATION_IMAGES = 4\npool.LOOKED_AT = 4\n"
    script.write_text(STREAMED.replace("pool.IN_MEMORY", f"{few}pool.BROKEN_PERCENT = 50\npool.IN_MEMORY"))
    said = []
    for name, run in (("two", torchrun), ("one", alone)):
        more = ("--image-size", 8, "--weight-bits", 4, "--workers", 0)
        result = run(str(script), *line(there, tmp_path / name, *more))
        assert result.returncode == 0, result.stderr
        said.append(json.loads((tmp_path / name / "run.json").read_text())["broken_images"])
    assert said[0] == said[1] and len(said[0]) > 5


def test_processes_share_the_batch_that_one_would_have() -> None:
    pixels = torch.arange(24 * 16, dtype=torch.uint8).view(24, 1, 4, 4)
    images = Images(pixels, torch.arange(24), torch.tensor(1.0), torch.tensor(0.0), Augmentation(pad=1, flip=True))
    whole = Batches(images, images, 8, 3, None, ProcessGroup()).at(4)
    parts = [Batches(images, images, 8, 3, None, ProcessGroup(rank, 2)).at(4) for rank in range(2)]
    assert whole.labels is not None
    for rank, part in enumerate(parts):
        assert part.x.equal(whole.x[rank::2]) and part.labels is not None and part.labels.equal(whole.labels[rank::2])


def test_a_process_decodes_its_share_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(tmp_path, random_images(24))
    files = listed(tmp_path)
    read: list[int] = []
    plain = PictureFiles.__getitem__

    def noted(self: PictureFiles, position: int) -> Read:
        read.append(position)
        return plain(self, position)

    monkeypatch.setattr(PictureFiles, "__getitem__", noted)
    one = torch.tensor(1.0)

    def batches(rank: int, size: int) -> Batches:
        pictures = Pictures(PictureFiles(files, np.arange(24), lambda image: image), (8, 8, 3))
        images = Images(DecodedPixels(pictures), None, one, one, Augmentation(pad=1, flip=True))
        return Batches(images, images, 8, 3, None, ProcessGroup(rank, size, workers=0))

    whole, of_whole = batches(0, 1).at(4).x, list(read)
    for rank in range(4):
        read.clear()
        assert batches(rank, 4).at(4).x.equal(whole[rank::4]) and read == of_whole[rank::4]
