"""Sources of images: what is read, what is refused, and that splits depend on pixels alone."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import struct
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from faqd.errors import UserError
from faqd.train.data import cifar
from faqd.train.data.datasets import Dataset, load_dataset
from faqd.train.data.decode import read_picture
from faqd.train.data.listed_files import listed
from faqd.train.data.options import DataOptions
from faqd.train.data.split import Split, split_by_content

Pixels = NDArray[np.uint8]


def random_images(count: int, height: int = 8, width: int = 8, channels: int = 3, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), np.uint8)


def npz_options(path: Path) -> DataOptions:
    return DataOptions(f"npz:{path}", mean="none", std="none")


def save_npz(path: Path, **arrays: Any) -> DataOptions:
    np.savez(path, **arrays)
    return npz_options(path)


def save_folder(folder: Path, images: Pixels, name: str = "{}.png") -> DataOptions:
    for i, image in enumerate(images):
        path = folder / name.format(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return DataOptions(f"folder:{folder}", mean="none", std="none")


def pixels_of(dataset: Dataset) -> list[bytes]:
    return [split.images.tobytes() for split in (dataset.train, dataset.select, dataset.eval)]


def keys(split: Split) -> set[bytes]:
    return {image.tobytes() for image in split.images}


# --- splits ---


def test_splits_are_disjoint_complete_and_about_a_tenth(tmp_path: Path) -> None:
    images = random_images(4000)
    dataset = load_dataset(save_npz(tmp_path / "a.npz", images=images), with_labels=False)
    parts = [keys(split) for split in (dataset.train, dataset.select, dataset.eval)]
    assert set.union(*parts) == {image.tobytes() for image in images}
    assert sum(map(len, parts)) == 4000
    # Five standard deviations of a binomial share.
    assert abs(len(dataset.select) - 400) < 95 and abs(len(dataset.eval) - 400) < 95


def test_an_image_keeps_its_split_whatever_its_place_and_its_neighbours(tmp_path: Path) -> None:
    images = random_images(300)
    whole = load_dataset(save_npz(tmp_path / "a.npz", images=images), with_labels=False)
    some = load_dataset(save_npz(tmp_path / "b.npz", images=images[::-2]), with_labels=False)
    for few, all_ in ((some.train, whole.train), (some.select, whole.select), (some.eval, whole.eval)):
        assert keys(few) <= keys(all_)


@pytest.mark.parametrize("more", [{}, {"image_size": (6, 4)}, {"image_size": (4, 4), "channels": "bgr"}])
def test_folder_and_npz_of_the_same_images_are_the_same_data(more: dict[str, Any], tmp_path: Path) -> None:
    images = random_images(80)
    sources = save_npz(tmp_path / "a.npz", images=images), save_folder(tmp_path / "a", images[::-1], "deep/er/x{}.PNG")
    from_npz, from_folder = (load_dataset(replace(source, **more), with_labels=False) for source in sources)
    assert pixels_of(from_npz) == pixels_of(from_folder)


def test_permuted_labels_leave_everything_else_as_it_is(tmp_path: Path) -> None:
    images, labels = random_images(100), np.arange(100) % 7
    one = save_npz(tmp_path / "a.npz", images=images, labels=labels)
    other = save_npz(tmp_path / "b.npz", images=images, labels=labels[::-1])
    for with_labels in (False, True):
        first, second = (load_dataset(options, with_labels=with_labels) for options in (one, other))
        assert pixels_of(first) == pixels_of(second) == pixels_of(load_dataset(one, with_labels=False))

    for i, image in enumerate(images):
        save_folder(tmp_path / "right" / f"class{i % 3}", image[None], f"{i}.png")
        save_folder(tmp_path / "wrong" / f"class{i % 2}", image[None], f"{99 - i}.png")
    right, wrong = (
        DataOptions(f"folder:{tmp_path / name}", mean="none", std="none", labels=True) for name in ("right", "wrong")
    )
    blind = load_dataset(right, with_labels=False)
    assert blind.train.labels is blind.eval.labels is None and blind.classes is None
    assert pixels_of(blind) == pixels_of(load_dataset(wrong, with_labels=True))


def test_without_labels_unreadable_labels_do_no_harm(tmp_path: Path) -> None:
    options = save_npz(tmp_path / "a.npz", images=random_images(60), labels=np.array([{}] * 60, dtype=object))
    dataset = load_dataset(options, with_labels=False)
    assert dataset.train.labels is dataset.select.labels is dataset.eval.labels is None
    assert dataset.classes is None
    with pytest.raises(UserError, match="holds Python objects"):
        load_dataset(options, with_labels=True)


def test_equal_images_go_together() -> None:
    images = np.repeat(random_images(200), 3, axis=0)
    parts = [keys(split) for split in split_by_content(Split(images, None), 0.2, 0.2)]
    assert sum(map(len, parts)) == 200


def test_labels_stay_with_their_images() -> None:
    images = random_images(200)
    for split in split_by_content(Split(images, np.arange(200)), 0.3):
        assert split.labels is not None
        assert np.array_equal(split.images, images[split.labels])


def test_the_cut_is_where_the_published_hash_says() -> None:
    images = random_images(50)
    select, train = split_by_content(Split(images, np.arange(50)), 0.25)
    assert select.labels is not None and train.labels is not None
    head = [hashlib.sha256(image.tobytes()).digest()[0] for image in images]
    assert all(head[i] < 64 for i in select.labels) and all(head[i] >= 64 for i in train.labels)


def test_too_few_images() -> None:
    with pytest.raises(UserError, match="2 images, 2 of them different, are too few for 3 parts"):
        split_by_content(Split(random_images(2), None), 0.1, 0.1)


def test_limit_is_a_prefix_and_touches_train_only(tmp_path: Path) -> None:
    options = save_npz(tmp_path / "a.npz", images=random_images(100), labels=np.arange(100))
    whole, cut = (load_dataset(replace(options, limit=limit), with_labels=True) for limit in (None, 10))
    assert np.array_equal(cut.train.images, whole.train.images[:10])
    assert cut.train.labels is not None and whole.train.labels is not None
    assert np.array_equal(cut.train.labels, whole.train.labels[:10])
    assert len(cut.select) == len(whole.select) and len(cut.eval) == len(whole.eval)
    with pytest.raises(UserError, match="limit of training images 0"):
        load_dataset(replace(options, limit=0), with_labels=True)


# --- options ---


@pytest.mark.parametrize("source", ["imagenet", "folder", "folder:", "npz:", "digits:x", ""])
def test_unknown_sources(source: str) -> None:
    with pytest.raises(UserError, match=r"expected one of digits, cifar10, .*folder:PATH"):
        load_dataset(DataOptions(source), with_labels=False)


@pytest.mark.parametrize("given", [{}, {"mean": "none"}, {"std": (1.0, 1.0, 1.0)}])
def test_own_images_need_a_stated_normalisation(tmp_path: Path, given: dict[str, Any]) -> None:
    np.savez(tmp_path / "a.npz", images=random_images(60))
    save_folder(tmp_path / "a", random_images(3))
    for source in (f"npz:{tmp_path / 'a.npz'}", f"folder:{tmp_path / 'a'}"):
        with pytest.raises(UserError, match=r"needs --mean and --std.*0\.485,0\.456,0\.406"):
            load_dataset(DataOptions(source, **given), with_labels=False)


def test_a_mean_in_pixels_is_refused(tmp_path: Path) -> None:
    options = save_npz(tmp_path / "a.npz", images=random_images(60))
    with pytest.raises(UserError, match="divide --mean and --std by 255"):
        load_dataset(replace(options, mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4)), with_labels=False)


def test_options_reach_the_preprocessing_record(tmp_path: Path) -> None:
    options = replace(
        save_npz(tmp_path / "a.npz", images=random_images(60, 8, 12)),
        image_size=(16, 32),
        resize="letterbox",
        channels="bgr",
        mean=(0.1, 0.2, 0.3),
    )
    dataset = load_dataset(options, with_labels=False)
    record = dataset.preprocess
    assert (record.height, record.width, record.resize, record.channels) == (16, 32, "letterbox", "bgr")
    assert record.mean == (0.1, 0.2, 0.3) and record.std == (1.0, 1.0, 1.0)
    assert dataset.train.images.shape[1:] == (16, 32, 3)
    assert (dataset.train.images[:, :, 0] == 114).all()
    assert dataset.augmentation.pad == 1 and not dataset.augmentation.flip


# --- digits ---


def test_digits_are_fixed_and_normalised() -> None:
    dataset = load_dataset(DataOptions("digits"), with_labels=True)
    assert [len(split) for split in (dataset.train, dataset.select, dataset.eval)] == [1167, 130, 500]
    assert not keys(dataset.train) & keys(dataset.eval) and not keys(dataset.train) & keys(dataset.select)
    assert dataset.train.images.shape[1:] == (8, 8, 1)
    assert set(np.unique(dataset.train.images)) == {round(count * 255 / 16) for count in range(17)}
    normalised = dataset.preprocess.normalise(dataset.train.images)
    assert abs(normalised.mean()) < 1e-3 and abs(normalised.std() - 1) < 1e-3
    assert (dataset.augmentation.pad, dataset.augmentation.flip) == (1, False)
    # The split is a contract between runs: it may not move.
    assert hashlib.sha256(dataset.eval.images.tobytes()).hexdigest().startswith("8fd8a393fb6abc31")
    assert pixels_of(load_dataset(DataOptions("digits"), with_labels=False)) == pixels_of(dataset)
    assert load_dataset(DataOptions("digits"), with_labels=False).eval.labels is None


def test_digits_as_colour() -> None:
    dataset = load_dataset(DataOptions("digits", channels="rgb", image_size=(16, 16)), with_labels=False)
    assert dataset.train.images.shape[1:] == (16, 16, 3)
    assert dataset.preprocess.mean == (0.3051,) * 3 and dataset.augmentation.pad == 2


# --- npz ---


def test_npz_grey_stays_grey(tmp_path: Path) -> None:
    images = random_images(60, channels=1)
    dataset = load_dataset(save_npz(tmp_path / "a.npz", images=images), with_labels=False)
    assert dataset.preprocess.channels == "grey" and dataset.preprocess.mean == (0.0,)
    assert keys(dataset.train) < {image.tobytes() for image in images}


def test_npz_labels_and_classes(tmp_path: Path) -> None:
    images, labels = random_images(60), np.arange(60) % 3
    named = save_npz(tmp_path / "a.npz", images=images, labels=labels, classes=["ant", "bee", "cow"])
    assert load_dataset(named, with_labels=True).classes == ("ant", "bee", "cow")
    unnamed = save_npz(tmp_path / "b.npz", images=images, labels=labels.astype(np.uint8))
    assert load_dataset(unnamed, with_labels=True).classes == ("0", "1", "2")
    bare = load_dataset(save_npz(tmp_path / "c.npz", images=images), with_labels=True)
    assert bare.train.labels is None and bare.classes is None


IMAGES = random_images(60)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": IMAGES}, "no array named 'images'"),
        ({"images": IMAGES.astype(np.float32)}, "'images' is float32 of shape"),
        ({"images": IMAGES[0]}, r"shape \(8, 8, 3\); expected uint8 of shape"),
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, r"shape \(60, 3, 8, 8\); expected"),
        ({"images": IMAGES[:0]}, "N above 0"),
        ({"images": IMAGES, "labels": np.zeros(59, int)}, r"expected integers of shape \(60,\)"),
        ({"images": IMAGES, "labels": np.zeros(60)}, "'labels' is float64"),
        ({"images": IMAGES, "labels": np.full(60, -1)}, "'labels' go from -1"),
        ({"images": IMAGES, "labels": np.full(60, 2), "classes": ["a", "b"]}, "from 2 to 2; expected 0..1"),
        ({"images": IMAGES, "classes": [1, 2]}, "expected a list of strings"),
    ],
)
def test_npz_with_wrong_contents(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_dataset(save_npz(tmp_path / "a.npz", **arrays), with_labels=True)


def test_npz_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_dataset(npz_options(tmp_path / "absent.npz"), with_labels=False)
    whole = tmp_path / "whole.npz"
    np.savez(whole, images=IMAGES)
    data = whole.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    np.save(tmp_path / "array.npy", IMAGES)
    broken = {"half": data[: len(data) // 2], "empty": b"", "text": b"hello", "flipped": bytes(flipped)}
    for name, contents in broken.items():
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(UserError, match="not a readable npz file"):
            load_dataset(npz_options(tmp_path / name), with_labels=False)
    with pytest.raises(UserError, match="a single array"):
        load_dataset(npz_options(tmp_path / "array.npy"), with_labels=False)


def test_a_member_of_an_npz_that_is_no_array(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images", "hello")
    with pytest.raises(UserError, match="a member is no array"):
        load_dataset(npz_options(tmp_path / "a.npz"), with_labels=False)


def test_npz_never_runs_a_pickle(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    np.savez(tmp_path / "a.npz", images=np.array([Hostile(mark)], dtype=object))
    with pytest.raises(UserError, match="holds Python objects"):
        load_dataset(npz_options(tmp_path / "a.npz"), with_labels=False)
    assert not mark.exists()


# --- folders ---


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "jpg", "JPEG"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    image = np.full((4, 6, 3), (200, 100, 50), np.uint8)
    Image.fromarray(image).save(tmp_path / f"a.{suffix}")
    assert np.abs(read_picture(tmp_path / f"a.{suffix}").pixels.astype(int) - image).max() <= 3


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    ("orientation", "turns", "mirrored"), [(1, 0, False), (3, 2, False), (6, 3, False), (5, 3, True)]
)
def test_exif_orientation_is_undone(tmp_path: Path, suffix: str, orientation: int, turns: int, mirrored: bool) -> None:
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / f"a.{suffix}", exif=exif)
    # 5 is "transposed": turned like 6, then mirrored left to right.
    upright = np.rot90(stored, turns)
    upright = upright[:, ::-1] if mirrored else upright
    read = read_picture(tmp_path / f"a.{suffix}").pixels
    assert read.shape == upright.shape
    assert np.abs(read.astype(int) - upright).max() < 60


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path: Path) -> None:
    wide = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(wide).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode.startswith("I")
    assert np.array_equal(read_picture(tmp_path / "a.png").pixels, np.repeat((wide >> 8)[..., None], 3, 2))


def test_other_modes_become_rgb(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (8, 8), np.uint8)
    rgba = rng.integers(0, 256, (8, 8, 4), np.uint8)
    palette = Image.fromarray(grey % 4).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]], np.uint8)
    cases: list[tuple[Image.Image, dict[str, Any], Pixels]] = [
        (Image.fromarray(grey), {}, np.repeat(grey[..., None], 3, 2)),
        (Image.fromarray(grey > 99), {}, np.repeat((grey > 99)[..., None] * np.uint8(255), 3, 2)),
        (Image.fromarray(rgba), {}, rgba[..., :3]),
        (Image.fromarray(grey).convert("LA"), {}, np.repeat(grey[..., None], 3, 2)),
        (palette, {}, colours[grey % 4]),
        (palette, {"transparency": b"\x00\x80"}, colours[grey % 4]),
    ]
    for image, how, expected in cases:
        image.save(tmp_path / "a.png", **how)
        assert np.array_equal(read_picture(tmp_path / "a.png").pixels, expected), image.mode


def test_sizes_must_be_said_where_they_differ(tmp_path: Path) -> None:
    save_folder(tmp_path, random_images(40))
    options = save_folder(tmp_path, random_images(40, 9, 7, seed=1), "z{}.png")
    with pytest.raises(UserError, match=r"8x8 \(0.png\) and 9x7 \(z0.png\).*--image-size"):
        load_dataset(options, with_labels=False)
    dataset = load_dataset(replace(options, image_size=(8, 8)), with_labels=False)
    assert len(dataset.train) + len(dataset.select) + len(dataset.eval) == 80
    assert dataset.train.images.shape[1:] == (8, 8, 3)


def test_parts_of_a_data_set_are_no_classes(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            save_folder(tmp_path / part / label, random_images(60), f"{part}{label}{{}}.png")
    options = DataOptions(f"folder:{tmp_path}", mean="none", std="none", labels=True)
    with pytest.raises(UserError, match="these, train, val, are parts of a data set that have all classes each"):
        load_dataset(options, with_labels=True)
    inside = load_dataset(replace(options, source=f"folder:{tmp_path / 'train'}"), with_labels=True)
    assert inside.classes == ("cat", "dog")


def test_arrays_in_any_order_are_taken(tmp_path: Path) -> None:
    images = random_images(60)
    plain = load_dataset(save_npz(tmp_path / "a.npz", images=images), with_labels=False)
    fortran = load_dataset(save_npz(tmp_path / "b.npz", images=np.asfortranarray(images)), with_labels=False)
    assert pixels_of(plain) == pixels_of(fortran)


def test_one_percent_may_be_broken_and_no_more(tmp_path: Path) -> None:
    options = save_folder(tmp_path, random_images(198))
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "broken1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "broken2.jpg").write_bytes(b"")
    said: list[str] = []
    dataset = load_dataset(options, with_labels=False, say=said.append)
    assert dataset.skipped == ("broken1.png", "broken2.jpg")
    assert len(dataset.train) + len(dataset.select) + len(dataset.eval) == 198
    (text,) = said
    assert "1 of 200 images do not decode (broken1.png), 1 of 200 images are empty files (broken2.jpg); skipped" in text
    (tmp_path / "197.png").unlink()
    with pytest.raises(UserError, match=r"1 of 199 .*broken1.png.*1 of 199 .*broken2.jpg.*more than 1 %"):
        load_dataset(options, with_labels=False)


def test_nothing_that_decodes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="1 of 1 images do not decode"):
        load_dataset(DataOptions(f"folder:{tmp_path}", mean="none", std="none"), with_labels=False)


def test_what_is_no_image_of_ours_is_left_alone(tmp_path: Path) -> None:
    options = save_folder(tmp_path, random_images(40))
    for name in ("notes.txt", "._0.png", ".thumbnails/0.png", "clip.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    assert load_dataset(options, with_labels=False).skipped == ()


def test_folders_are_found_behind_links_and_none_twice(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    for name in ("a.png", "deep/b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / "elsewhere" / name)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "again").symlink_to(tmp_path / "images")
    plain = listed(tmp_path / "elsewhere").names()
    assert listed(tmp_path / "images").names() == [f"a/{name}" for name in plain]


def test_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image in it"):
        load_dataset(DataOptions(f"folder:{tmp_path}", mean="none", std="none"), with_labels=False)
    with pytest.raises(UserError, match="no such folder"):
        load_dataset(DataOptions(f"folder:{tmp_path / 'x'}", mean="none", std="none"), with_labels=False)


def test_subfolders_are_classes_only_when_asked(tmp_path: Path) -> None:
    images = random_images(99)
    for i, image in enumerate(images):
        save_folder(tmp_path / f"{'cab'[i % 3]}" / "deep", image[None], f"{i}.png")
    (tmp_path / "a" / "broken.png").write_bytes(b"")
    options = DataOptions(f"folder:{tmp_path}", mean="none", std="none")
    assert load_dataset(options, with_labels=True).train.labels is None
    dataset = load_dataset(replace(options, labels=True), with_labels=True)
    assert dataset.classes == ("a", "b", "c")
    code_of = {image.tobytes(): "abc".index("cab"[i % 3]) for i, image in enumerate(images)}
    for split in (dataset.train, dataset.select, dataset.eval):
        assert split.labels is not None
        assert split.labels.tolist() == [code_of[image.tobytes()] for image in split.images]
    save_folder(tmp_path, random_images(1), "stray.png")
    with pytest.raises(UserError, match="images lie in the folder itself"):
        load_dataset(replace(options, labels=True), with_labels=True)


# --- Tiny ImageNet ---


def tiny_imagenet(root: Path) -> tuple[Pixels, list[int]]:
    folder = root / "tiny-imagenet-200"
    wnids = ["n03", "n01", "n02"]
    for number, wnid in enumerate(wnids):
        save_folder(folder / "train" / wnid / "images", random_images(40, 64, 64, seed=number), wnid + "_{}.png")
    val = random_images(10, 64, 64, seed=9)
    save_folder(folder / "val" / "images", val, "val_{}.png")
    order = [7, 3, 0, 9, 1, 2, 4, 5, 6, 8]
    rows = [f"val_{i}.png\t{wnids[i % 3]}\t0\t0\t63\t63\n" for i in order]
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    return val[order], [sorted(wnids).index(wnids[i % 3]) for i in order]


def test_tiny_imagenet(tmp_path: Path) -> None:
    val, codes = tiny_imagenet(tmp_path)
    for root in (tmp_path, tmp_path / "tiny-imagenet-200"):
        dataset = load_dataset(DataOptions("tiny-imagenet", root=root), with_labels=True)
        assert np.array_equal(dataset.eval.images, val)
        assert dataset.eval.labels is not None and dataset.eval.labels.tolist() == codes
        assert dataset.classes == ("n01", "n02", "n03") and len(dataset.train) + len(dataset.select) == 120
        assert (dataset.augmentation.pad, dataset.augmentation.flip) == (8, True)
    blind = load_dataset(DataOptions("tiny-imagenet", root=tmp_path), with_labels=False)
    assert pixels_of(blind) == pixels_of(dataset) and blind.eval.labels is None


def test_a_broken_file_of_tiny_imagenet_shifts_no_label(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path)
    (tmp_path / "tiny-imagenet-200" / "train" / "n01" / "images" / "n01_0.png").write_bytes(b"")
    dataset = load_dataset(DataOptions("tiny-imagenet", root=tmp_path), with_labels=True)
    assert dataset.skipped == ("train/n01/images/n01_0.png",)
    # The seeds of tiny_imagenet, in the order of the sorted classes n01, n02, n03.
    seeds = enumerate((1, 2, 0))
    code_of = {image.tobytes(): code for code, seed in seeds for image in random_images(40, 64, 64, seed=seed)}
    for split in (dataset.train, dataset.select):
        assert split.labels is not None
        assert split.labels.tolist() == [code_of[image.tobytes()] for image in split.images]


def test_tiny_imagenet_that_is_incomplete(tmp_path: Path) -> None:
    options = DataOptions("tiny-imagenet", root=tmp_path)
    with pytest.raises(UserError, match=r"looked for val/val_annotations.txt in .*--data-root"):
        load_dataset(options, with_labels=False)
    tiny_imagenet(tmp_path)
    (tmp_path / "tiny-imagenet-200" / "val" / "images" / "val_3.png").unlink()
    with pytest.raises(UserError, match=r"1 files of .*missing \(val/images/val_3.png\)"):
        load_dataset(options, with_labels=False)
    (tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt").write_text("val_0.png\tn99\n")
    with pytest.raises(UserError, match="not the published list"):
        load_dataset(options, with_labels=False)


# --- CIFAR ---


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def text(value: str) -> bytes:
    return b"U" + bytes([len(value)]) + value.encode()


def batch_bytes(images: Pixels, labels: list[int], key: str = "labels", dtype: str = "u1") -> bytes:
    """The stream that Python 2 wrote for a published batch: a dictionary of labels and a numpy array."""
    rows = images.transpose(0, 3, 1, 2).tobytes()
    shape = b"M" + struct.pack("<H", len(images)) + b"M\x00\x0c\x86"
    return b"".join(
        [
            b"\x80\x02}(" + text(key) + b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e",
            text("data") + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text("b") + b"\x87R",
            b"(K\x01" + shape + b"cnumpy\ndtype\n" + text(dtype) + b"K\x00K\x01\x87R",
            b"(K\x03" + text("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
            b"\x89T" + struct.pack("<i", len(rows)) + rows + b"tbu.",
        ]
    )


def small_cifar10(folder: Path, monkeypatch: pytest.MonkeyPatch, each: int = 20) -> tuple[Pixels, NDArray[np.int64]]:
    """Six small files in the published form, which stand for the published ones; all images and labels."""
    images, labels = random_images(6 * each, 32, 32), np.arange(6 * each) % 10
    folder.mkdir(parents=True)
    md5 = {}
    for i, name in enumerate(cifar.PUBLISHED["cifar10"].md5):
        part = slice(each * i, each * (i + 1))
        data = batch_bytes(images[part], labels[part].tolist())
        (folder / name).write_bytes(data)
        md5[name] = hashlib.md5(data).hexdigest()
    monkeypatch.setitem(cifar.PUBLISHED, "cifar10", replace(cifar.PUBLISHED["cifar10"], md5=md5))
    return images, labels.astype(np.int64)


def test_cifar_pixels_labels_and_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = small_cifar10(tmp_path / "cifar-10-batches-py", monkeypatch)
    label_of = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    for root in (tmp_path, tmp_path / "cifar-10-batches-py"):
        dataset = load_dataset(DataOptions("cifar10", root=root), with_labels=True)
        assert keys(dataset.train) | keys(dataset.select) == {image.tobytes() for image in images[:100]}
        assert len(dataset.train) + len(dataset.select) == 100
        assert np.array_equal(dataset.eval.images, images[100:])
        for split in (dataset.train, dataset.select, dataset.eval):
            assert split.labels is not None
            assert split.labels.tolist() == [label_of[image.tobytes()] for image in split.images]
        assert dataset.classes is not None and dataset.classes[3] == "cat"
        assert (dataset.augmentation.pad, dataset.augmentation.flip) == (4, True)
    blind = load_dataset(DataOptions("cifar10", root=tmp_path), with_labels=False)
    assert pixels_of(blind) == pixels_of(dataset)
    assert blind.train.labels is blind.select.labels is blind.eval.labels is None


def test_cifar100_names_come_from_its_meta_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = random_images(80, 32, 32)
    files = {
        "train": batch_bytes(images[:60], [7] * 60, "fine_labels"),
        "test": batch_bytes(images[60:], [1] * 20, "fine_labels"),
        "meta": b"\x80\x02}" + text("fine_label_names") + b"](" + text("apple") + text("bed") + b"es.",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    md5 = {name: hashlib.md5(data).hexdigest() for name, data in files.items()}
    monkeypatch.setitem(cifar.PUBLISHED, "cifar100", replace(cifar.PUBLISHED["cifar100"], md5=md5))
    dataset = load_dataset(DataOptions("cifar100", root=tmp_path, channels="bgr"), with_labels=True)
    assert dataset.classes == ("apple", "bed")
    assert dataset.eval.labels is not None and set(dataset.eval.labels) == {1}
    assert np.array_equal(dataset.eval.images, images[60:, :, :, ::-1])
    assert dataset.preprocess.mean == (0.4409, 0.4865, 0.5071)


def test_one_flipped_bit_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_cifar10(tmp_path / "files", monkeypatch)
    path = tmp_path / "files" / "data_batch_4"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    expected = cifar.PUBLISHED["cifar10"].md5["data_batch_4"]
    found = hashlib.md5(data).hexdigest()
    with pytest.raises(UserError, match=rf"data_batch_4: md5 {found}, expected {expected}.*--download"):
        load_dataset(DataOptions("cifar10", root=tmp_path / "files"), with_labels=False)


def test_missing_cifar_says_where_and_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path}/cifar-100-python and {tmp_path}\. .*--data-root.*--download"):
        load_dataset(DataOptions("cifar100", root=tmp_path), with_labels=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="in data/cifar-10-batches-py and data"):
        load_dataset(DataOptions("cifar10"), with_labels=False)


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "executed"
    small_cifar10(tmp_path / "files", monkeypatch)
    data = pickle.dumps({"data": Hostile(mark)}, 2)
    (tmp_path / "files" / "test_batch").write_bytes(data)
    published = cifar.PUBLISHED["cifar10"]
    md5 = {**published.md5, "test_batch": hashlib.md5(data).hexdigest()}
    monkeypatch.setitem(cifar.PUBLISHED, "cifar10", replace(published, md5=md5))
    with pytest.raises(UserError, match=r"test_batch: asks to run (posix|os)\.system"):
        load_dataset(DataOptions("cifar10", root=tmp_path / "files"), with_labels=False)
    assert not mark.exists()
    # The same file does what it says where nothing holds it back: the test above can fail.
    pickle.loads(data)
    assert mark.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        b"\x80\x02].",
        batch_bytes(random_images(2, 32, 32), [0, 1])[:-100],
        batch_bytes(random_images(2, 32, 32), [0, 1], dtype="f4"),
        b"\x80\x02cnumpy\ndtype\n}b.",
        b"\x80\x02cbuiltins\neval\n.",
        b"\x80\x02cnumpy\nload\n.",
    ],
)
def test_pickles_that_are_no_batch(data: bytes) -> None:
    with pytest.raises(UserError, match=r"^data_batch_1: "):
        cifar.unpickled(Path("data_batch_1"), data)


def archive_of(folder: Path, target: Path) -> str:
    with tarfile.open(target, "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-py")
        escape = tarfile.TarInfo("../escaped")
        escape.size = 1
        tar.addfile(escape, io.BytesIO(b"x"))
    return hashlib.md5(target.read_bytes()).hexdigest()


def test_download_fetches_checks_and_unpacks_only_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, _ = small_cifar10(tmp_path / "made", monkeypatch)
    (tmp_path / "made" / "readme.html").write_text("not read")
    archive = tmp_path / "server" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    good = replace(cifar.PUBLISHED["cifar10"], url=archive.as_uri(), archive_md5=archive_of(tmp_path / "made", archive))
    monkeypatch.setitem(cifar.PUBLISHED, "cifar10", replace(good, archive_md5="0" * 32))
    root = tmp_path / "inner" / "data"
    options = DataOptions("cifar10", root=root, download=True)
    with pytest.raises(UserError, match=f"md5 {good.archive_md5}, expected 0000"):
        load_dataset(options, with_labels=False)
    assert list(root.iterdir()) == []

    monkeypatch.setitem(cifar.PUBLISHED, "cifar10", good)
    said: list[str] = []
    dataset = load_dataset(options, with_labels=False, say=said.append)
    assert np.array_equal(dataset.eval.images, images[100:])
    assert [line.split()[0] for line in said] == ["Fetching", "Unpacked"]
    assert {path.name for path in (root / "cifar-10-batches-py").iterdir()} == set(good.md5)
    assert {path.name for path in root.iterdir()} == {"cifar-10-batches-py", archive.name}
    assert not list(tmp_path.rglob("escaped"))
    archive.unlink()
    load_dataset(options, with_labels=False)


def test_no_network_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable = replace(cifar.PUBLISHED["cifar10"], url="http://127.0.0.1:9/cifar-10-python.tar.gz")
    monkeypatch.setitem(cifar.PUBLISHED, "cifar10", unreachable)
    with pytest.raises(UserError, match=r"could not be fetched .*network.*--data-root"):
        load_dataset(DataOptions("cifar10", root=tmp_path, download=True), with_labels=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif("FAQD_CIFAR10" not in os.environ, reason="FAQD_CIFAR10 names no folder with the published files")
def test_the_published_cifar10_reads_as_published() -> None:
    dataset = load_dataset(DataOptions("cifar10", root=Path(os.environ["FAQD_CIFAR10"])), with_labels=True)
    assert len(dataset.train) + len(dataset.select) == 50000 and len(dataset.eval) == 10000
    assert dataset.eval.labels is not None and np.bincount(dataset.eval.labels).tolist() == [1000] * 10
    # The first test image is a cat.
    assert dataset.classes is not None and dataset.classes[dataset.eval.labels[0]] == "cat"
    normalised = dataset.preprocess.normalise(dataset.train.images)
    assert np.abs(normalised.mean((0, 2, 3))).max() < 0.01 and np.abs(normalised.std((0, 2, 3)) - 1).max() < 0.01
