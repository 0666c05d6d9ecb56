"""Images from tar files, tables, arrays and URLs: those of a folder, to the last bit, and streamed as these are."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from faqd.errors import UserError
from faqd.train.data import pool as pools
from faqd.train.data.datasets import Dataset, load_dataset
from faqd.train.data.listing import Listing
from faqd.train.data.options import DataOptions
from faqd.train.data.pictures import Pictures
from faqd.train.data.sources import npy, urls
from faqd.train.data.sources.index import index_name
from faqd.train.data.sources.open import open_source
from faqd.train.loop.feed import Feed
from tests.fixtures.image_sources import (
    SOURCES,
    as_folder,
    as_npy,
    as_parquet,
    as_shards,
    behind_a_url,
    name_of,
    png,
    table_of,
    write_tar,
)
from tests.train.test_data import pixels_of, random_images

pytest.importorskip("pyarrow")
IMAGES = random_images(60)
TABLES = ("parquet", "arrow")
ENCODED = ("shards", *TABLES)
PLACES = [(kind, url) for kind in ("folder", "shards", "parquet", "npy") for url in (False, True)] + [("arrow", False)]
"""Of files: their kind, and whether behind a URL."""
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _asks_about_urls_each_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(urls, "ASKED_EVERY_S", 1e-9)
    yield
    fsspec.filesystem("memory").store.clear()


def options_of(source: str, **more: Any) -> DataOptions:
    return DataOptions(source, image_size=(8, 8), mean="none", std="none", **more)


def listing_of(source: str) -> Listing:
    kind, _, where = source.partition(":")
    return open_source(kind, where, with_labels=False, by_folders=False, refuses_labels=False, say=print).files


def streamed(options: DataOptions, monkeypatch: pytest.MonkeyPatch, *, with_labels: bool = False) -> Dataset:
    with monkeypatch.context() as patch:
        patch.setattr(pools, "IN_MEMORY", 0)
        dataset = load_dataset(options, with_labels=with_labels)
    assert isinstance(dataset.train.pixels, Pictures)
    return dataset


# --- the same images ---


@pytest.mark.parametrize("url", [False, True], ids=["path", "URL"])
@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_images_of_a_folder(
    kind: str, url: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = pixels_of(load_dataset(options_of(as_folder(tmp_path / "wanted", IMAGES)), with_labels=False))
    source = SOURCES[kind](tmp_path / "source", IMAGES)
    if url and kind == "arrow":
        with pytest.raises(UserError, match="read in parts on this machine alone; fetch it, or give parquet"):
            load_dataset(options_of(behind_a_url(source)), with_labels=False)
        return
    options = options_of(behind_a_url(source) if url else source)
    assert pixels_of(load_dataset(options, with_labels=False)) == wanted
    assert pixels_of(streamed(options, monkeypatch)) == wanted


@pytest.mark.parametrize("kind", ENCODED)
def test_too_many_to_be_looked_at_are_split_as_those_of_a_folder(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "LOOKED_AT", 10)
    wanted = load_dataset(options_of(as_folder(tmp_path / "wanted", IMAGES)), with_labels=False)
    options = options_of(SOURCES[kind](tmp_path / "source", IMAGES))
    for dataset in (load_dataset(options, with_labels=False), streamed(options, monkeypatch)):
        assert pixels_of(dataset) == pixels_of(wanted)
        assert dataset.eval.names is not None and dataset.eval.names.tolist() == wanted.eval.names.tolist()  # type: ignore[union-attr]


def test_a_large_array_is_split_by_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "LOOKED_AT", 10)
    options = options_of(as_npy(tmp_path / "source", IMAGES))
    quick = pixels_of(load_dataset(options, with_labels=False))
    monkeypatch.setattr(npy, "QUICK", 10)
    whole, pictures = load_dataset(options, with_labels=False), streamed(options, monkeypatch)
    assert pixels_of(whole) == pixels_of(pictures) != quick
    assert sum(map(len, (whole.train, whole.select, whole.eval))) == len(IMAGES) and whole.eval.names is None


@pytest.mark.parametrize("channels", [1, 3])
def test_an_array_is_what_the_same_npz_is(channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --image-size too: all its images have one."""
    images = random_images(60, 6, 10, channels)
    np.savez(tmp_path / "images.npz", images=images)
    wanted = load_dataset(DataOptions(f"npz:{tmp_path / 'images.npz'}", mean="none", std="none"), with_labels=False)
    options = DataOptions(as_npy(tmp_path / "npy", images), mean="none", std="none")
    for dataset in (load_dataset(options, with_labels=False), streamed(options, monkeypatch)):
        assert dataset.preprocess == wanted.preprocess and pixels_of(dataset) == pixels_of(wanted)


@pytest.mark.parametrize("kind", ENCODED)
def test_labels_come_with_the_images_and_are_read_where_they_are_wanted(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = [int(image.sum()) % 2 for image in IMAGES]
    options = options_of(SOURCES[kind](tmp_path / "source", IMAGES, labels))
    assert load_dataset(options, with_labels=False).train.labels is None
    for dataset in (load_dataset(options, with_labels=True), streamed(options, monkeypatch, with_labels=True)):
        assert dataset.classes == (("0", "1") if kind == "shards" else ("ant", "bee"))
        for split in (dataset.train, dataset.select, dataset.eval):
            assert split.labels is not None
            assert [int(image.sum()) % 2 for image in split.images] == split.labels.tolist()
    without = options_of(SOURCES[kind](tmp_path / "without", IMAGES))
    assert load_dataset(without, with_labels=True).train.labels is None


@pytest.mark.parametrize("kind", ENCODED)
def test_names_lead_to_sizes(kind: str, tmp_path: Path) -> None:
    files = listing_of(SOURCES[kind](tmp_path / "source", random_images(30, 8, 12)))
    assert [files.name(index) for index in (0, 29)] == [name_of(0), name_of(29)]
    assert files.picture_size(28) == (8, 12) and len(files) == 30


def test_names_that_two_images_have_are_told_apart_by_their_file(tmp_path: Path) -> None:
    for number in (0, 1):
        write_tar(tmp_path / f"{number}.tar", {"a.png": png(IMAGES[number]), "b.png": png(IMAGES[number + 2])})
    files = listing_of(f"shards:{tmp_path}/*.tar")
    assert [files.name(index) for index in range(4)] == ["0.tar/a.png", "0.tar/b.png", "1.tar/a.png", "1.tar/b.png"]
    assert files.where(2) == f"{tmp_path / '1.tar'}: 1.tar/a.png"
    (tmp_path / "more").mkdir()
    write_tar(tmp_path / "more" / "1.tar", {"a.png": png(IMAGES[7])})
    files = listing_of(f"shards:{tmp_path}/{{1,more/1}}.tar")
    assert [files.name(index) for index in (0, 2)] == ["1.tar/a.png", "more/1.tar/a.png"]
    assert files.where(2) == f"{tmp_path / 'more' / '1.tar'}: more/1.tar/a.png"


def test_a_file_is_taken_by_its_name_whatever_is_in_it(tmp_path: Path) -> None:
    for name in ("a{0,1}.tar", "a[0].tar"):
        write_tar(tmp_path / name, {"a.png": png(IMAGES[0])})
        assert len(listing_of(f"shards:{tmp_path / name}")) == 1
    for number in range(3):
        write_tar(tmp_path / f"{number:02}b.tar", {f"{number}.png": png(IMAGES[0])})
    assert len(listing_of(f"shards:{tmp_path}/{{00..02}}{{b,b}}.tar")) == 3


def test_which_members_of_a_tar_file_are_images(tmp_path: Path) -> None:
    image = png(IMAGES[0])
    names = [
        "./a.jpg",  # by their extension, whatever is in them
        "a.seg.png",  # beside a plain one, something else of the sample
        "b.left.png",
        "b.right.png",
        "c.d/e.PNG",
        ".hidden.png",
        "._f.png",
        "f.txt",
    ]
    write_tar(tmp_path / "a.tar", dict.fromkeys(names, image))
    files = listing_of(f"shards:{tmp_path / 'a.tar'}")
    found = [files.name(index) for index in range(len(files))]
    assert found == ["a.jpg", "b.left.png", "b.right.png", "c.d/e.PNG"]


def test_tables_without_names_are_known_by_their_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, names in (("a", lambda index: None), ("b", lambda index: "the same")):
        pq.write_table(table_of(IMAGES, None, names=names), tmp_path / f"{name}.parquet")
    pq.write_table(pa.table({"picture": [png(image) for image in IMAGES]}), tmp_path / "c.parquet")
    for name in "abc":
        files = listing_of(f"parquet:{tmp_path / name}.parquet")
        assert not files.is_named and files.name(7) == "row 7" and len(files) == 60
    (tmp_path / "torn.parquet").write_bytes(b"")


def test_a_column_is_named_behind_the_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = table_of(IMAGES, None)
    table = table.append_column("mask", table["image"]).append_column("fine", pa.array([0, 1] * 30, pa.uint8()))
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"2 columns may hold images \(image, mask\); say which, as parquet:.*#image"):
        load_dataset(options_of(f"parquet:{tmp_path / 'a.parquet'}"), with_labels=False)
    dataset = load_dataset(options_of(f"parquet:{tmp_path / 'a.parquet'}#mask,fine"), with_labels=True)
    assert dataset.train.labels is not None and set(dataset.train.labels.tolist()) == {0, 1}


# --- what is read, and how often ---


def test_no_array_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = random_images(40)
    np.save(tmp_path / "a.npy", images)
    with (tmp_path / "a.npy").open("r+b") as stream:  # says that it has so many, and takes no room
        stream.seek(0)
        np.lib.format.write_array_header_1_0(
            stream, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 8, 8, 3)}
        )
        stream.truncate(stream.tell() + 10**9 * 8 * 8 * 3)
    monkeypatch.setattr(pools, "LOOKED_AT", 0)
    files = listing_of(f"npy:{tmp_path / 'a.npy'}")
    assert len(files) == 10**9 and not files.is_quick
    picture = files.picture(39)
    assert not isinstance(picture, str) and np.array_equal(picture.pixels, images[39])


def test_an_index_is_kept_and_made_anew_where_the_file_changed(tmp_path: Path) -> None:
    source = as_shards(tmp_path / "source", IMAGES)
    path = tmp_path / "source" / "001.tar"
    beside = path.with_name(index_name(path.name))
    before = listing_of(source)
    assert beside.is_file()
    content = beside.read_bytes()
    os.utime(beside, ns=(0, 1))
    assert listing_of(source).in_words() == before.in_words() and beside.stat().st_mtime_ns == 1
    for damaged in (b"", b"no index", content[:-50], content[: len(content) // 2]):
        beside.write_bytes(damaged)
        assert listing_of(source).in_words() == before.in_words() and beside.read_bytes() == content
    write_tar(path, {"new.png": png(IMAGES[0])})
    files = listing_of(source)
    assert len(files) == 36 and files.in_words() != before.in_words()
    assert sorted(files.name(index) for index in range(36))[-1] == "new.png"


@pytest.mark.parametrize("kind", ["shards", "parquet"])
def test_an_index_that_cannot_be_kept_is_told_and_done_without(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, content: bytes) -> int:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(pools, "LOOKED_AT", 10)
    source = SOURCES[kind](tmp_path / "source", IMAGES)
    wanted = pixels_of(load_dataset(options_of(source), with_labels=False))
    for index in (tmp_path / "source").glob(".*"):
        index.unlink()
    monkeypatch.setattr(Path, "write_bytes", refused)
    said: list[str] = []
    assert pixels_of(load_dataset(options_of(source), with_labels=False, say=said.append)) == wanted
    assert [text for text in said if "3 indexes cannot be kept beside what they are of (read-only file sys" in text]
    assert not list((tmp_path / "source").glob(".*"))


@pytest.mark.parametrize("kind", TABLES)
def test_neighbours_in_a_table_are_read_together(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from faqd.train.data.sources import table_file

    read: list[int] = []
    plain = table_file._column
    monkeypatch.setattr(table_file, "_column", lambda *a: read.append(a[1]) or plain(*a))  # type: ignore[func-returns-value]
    files = listing_of(SOURCES[kind](tmp_path / "source", IMAGES))
    read.clear()
    for index in range(len(files)):
        files.picture(index)
    assert len(read) == 3 * 4 - 2  # files of 25, 25 and 10 rows, in groups of 7


def test_large_row_groups_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faqd.train.data.sources.tables.LARGE_GROUP", 500)
    said: list[str] = []
    load_dataset(options_of(as_parquet(tmp_path / "source", IMAGES)), with_labels=False, say=said.append)
    assert "write it again with row_group_size=100, or as shards" in said[0]


# --- workers, changes, broken images ---


@pytest.mark.parametrize(("kind", "url"), [place for place in PLACES if place[0] != "folder"])
def test_other_processes_read_the_same(kind: str, url: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SOURCES[kind](tmp_path / "source", IMAGES)
    pictures = streamed(options_of(behind_a_url(source) if url else source), monkeypatch).train.pixels
    assert isinstance(pictures, Pictures)
    whole = torch.from_numpy(pictures[:]).permute(0, 3, 1, 2)
    feed = Feed(pictures, lambda i: [(5 * i + k) % len(whole) for k in range(6)], 2, CPU)
    for iteration in (0, 1, 7, 2):
        assert torch.equal(feed.at(iteration), whole[[(5 * iteration + k) % len(whole) for k in range(6)]])
    feed.close()


def test_a_store_in_memory_is_a_url_as_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = "memory" + "://"
    store = fsspec.filesystem("memory")
    for kind in ("folder", "shards", "parquet", "npy"):
        source = SOURCES[kind](tmp_path / kind, IMAGES)
        for path in (tmp_path / kind).iterdir():
            store.pipe_file(str(path), path.read_bytes())
        options = options_of(behind_a_url(source, memory))
        dataset = streamed(options, monkeypatch)
        assert pixels_of(dataset) == pixels_of(load_dataset(options_of(source), with_labels=False)), kind
        assert isinstance(dataset.train.pixels, Pictures)
        feed = Feed(dataset.train.pixels, lambda i: [0, 1, 2], 0, CPU)
        assert torch.equal(feed.at(0), torch.from_numpy(dataset.train.images[:3]).permute(0, 3, 1, 2))
    assert store.exists(str(tmp_path / "shards" / index_name("000.tar")))


@pytest.mark.parametrize(("kind", "url"), PLACES)
@pytest.mark.parametrize("how", ["touched", "cut off", "gone"])
def test_a_file_that_changes_is_noticed(
    kind: str, url: bool, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SOURCES[kind](tmp_path / "source", IMAGES)
    dataset = streamed(options_of(behind_a_url(source) if url else source), monkeypatch)
    for path in [path for path in (tmp_path / "source").iterdir() if not path.name.startswith(".")]:
        if how == "gone":
            path.unlink()
        elif how == "cut off":
            os.truncate(path, path.stat().st_size // 2)
        else:
            os.utime(path, ns=(0, 12345))
    with pytest.raises(UserError, match=r"changed, or gone, since the images were listed.*--resume"):
        dataset.eval.pixels[:2]


@pytest.mark.parametrize("kind", ["folder", "shards", "npy"])
def test_who_does_not_answer_about_a_url_has_not_changed_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(*_: Any, **__: Any) -> Any:
        raise TimeoutError("timed out")

    dataset = streamed(options_of(behind_a_url(SOURCES[kind](tmp_path / "source", IMAGES))), monkeypatch)
    monkeypatch.setattr(type(fsspec.filesystem("file")), "info", silent)
    with pytest.raises(UserError, match=r"cannot be read \(timed out\)\. .*--resume"):
        dataset.eval.pixels[:2]


@pytest.mark.parametrize("kind", ENCODED)
def test_a_broken_image_is_replaced_counted_and_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fixtures.image_sources.png", torn_now_and_then := _Torn())
    monkeypatch.setattr(pools, "LOOKED_AT", 10)
    monkeypatch.setattr(pools, "BROKEN_PERCENT", 50)
    wanted = streamed(options_of(as_folder(tmp_path / "wanted", IMAGES)), monkeypatch)
    torn_now_and_then.count = 0
    found = streamed(options_of(SOURCES[kind](tmp_path / "source", IMAGES)), monkeypatch)
    assert pixels_of(found) == pixels_of(wanted)
    assert isinstance(found.train.pixels, Pictures) and isinstance(wanted.train.pixels, Pictures)
    broken = found.train.pixels.findings.broken
    assert broken and broken == wanted.train.pixels.findings.broken and set(broken.values()) == {"do not decode"}
    assert f"{len(broken)} of 60 images do not decode" in str(found.train.pixels.in_words())


class _Torn:
    count = 0

    def __call__(self, image: Any) -> bytes:
        self.count += 1
        return b"torn" * self.count if self.count % 9 == 5 else png(image)


def test_of_many_broken_images_a_few_are_named(tmp_path: Path) -> None:
    images = {name_of(index): b"torn" if index < 900 else png(IMAGES[index % 60]) for index in range(1000)}
    write_tar(tmp_path / "a.tar", images)
    with pytest.raises(UserError, match=r"900 of 1000 images do not decode \(0000.png, .*0004.png, …\); more than 1 %"):
        load_dataset(options_of(f"shards:{tmp_path / 'a.tar'}"), with_labels=False)


def test_a_row_without_bytes_is_a_broken_image(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"bytes": png(image), "path": None} for image in random_images(200)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array([*rows, {"bytes": None, "path": "x"}], kind)}), tmp_path / "a.parquet")
    said: list[str] = []
    dataset = load_dataset(options_of(f"parquet:{tmp_path / 'a.parquet'}"), with_labels=False, say=said.append)
    assert (
        dataset.skipped == ("row 200",) and "1 of 201 images have no bytes in their row (row 200); skipped" in said[0]
    )


# --- evaluation ---


@pytest.mark.parametrize("kind", SOURCES)
def test_evaluation_images_come_from_every_source_and_stream(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heap = as_folder(tmp_path / "heap", IMAGES)
    held = np.concatenate([random_images(20, seed=3), IMAGES[:4]])
    options = options_of(heap, evaluation=SOURCES[kind](tmp_path / "held", held))
    said: list[str] = []
    whole = load_dataset(options, with_labels="eval", say=said.append)
    assert f"--eval-data {options.evaluation}: 4 of its images are in {heap} too, and only evaluate." in said
    assert {image.tobytes() for image in whole.eval.images} == {image.tobytes() for image in held}
    small = replace(options, source=as_npy(tmp_path / "npy", IMAGES))
    monkeypatch.setattr("faqd.train.data.evaluation.is_beyond_memory", lambda *_: True)
    pictures = load_dataset(small, with_labels="eval")
    assert isinstance(pictures.eval.pixels, Pictures) and pixels_of(pictures)[2] == whole.eval.images.tobytes()
    assert len(pictures.train) + len(pictures.select) == 56
    names = None if whole.eval.names is None else whole.eval.names.tolist()
    assert names == (None if pictures.eval.names is None else pictures.eval.names.tolist())


def test_a_moment_is_long_enough_for_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL is asked about its changes now and then, not for each image."""
    monkeypatch.setattr(urls, "ASKED_EVERY_S", 1000)
    monkeypatch.setattr(time, "monotonic", lambda: 5000.0)
    source = behind_a_url(as_npy(tmp_path / "source", IMAGES))
    files = listing_of(source)
    asked: list[str] = []
    plain = urls._file_system
    monkeypatch.setattr(urls, "_file_system", lambda url: asked.append(url) or plain(url))  # type: ignore[func-returns-value]
    assert all(files.is_as_listed(index) for index in range(60)) and not asked
    monkeypatch.setattr(time, "monotonic", lambda: 6000.0)
    assert files.is_as_listed(0) and len(asked) == 1


def test_pictures_are_upright_and_of_any_format_in_every_container(tmp_path: Path) -> None:
    import io

    exif = Image.Exif()
    exif[274] = 6
    file = io.BytesIO()
    Image.new("RGB", (32, 16)).save(file, "JPEG", exif=exif)
    write_tar(tmp_path / "a.tar", {"a.jpg": file.getvalue()})
    files = listing_of(f"shards:{tmp_path / 'a.tar'}")
    picture = files.picture(0)
    assert not isinstance(picture, str) and picture.pixels.shape == (32, 16, 3) and files.picture_size(0) == (32, 16)
