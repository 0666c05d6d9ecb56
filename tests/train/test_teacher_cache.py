"""What a teacher says of training images, from files: the same targets, for one teacher and its images alone."""

from __future__ import annotations

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from faqd.errors import UserError
from faqd.train.data.augment import shifted, views, ways
from faqd.train.data.datasets import Augmentation
from faqd.train.loop import teacher_cache
from faqd.train.loop.batches import Batches, Images, Target
from faqd.train.loop.distributed import CPU, ProcessGroup
from faqd.train.loop.teacher_cache import TeacherCache, facts_of, refuse_uncacheable, written_cache
from faqd.train.recipes import Training
from tests.fixtures.toy_runs import User, everything_in, faqd_train, new_user, succeeds

LINE = ("--batch-size", 16, "--steps", 9, "--lr", 0.01, "--weight-bits", 4, "--act-bits", 4)
TRAINING = Training(2, 8, 0.1)
SHIFTED = Augmentation(pad=1, flip=True)
Usage = namedtuple("Usage", "total used free")


def taught(x: Tensor) -> Target:
    return Target({"scores": x.mean((2, 3))}, {"map": x * 1.1})


def images(count: int | None, how: Augmentation = SHIFTED) -> Images:
    pixels = torch.randint(0, 256, (24, 3, 6, 6), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    fixed = None if count is None else views(how, count)
    return Images(pixels, None, torch.tensor(1 / 64).view(1, 1, 1, 1), torch.tensor(-2.0).view(1, 1, 1, 1), how, fixed)


def cached(place: Path, train: Images, teach: Any = taught, **other: Any) -> tuple[Path, list[str]]:
    said: list[str] = []
    facts = {**facts_of({"name": "toy"}, "0" * 64, "fp32", train, ["map"]), **other}
    batches = Batches(train, train, 8, 3, teach, ProcessGroup())
    return written_cache(place, facts, train, teach, batches, TRAINING, said.append), said


# --- views ---


def test_the_first_view_is_the_image_and_no_two_are_equal() -> None:
    how = Augmentation(pad=2, flip=True)
    assert ways(how) == 50 and ways(Augmentation()) == 1
    for count, found in ((1, 1), (4, 4), (50, 50), (60, 50)):
        table = views(how, count)
        assert table.shape == (found, 3) and len(set(map(tuple, table.tolist()))) == found
        assert table[0].tolist() == [0, 2, 2]
        assert table[:1].equal(views(how, 1))
    pixels = images(None).pixels[:5]
    assert isinstance(pixels, Tensor)
    assert shifted(pixels, how, views(how, 1).expand(5, 3)).equal(pixels)


def test_processes_see_the_views_that_one_would() -> None:
    train = images(3)
    whole = Batches(train, train, 8, 3, None, ProcessGroup()).at(4).x
    for rank in range(2):
        assert Batches(train, train, 8, 3, None, ProcessGroup(rank, 2)).at(4).x.equal(whole[rank::2])
    seen = {Batches(train, train, 8, seed, None, ProcessGroup()).at(0).x.numpy().tobytes() for seed in range(4)}
    assert len(seen) == 4


# --- the files ---


@pytest.mark.parametrize("count", [1, 3, 18])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_batch_has_the_targets_of_what_it_shows(count: int, rank: int, tmp_path: Path) -> None:
    train, processes = images(count), ProcessGroup(rank, 2)
    cache = TeacherCache(cached(tmp_path / "cache", train)[0], CPU)
    batches = Batches(train, train, 8, 3, taught, processes, 2, cache=cache)
    for iteration in range(5):
        batch = batches.at(iteration)
        assert batch.target is not None
        torch.testing.assert_close(batch.target.outputs, taught(batch.x).outputs, rtol=1e-6, atol=1e-6)
        assert batch.target.maps["map"].equal(taught(batch.x).maps["map"].half().float())
        assert batch.target.maps["map"].dtype == torch.float32


def test_a_cache_is_written_once_and_names_its_size_and_worth(tmp_path: Path) -> None:
    place = tmp_path / "cache"
    folder, said = cached(place, images(1))
    once = "written once; that costs 1 of the 2 passes of this run, and is worth it."
    assert said == [f"teacher cache: 0.0 MiB for 24 images in 1 view, {once}"]
    _, said = cached(place, images(4))
    assert said[1].endswith("4 of the 2 passes of this run, and is worth it for other runs alone.")

    def silent(x: Tensor) -> Target:
        raise AssertionError("the teacher is asked again")

    again, said = cached(place, images(1), silent)
    assert again == folder and said == [f"teacher cache: {folder} is taken, 0.0 MiB."]


@pytest.mark.parametrize(
    "other", [{"teacher_sha256": "1" * 64}, {"images_sha256": "1" * 64}, {"taps": ["other"]}, {"teacher_dtype": "bf16"}]
)
def test_another_teacher_or_other_images_have_another_cache(other: dict[str, Any], tmp_path: Path) -> None:
    first, _ = cached(tmp_path, images(1))
    second, said = cached(tmp_path, images(1), **other)
    assert (
        second != first and f"has 1 of another teacher, other images, views or feature layers ({first.name})" in said[0]
    )


def cut(folder: Path) -> None:
    (folder / "maps-0.npy").write_bytes((folder / "maps-0.npy").read_bytes()[:-2])


def gone(folder: Path) -> None:
    (folder / "outputs-0.npy").unlink()


def renamed(folder: Path) -> None:
    record = json.loads((folder / "cache.json").read_text())
    (folder / "cache.json").write_text(json.dumps({**record, "teacher_sha256": "1" * 64}))


def torn(folder: Path) -> None:
    (folder / "cache.json").write_text("{")


DAMAGE = {
    cut: "maps-0.npy: .* cut short or changed",
    gone: "outputs-0.npy: 0 bytes",
    renamed: "under this name",
    torn: "cache.json: not valid JSON",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_cache_is_one_sentence(damage: Any, tmp_path: Path) -> None:
    folder, _ = cached(tmp_path, images(1))
    damage(folder)
    with pytest.raises(UserError, match=DAMAGE[damage]):
        cached(tmp_path, images(1))


def test_a_map_beyond_float16_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the map map of the teacher reaches \S+, and float16"):
        cached(tmp_path / "cache", images(1), lambda x: Target(taught(x).outputs, {"map": 1e6 + x}))
    assert list((tmp_path / "cache").iterdir()) == []


# --- whole runs ---


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


def test_a_run_with_a_cache_is_deterministic_resumes_and_is_near_to_one_without(user: User, tmp_path: Path) -> None:
    cache = ("--cache-teacher", tmp_path / "cache")
    succeeds(user.distill(tmp_path / "plain", *LINE))
    succeeds(user.distill(tmp_path / "whole", *LINE, *cache))
    run = tmp_path / "run"
    while not (run / "weights.safetensors").is_file():
        succeeds(user.distill(run, *LINE, *cache, "--time-limit", 0.001, "--resume"))
    ours, wanted, plain = (everything_in(tmp_path / name) for name in ("run", "whole", "plain"))
    assert all(ours[name] == wanted[name] for name in ("weights.safetensors", "run.json"))
    record = json.loads(wanted["run.json"])
    assert record["recipe"]["teacher_cache"] and 0 < max(record["teacher_cache"]["maps_moved"].values()) < 5e-4
    lines = [[json.loads(line) for line in files["metrics.jsonl"].splitlines()] for files in (wanted, plain)]
    for with_cache, without in zip(*lines, strict=True):
        assert with_cache["logit_loss"] == pytest.approx(without["logit_loss"], rel=5e-3)
        assert with_cache["affinity_loss"] == pytest.approx(without["affinity_loss"], rel=5e-3)
        assert with_cache["affinity_loss"] != without["affinity_loss"]
    outcome = user.distill(run, *LINE, "--resume")
    assert outcome.code == 2 and "recipe.teacher_cache: True there, False now" in outcome.stderr


def test_images_that_are_cut_out_anew_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="in 50 ways here"):
        refuse_uncacheable(Augmentation(2, True), Training(1, 8))
    refuse_uncacheable(Augmentation(), Training(1, 8))
    with pytest.raises(UserError, match="--decode reduced trains on others"):
        refuse_uncacheable(Augmentation(), Training(1, 8, decode="reduced"))
    teacher = tmp_path / "teacher"
    succeeds(faqd_train("teacher", "--arch", "resnet8", "--steps", 2, "--views", 2, "--out", teacher))
    line = ("distill", "--recipe", "digits", "--teacher", teacher, "--steps", 2, "--cache-teacher", tmp_path / "cache")
    outcome = faqd_train(*line, "--out", tmp_path / "run")
    assert outcome.code == 2 and "--cache-teacher: every iteration cuts its images out anew" in outcome.stderr
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    succeeds(faqd_train(*line, "--views", 2, "--out", tmp_path / "run"))


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    user: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache, "_append", full)
        outcome = user.distill(run, *LINE, "--cache-teacher", cache)
    assert outcome.code == 2 and f"no space left on the disk ({cache}" in outcome.stderr
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(10, 10, 0))
        outcome = user.distill(run, *LINE, "--cache-teacher", cache)
    assert outcome.code == 2 and "0.0 MiB are free; give another disk, fewer --views" in outcome.stderr
    assert list(cache.iterdir()) == [] and not run.exists()


def test_a_place_where_nothing_can_be_made_is_one_sentence(user: User, tmp_path: Path) -> None:
    outcome = user.distill(tmp_path / "run", *LINE, "--cache-teacher", "/proc/cache")
    assert outcome.code == 2 and "/proc/cache: no folder can be made there" in outcome.stderr
    assert not (tmp_path / "run").exists()
