"""Whole runs on other sources than a folder: the student of the folder's, to the last bit, also after a kill."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from faqd.train.data import pool as pools
from faqd.train.data.sources import stored
from tests.fixtures.image_sources import SOURCES, Pixels, behind_a_url
from tests.fixtures.toy_runs import PLAIN, User, faqd_deploy, faqd_train, new_user, succeeds
from tests.train.test_feed import KILLED, assert_ends, metrics

pytest.importorskip("pyarrow")
LINE = ("--image-size", 8, "--steps", 9, "--weight-bits", 4, "--act-bits", 4)
OTHERS = [*(kind for kind in SOURCES if kind != "folder"), "shards behind a URL"]


def digits(count: int = 120) -> Pixels:
    grey = np.rint(load_digits().images[:count] * 255 / 16).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=3)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sources")
    made = {kind: SOURCES[kind](folder / kind, digits()) for kind in SOURCES}
    return {**made, "shards behind a URL": behind_a_url(made["shards"])}


@pytest.fixture(scope="module")
def whole(user: User, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a folder, in memory, never stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    succeeds(user.distill(run, *LINE))
    return run


def assert_same_student(run: Path, whole: Path) -> None:
    assert (run / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
    assert metrics(run) == metrics(whole)


@pytest.mark.parametrize("kind", OTHERS)
def test_the_same_images_make_the_same_student(
    kind: str, user: User, whole: Path, sources: dict[str, str], tmp_path: Path
) -> None:
    data = ("--data", sources[kind], *PLAIN)
    succeeds(user.distill(tmp_path / "memory", *data, *LINE))
    assert_same_student(tmp_path / "memory", whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools, "IN_MEMORY", 0)
        outcome = succeeds(user.distill(tmp_path / "streamed", *data, *LINE, "--workers", 2))
        assert_same_student(tmp_path / "streamed", whole)
        assert "are decoded when an iteration needs them" in outcome.stderr
        told = succeeds(faqd_train("eval", tmp_path / "streamed")).stdout
    assert told == succeeds(faqd_train("eval", whole)).stdout


def test_a_killed_run_on_shards_goes_on_to_the_same_bits(
    user: User, whole: Path, sources: dict[str, str], tmp_path: Path
) -> None:
    run, data = tmp_path / "run", ("--data", sources["shards"], *PLAIN)
    line = ["distill", *user.teacher, *data, "--batch-size", 16, *LINE, "--out", run, "--workers", 2]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.Popen([sys.executable, "-c", KILLED, *map(str, line)], env=environment, start_new_session=True)
    assert killed.wait() == -9 and (run / "checkpoint-00000007").is_dir()
    assert_ends(killed.pid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools, "IN_MEMORY", 0)
        succeeds(user.distill(run, *data, *LINE, "--workers", 1, "--resume"))
    assert_same_student(run, whole)


@pytest.mark.parametrize("kind", ["shards", "parquet", "npy"])
def test_calibration_evaluation_and_bundle_are_those_of_the_folder(
    kind: str, user: User, sources: dict[str, str], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, more in (("folder", user.data), (kind, ("--data", sources[kind], *PLAIN))):
            succeeds(faqd_deploy("ptq", *user.teacher, *more, "--image-size", 8, "--out", tmp_path / name))
            patch.setattr(pools, "IN_MEMORY", 0)
    files = ["student.tensorrt.onnx", *(["eval.npz"] if kind != "npy" else [])]
    for file in files:
        assert (tmp_path / "folder" / file).read_bytes() == (tmp_path / kind / file).read_bytes(), file
    with np.load(tmp_path / kind / "eval.npz") as found:
        assert ("names" in found.files) == ("sizes" in found.files) == (kind != "npy")


def test_a_run_whose_images_moved_into_shards_is_still_evaluated(whole: Path, sources: dict[str, str]) -> None:
    told = succeeds(faqd_train("eval", whole)).stdout
    assert succeeds(faqd_train("eval", whole, "--data", sources["shards"])).stdout == told


def test_a_path_with_a_pattern_is_found_from_anywhere(user: User, sources: dict[str, str], tmp_path: Path) -> None:
    where = Path(sources["parquet"].partition(":")[2])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where.parent.parent)
        relative = f"parquet:{where.parent.name}/*.parquet"
        succeeds(user.distill(tmp_path / "run", "--data", relative, *PLAIN, *LINE))
    succeeds(faqd_train("eval", tmp_path / "run"))
    assert stored.is_url("s3" + "://bucket/a.tar") and not stored.is_url("a.tar")
