"""JPEG files at a part of their size: which of them, to which pixels, and that nothing but batches ever sees these."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from faqd.preprocess import Preprocess, Resize
from faqd.train.data import pool as pools
from faqd.train.data.datasets import load_dataset
from faqd.train.data.decode import read_picture
from faqd.train.data.options import DataOptions
from faqd.train.data.pictures import Pictures
from tests.fixtures.image_sources import write_tar
from tests.fixtures.toy_runs import PLAIN, User, faqd_train, new_user, succeeds
from tests.train.test_feed import metrics

MOST, RMS = 23, 3.05
"""Levels of 255: what docs/decisions.md states of photographs."""


def photograph(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth, with edges and a little noise."""
    draw = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin(a * rows + b * columns) for a, b in draw.uniform(0.01, 0.06, (3, 2))]
    pixels = np.stack(waves, -1) + draw.normal(0, 6, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = draw.integers(0, 256, 3)
    return pixels.clip(0, 255).astype(np.uint8)


def encoded(height: int, width: int, kind: str = "JPEG", seed: int = 0, **more: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(photograph(height, width, seed)).save(file, kind, **more)
    return file.getvalue()


def preprocess_of(size: int, resize: Resize = "stretch") -> Preprocess:
    return Preprocess(size, size, (0.0,) * 3, (1.0,) * 3, resize)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[274] = 6
    return exif


@pytest.mark.parametrize(
    ("height", "width", "size", "resize", "decoded"),
    [
        (480, 640, 224, "stretch", (480, 640)),  # half of it is less than twice of what is wanted
        (480, 640, 120, "stretch", (240, 320)),
        (480, 640, 119, "crop", (240, 320)),  # to 119 x 159
        (480, 640, 121, "crop", (480, 640)),
        (480, 640, 160, "letterbox", (240, 320)),  # to 120 x 160
        (480, 640, 30, "stretch", (60, 80)),
        (480, 640, 1, "stretch", (60, 80)),  # an eighth is the least
        (480, 636, 30, "stretch", (120, 159)),  # no multiple of 8
        (481, 640, 30, "stretch", (481, 640)),
        (16, 16, 32, "stretch", (16, 16)),
    ],
)
def test_what_is_far_beyond_the_wanted_size_is_decoded_at_a_part_of_it(
    height: int, width: int, size: int, resize: Resize, decoded: tuple[int, int]
) -> None:
    scaled = preprocess_of(size, resize).scaled_size
    assert read_picture(encoded(height, width), scaled).pixels.shape[:2] == decoded
    turned_aside = read_picture(encoded(width, height, exif=turned()), scaled)
    assert turned_aside.pixels.shape[:2] == decoded
    for kind in ("PNG", "WEBP", "BMP"):
        assert read_picture(encoded(height, width, kind), scaled).pixels.shape[:2] == (height, width)
    assert read_picture(encoded(height, width)).pixels.shape[:2] == (height, width)


@pytest.mark.parametrize("resize", ["stretch", "crop", "letterbox"])
@pytest.mark.parametrize("size", [120, 60, 30])
def test_the_pixels_are_nearly_those_of_the_whole(size: int, resize: Resize) -> None:
    for seed in range(4):
        preprocess, content = preprocess_of(size, resize), encoded(480, 640, seed=seed, quality=92)
        reduced = read_picture(content, preprocess.scaled_size).pixels
        wanted = preprocess.fit(read_picture(content).pixels).astype(int)
        difference = np.abs(preprocess.fit(reduced) - wanted)
        assert difference.max() <= MOST and np.sqrt((difference**2).mean()) <= RMS


@pytest.mark.parametrize(
    ("resize", "size"), [("stretch", (6, 4)), ("crop", (6, 12)), ("letterbox", (2, 4))], ids=lambda value: str(value)
)
def test_what_an_image_is_scaled_to(resize: Resize, size: tuple[int, int]) -> None:
    preprocess = Preprocess(6, 4, (0.0,) * 3, (1.0,) * 3, resize)
    assert preprocess.scaled_size(50, 100) == size


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(60):
        (folder / f"{number}.jpg").write_bytes(encoded(64, 96, seed=number))
    return folder


def test_batches_alone_are_reduced(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "IN_MEMORY", 0)
    options = DataOptions(f"folder:{photographs}", image_size=(8, 8), mean="none", std="none")
    pictures = load_dataset(options, with_labels=False).train.pixels
    assert isinstance(pictures, Pictures)
    reduced = pictures.reduced()
    apart = [(pictures[k : k + 1].astype(int) - reduced.files[k].pixels) for k in range(20)]
    assert 0 < max(np.abs(part).max() for part in apart) <= MOST
    assert reduced.findings is pictures.findings


def test_a_run_remembers_it_and_nothing_else_changes(user: User, photographs: Path, tmp_path: Path) -> None:
    data = ("--data", f"folder:{photographs}", *PLAIN, "--image-size", 8, "--weight-bits", 4, "--act-bits", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools, "IN_MEMORY", 0)
        for name, more in (("full", ()), ("reduced", ("--decode", "reduced", "--workers", 0))):
            succeeds(user.distill(tmp_path / name, *data, *more))
        succeeds(user.distill(tmp_path / "again", *data, "--decode", "reduced", "--workers", 2))
        refused = user.distill(tmp_path / "reduced", *data, "--resume")
    assert refused.code == 2 and "recipe.training.decode: reduced there, full now" in refused.stderr
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("full", "reduced", "again")]
    assert weights[0] != weights[1] == weights[2] and metrics(tmp_path / "reduced") == metrics(tmp_path / "again")
    said = [succeeds(faqd_train("eval", tmp_path / name)).stdout.splitlines()[0] for name in ("full", "reduced")]
    assert said[0] == said[1]


def test_it_is_refused_where_it_does_nothing(user: User, tmp_path: Path) -> None:
    outcome = user.distill(tmp_path / "run", "--decode", "reduced")
    assert outcome.code == 2 and "--decode reduced: the images stay in memory" in outcome.stderr
    assert not (tmp_path / "run" / "weights.safetensors").exists()


def test_members_of_a_tar_file_are_reduced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "IN_MEMORY", 0)
    write_tar(tmp_path / "a.tar", {f"{number}.jpg": encoded(64, 96, seed=number) for number in range(30)})
    options = DataOptions(f"shards:{tmp_path / 'a.tar'}", image_size=(8, 8), mean="none", std="none")
    pictures = load_dataset(options, with_labels=False).train.pixels
    assert isinstance(pictures, Pictures)
    one = pictures.reduced().files[3].pixels
    assert one is not None and 0 < np.abs(one.astype(int) - pictures[3:4][0]).max() <= MOST


def test_a_broken_jpeg_is_broken_at_any_size() -> None:
    content = encoded(480, 640)
    with pytest.raises(OSError, match="truncated"):
        read_picture(content[: len(content) // 2], preprocess_of(30).scaled_size)
