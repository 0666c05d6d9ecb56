"""Folders of any size: what is listed, how it is split, and that pictures decoded on demand are those in memory."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from faqd.errors import UserError
from faqd.train.data import pool as pools
from faqd.train.data.datasets import Dataset, load_dataset
from faqd.train.data.decode import Picture
from faqd.train.data.image_files import read_images
from faqd.train.data.listed_files import listed
from faqd.train.data.options import DataOptions
from faqd.train.data.pictures import Pictures
from faqd.train.data.split import split_by_files
from tests.train.test_data import pixels_of, random_images, save_folder


def sized(options: DataOptions) -> DataOptions:
    return replace(options, image_size=(6, 4), resize="letterbox", channels="bgr")


def test_names_states_and_words_of_a_list(tmp_path: Path) -> None:
    save_folder(tmp_path, random_images(3), "a{}/x.png")
    (tmp_path / "a1.png").write_bytes(b"12345")
    files = listed(tmp_path)
    assert files.names() == ["a0/x.png", "a1.png", "a1/x.png", "a2/x.png"] == sorted(files.names())
    assert files.states[1].tolist() == [5, (tmp_path / "a1.png").stat().st_mtime_ns]
    assert files.in_words().startswith("4 files, the newest of 20") and listed(tmp_path).in_words() == files.in_words()
    os.utime(tmp_path / "a1.png", ns=(0, 1))
    assert not files.is_as_listed(1) and files.is_as_listed(2)
    assert listed(tmp_path).in_words() != files.in_words()


def test_links_that_lead_to_themselves_or_nowhere_are_no_trap(tmp_path: Path) -> None:
    save_folder(tmp_path / "images", random_images(2))
    (tmp_path / "images" / "round").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "itself.png").symlink_to(tmp_path / "images" / "itself.png")
    (tmp_path / "images" / "nowhere.png").symlink_to(tmp_path / "absent.png")
    files = listed(tmp_path / "images")
    assert files.names() == ["0.png", "1.png", "itself.png", "nowhere.png"]
    assert files.states[2:, 0].tolist() == [-1, -1] and files.is_as_listed(2)


def test_copies_go_together_whatever_they_are_called(tmp_path: Path) -> None:
    save_folder(tmp_path, np.random.default_rng(0).integers(0, 256, (300, 9, 9, 3), np.uint8), "{}.png")
    for path in sorted(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes() + b"\0" * int(path.stem))  # another size each
        shutil.copy(path, tmp_path / f"copy-of-{999 - int(path.stem)}.png")
    files = listed(tmp_path)
    parts = split_by_files(files, 0.3, 0.3)
    sizes = [set(files.states[part, 0].tolist()) for part in parts]
    assert sum(map(len, sizes)) == len(set.union(*sizes)) and sum(map(len, parts)) == 600
    assert all(abs(len(part) - share) < 90 for part, share in zip(parts, (180, 180, 240), strict=True))


def test_files_of_one_size_are_split_by_name_and_stay_where_they_are(tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / f"{number}.bmp").write_bytes(b"BM")
    before = [{listed(tmp_path).name(i) for i in part} for part in split_by_files(listed(tmp_path), 0.1, 0.1)]
    for number in range(200, 260):
        (tmp_path / f"{number}.bmp").write_bytes(b"BM")
    after = [{listed(tmp_path).name(i) for i in part} for part in split_by_files(listed(tmp_path), 0.1, 0.1)]
    assert all(few < more for few, more in zip(before, after, strict=True))


def test_the_first_of_a_split_are_like_the_rest(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"bitmap{number}.bmp").write_bytes(b"BM")
        (tmp_path / f"photo{number}.jpg").write_bytes(b"?" * (10 + number))
    files = listed(tmp_path)
    for part in split_by_files(files, 0.2, 0.2):
        first = [files.name(index).startswith("photo") for index in part[:200]]
        # Four standard deviations of a fair coin.
        assert abs(sum(first) - 100) < 29


def both_ways(options: DataOptions, monkeypatch: pytest.MonkeyPatch) -> tuple[Dataset, Dataset]:
    """In memory, and decoded on demand."""
    whole = load_dataset(options, with_labels=True)
    monkeypatch.setattr(pools, "IN_MEMORY", 0)
    pictures = load_dataset(options, with_labels=True)
    assert isinstance(pictures.train.pixels, Pictures) and not isinstance(whole.train.pixels, Pictures)
    return whole, pictures


@pytest.mark.parametrize("looked_at", [10_000, 10])
def test_pictures_are_the_images_in_memory(looked_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(tmp_path, random_images(150), "class1/{}.png")
    save_folder(tmp_path, random_images(150, 12, 9, seed=1), "class2/{}.png")
    (tmp_path / "class1" / "torn.png").write_bytes(b"")
    monkeypatch.setattr(pools, "LOOKED_AT", looked_at)
    options = sized(DataOptions(f"folder:{tmp_path}", mean="none", std="none", labels=True))
    whole, pictures = both_ways(options, monkeypatch)
    assert pixels_of(whole) == pixels_of(pictures)
    for ours, theirs in ((whole.train, pictures.train), (whole.select, pictures.select), (whole.eval, pictures.eval)):
        assert np.array_equal(ours.labels, theirs.labels)  # type: ignore[arg-type]
        some = np.array([3, 1, 7, 3])
        assert np.array_equal(ours.pixels[some], theirs.pixels[some])
        assert np.array_equal(ours.at(slice(2, 9)).images, theirs.at(slice(2, 9)).images)
    assert (whole.skipped, whole.files, whole.preprocess) == (pictures.skipped, pictures.files, pictures.preprocess)
    assert (looked_at > 300) == (whole.skipped == ("class1/torn.png",))


def test_a_broken_file_is_replaced_by_the_next_of_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = sized(save_folder(tmp_path, random_images(200)))
    monkeypatch.setattr(pools, "LOOKED_AT", 10)
    _, plain = both_ways(options, monkeypatch)
    assert isinstance(plain.train.pixels, Pictures)
    files = plain.train.pixels.files
    broken = [files.files.name(int(files.index[place])) for place in (4, 5, len(files) - 1)]
    for name in broken:
        size = (tmp_path / name).stat().st_size
        (tmp_path / name).write_bytes(b"?" * size)  # goes into the same split
    found = load_dataset(options, with_labels=False).train.pixels
    assert isinstance(found, Pictures)
    expected = plain.train.images.copy()
    expected[[4, 5, -1]] = expected[[6, 6, 0]]
    assert np.array_equal(found[:], expected)
    assert found.findings.broken == dict.fromkeys(broken, "do not decode")
    said = str(found.in_words())
    assert "3 of 200 images do not decode" in said and broken[1] in said and "replaced by the next that does" in said


def test_many_broken_ones_among_the_first_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = sized(save_folder(tmp_path, random_images(100)))
    for number in range(9):
        (tmp_path / f"torn{number}.png").write_bytes(b"?" * number)
    monkeypatch.setattr(pools, "LOOKED_AT", 10)
    monkeypatch.setattr(pools, "IN_MEMORY", 0)
    with pytest.raises(UserError, match=r"images do not decode .*more than 5 % are too many"):
        load_dataset(options, with_labels=False)


def test_nothing_but_broken_files_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(60):
        (tmp_path / f"torn{number}.png").write_bytes(b"?" * number)
    monkeypatch.setattr(pools, "LOOKED_AT", 10)
    with pytest.raises(UserError, match=r"the last of \d+ image files in a row that (do not decode|are empty)"):
        load_dataset(sized(DataOptions(f"folder:{tmp_path}", mean="none", std="none")), with_labels=False)


@pytest.mark.parametrize("gone", [False, True])
def test_a_file_that_changes_is_noticed(gone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = sized(save_folder(tmp_path, random_images(60)))
    _, dataset = both_ways(options, monkeypatch)
    assert isinstance(dataset.eval.pixels, Pictures)
    name = dataset.eval.pixels.files.files.name(int(dataset.eval.pixels.files.index[0]))
    if gone:
        (tmp_path / name).unlink()
    else:
        os.utime(tmp_path / name, ns=(0, 12345))
    with pytest.raises(UserError, match=f"{name}: changed, or gone, since the images were listed.*--resume"):
        dataset.eval.pixels[:2]


def test_a_system_that_fails_to_read_is_no_broken_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, dataset = both_ways(sized(save_folder(tmp_path, random_images(60))), monkeypatch)

    def fails(path: Path, scaled: object) -> Picture:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("faqd.train.data.decode.read_picture", fails)
    with pytest.raises(UserError, match=r"\d+\.png: cannot be read \(Input/output error\)"):
        dataset.eval.pixels[:1]
    with pytest.raises(UserError, match=r"\d+\.png: cannot be read \(Input/output error\)"):
        read_images(listed(tmp_path), None, print)


def test_the_first_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, dataset = both_ways(sized(save_folder(tmp_path, random_images(60))), monkeypatch)
    first = dataset.train.pixels[:5]
    for path in tmp_path.iterdir():
        path.unlink()
    assert np.array_equal(dataset.train.pixels[1:4], first[1:4])


def test_many_images_need_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = save_folder(tmp_path, random_images(60))
    for limit in ("LOOKED_AT", "IN_MEMORY"):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=r"60 images are too many .*--image-size"):
            patch.setattr(pools, limit, 50)
            load_dataset(options, with_labels=False)


def test_it_is_told_that_images_are_decoded_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = sized(save_folder(tmp_path, random_images(60)))
    monkeypatch.setattr(pools, "IN_MEMORY", 0)
    said: list[str] = []
    load_dataset(options, with_labels=False, say=said.append)
    (told,) = said
    assert "60 images are more than stay in memory" in told


def test_the_eval_split_of_a_large_folder_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = sized(save_folder(tmp_path, random_images(200)))
    monkeypatch.setattr(pools, "REPORTED", 6 * 4 * 3 * 5)
    monkeypatch.setattr(pools, "FEWEST_REPORTED", 3)
    whole, pictures = both_ways(options, monkeypatch)
    assert np.array_equal(pictures.eval.images, whole.eval.images[:5]) and len(whole.eval) > 5
    assert len(pictures.train) == len(whole.train)
