"""Sources of images that are none, or broken: each ends in a sentence before training, and nothing is written."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from faqd.errors import UserError
from faqd.train.data.datasets import load_dataset
from faqd.train.data.options import DataOptions
from tests.fixtures.image_sources import URL, as_npy, as_parquet, as_shards, behind_a_url, png, table_of, write_tar
from tests.fixtures.toy_runs import PLAIN, User, everything_in, new_user, succeeds
from tests.train.test_data import random_images

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
IMAGES = random_images(40)
Case = tuple[Callable[[Path], Any], str, list[str]]


class Boom:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def shard(folder: Path) -> Path:
    return write_tar(folder / "a.tar", {f"{index}.png": png(image) for index, image in enumerate(IMAGES)})


def append(path: Path, name: str) -> None:
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo(name)
        member.size = 4
        tar.addfile(member, io.BytesIO(b"more"))


def round_trip(folder: Path) -> None:
    (folder / "d").mkdir()
    (folder / "d" / "round").symlink_to(folder / "d")


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


def without_end(folder: Path) -> None:
    """Cut where a file of the tar ends, which readers take for its end."""
    path = shard(folder)
    path.write_bytes(path.read_bytes().rstrip(b"\0").ljust(40 * 1024, b"\0")[: 40 * 1024])


def damaged(folder: Path) -> None:
    path = shard(folder)
    content = bytearray(path.read_bytes())
    content[20 * 1024 : 20 * 1024 + 512] = b"?" * 512
    path.write_bytes(content)


def table(folder: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return folder / "a.parquet"


def npy(folder: Path, array: Any) -> Path:
    np.save(folder / "a.npy", array, allow_pickle=array.dtype == object)
    return folder / "a.npy"


def npy_says(folder: Path, header: bytes) -> None:
    (folder / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


CASES: dict[str, Case] = {
    "shards: nothing fits": (lambda at: None, "shards:*.tar", ["*.tar: no such file", "{000..127}", "quote it"]),
    "shards: one is missing": (shard, "shards:{a,b}.tar", ["b.tar", "no such file"]),
    "shards: braces backwards": (shard, "shards:{9..1}.tar", ["{9..1} stands for nothing"]),
    "shards: braces without end": (lambda at: None, "shards:{0..9999}{0..9999}.tar", ["stand for 100,000,000 files"]),
    "shards: a folder": (lambda at: (at / "d").mkdir(), "shards:d", ["d: is a folder", "d/*.tar"]),
    "shards: empty": (lambda at: (at / "a.tar").write_bytes(b""), "shards:a.tar", ["a.tar: an empty file"]),
    "shards: no member": (
        lambda at: write_tar(at / "a.tar", {}),
        "shards:a.tar",
        ["no image among its 0 files", ".png"],
    ),
    "shards: no image": (
        lambda at: write_tar(at / "a.tar", {"a.txt": b"", "a.cls": b"1"}),
        "shards:a.tar",
        ["a.tar: no image among its 2 files"],
    ),
    "shards: cut in a file": (
        lambda at: cut(shard(at), 0.49),
        "shards:a.tar",
        ["a.tar: ", "was cut off"],
    ),
    "shards: cut behind a file": (without_end, "shards:a.tar", ["behind 40 files, without the mark that ends a tar"]),
    "shards: a header is damaged": (damaged, "shards:a.tar", ["damaged, behind 20 files"]),
    "shards: no tar": (lambda at: (at / "a.tar").write_bytes(b"text" * 1000), "shards:a.tar", ["is no tar file"]),
    "shards: compressed": (
        lambda at: (at / "a.tar.gz").write_bytes(gzip.compress(shard(at).read_bytes())),
        "shards:a.tar.gz",
        ["is compressed", "front to back", "gzip -d a.tar.gz"],
    ),
    "shards: a pipe": (lambda at: os.mkfifo(at / "a.tar"), "shards:a.tar", ["is a pipe", "write it into a file"]),
    "shards: a command": (lambda at: None, "shards:pipe:curl x", ["front to back", "write it into tar files"]),
    "shards: a link to nowhere": (
        lambda at: (at / "a.tar").symlink_to("nowhere"),
        "shards:*.tar",
        ["a.tar: is a link that leads nowhere"],
    ),
    "shards: two of one name": (
        lambda at: append(shard(at), "3.png"),
        "shards:a.tar",
        ["a.tar: holds two images called 3.png"],
    ),
    "parquet: a column of numbers": (
        lambda at: table(at, image=[1, 2], other=[[1], [2]]),
        "parquet:a.parquet",
        ["no column of images", "image (int64)"],
    ),
    "parquet: that column is no image": (
        lambda at: table(at, image=[b"x"], words=["y"]),
        "parquet:a.parquet#words",
        ["the column 'words' is string", "expected the bytes of image files"],
    ),
    "parquet: no such column": (
        lambda at: table(at, image=[b"x"]),
        "parquet:a.parquet#picture",
        ["no column 'picture'", "image (binary)"],
    ),
    "parquet: nothing in it decodes": (
        lambda at: table(at, image=[b"x"] * 40),
        "parquet:a.parquet",
        ["40 of 40 images do not decode (row 0"],
    ),
    "parquet: no row": (
        lambda at: pq.write_table(table_of(IMAGES[:0], None), at / "a.parquet"),
        "parquet:a.parquet",
        ["no row"],
    ),
    "parquet: is none": (
        lambda at: (at / "a.parquet").write_bytes(b"x" * 99),
        "parquet:a.parquet",
        ["not a readable parquet"],
    ),
    "parquet: empty": (lambda at: (at / "a.parquet").write_bytes(b""), "parquet:a.parquet", ["not a readable parquet"]),
    "parquet: cut off": (
        lambda at: (as_parquet(at / "p", IMAGES), cut(at / "p" / "0000.parquet", 0.7)),
        "parquet:p/*.parquet",
        ["0000.parquet: not a readable parquet file"],
    ),
    "parquet: a folder": (lambda at: (at / "d").mkdir(), "parquet:d", ["d: is a folder", "d/*.parquet"]),
    "arrow: is none": (lambda at: (at / "a.arrow").write_bytes(b"x" * 99), "arrow:a.arrow", ["not a readable arrow"]),
    "arrow: a folder": (lambda at: (at / "d").mkdir(), "arrow:d", ["d: is a folder", "d/*.arrow"]),
    "npy: floats": (
        lambda at: npy(at, np.zeros((9, 8, 8, 3))),
        "npy:a.npy",
        ["float64 of shape (9, 8, 8, 3)"],
    ),
    "npy: objects": (lambda at: npy(at, np.array([Boom()] * 4)), "npy:a.npy", ["object of shape (4,)", "uint8"]),
    "npy: no images": (lambda at: npy(at, np.zeros((9, 8, 8, 4), np.uint8)), "npy:a.npy", ["1 or 3"]),
    "npy: none of them": (lambda at: npy(at, np.zeros((0, 8, 8, 3), np.uint8)), "npy:a.npy", ["N above 0"]),
    "npy: in columns": (
        lambda at: npy(at, np.asfortranarray(IMAGES)),
        "npy:a.npy",
        ["Fortran's order", "ascontiguousarray"],
    ),
    "npy: cut off": (lambda at: cut(npy(at, IMAGES), 0.9), "npy:a.npy", ["cut off", "40 images take"]),
    "npy: a pickle": (lambda at: (at / "a.npy").write_bytes(pickle.dumps(Boom())), "npy:a.npy", ["not a readable npy"]),
    "npy: a header that computes": (
        lambda at: npy_says(at, b"{'descr': __import__('os').system('touch executed')}".ljust(117) + b"\n"),
        "npy:a.npy",
        ["not a readable npy"],
    ),
    "npy: an npz": (lambda at: np.savez(at / "a.npy.npz", images=IMAGES), "npy:a.npy.npz", ["not a readable npy"]),
    "npy: empty": (lambda at: (at / "a.npy").write_bytes(b""), "npy:a.npy", ["not a readable npy"]),
    "npy: a folder": (lambda at: (at / "d").mkdir(), "npy:d", ["d: is a folder"]),
    "npy: several": (lambda at: (npy(at, IMAGES), shard(at)), "npy:a.*", ["fits 2 files; give one"]),
    "folder: a file": (shard, "folder:a.tar", ["a.tar: no such folder", "shards:"]),
    "folder: only itself": (
        round_trip,
        "folder:d",
        ["no image in it or below it"],
    ),
    "npz: a folder": (lambda at: (at / "d").mkdir(), "npz:d", ["d: not a readable npz file"]),
    "a URL without a kind": (
        lambda at: None,
        "s3" + "://bucket/images",
        ["no such source", "folder:PATH"],
    ),
    "a URL of nobody": (lambda at: None, "shards:nobody" + "://x/a.tar", ["fsspec cannot open it"]),
}


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_source_is_one_sentence(case: str, user: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, source, words = CASES[case]
    (tmp_path / "data").mkdir()
    make(tmp_path / "data")
    monkeypatch.chdir(tmp_path / "data")
    before = everything_in(tmp_path)
    outcome = user.distill(tmp_path / "out", "--data", source, *PLAIN, "--image-size", 8)
    assert outcome.code == 2 and "Traceback" not in outcome.stderr, outcome.stderr
    last = outcome.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), last
    assert everything_in(tmp_path) == before


BEHIND_URLS = ["empty", "no image", "cut in a file", "cut behind a file", "compressed", "nothing fits", "a folder"]


@pytest.mark.parametrize("case", [f"shards: {case}" for case in BEHIND_URLS] + ["parquet: is none", "npy: cut off"])
def test_behind_a_url_too(case: str, tmp_path: Path) -> None:
    make, source, words = CASES[case]
    make(tmp_path)
    kind, _, where = source.partition(":")
    with pytest.raises(UserError) as refused:
        load_dataset(options_of(f"{kind}:{URL}{tmp_path / where}"), with_labels=False)
    assert all(word in str(refused.value) for word in words if "a.tar" not in word), refused.value


def options_of(source: str) -> DataOptions:
    return DataOptions(source, image_size=(8, 8), mean="none", std="none")


def test_nobody_answers_behind_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: Any, **__: Any) -> Any:
        raise TimeoutError("timed out")

    local = type(fsspec.filesystem("file"))
    for method in ("glob", "exists", "find"):
        monkeypatch.setattr(local, method, silent)
    for source in ("shards:{}x/*.tar", "shards:{}x/a.tar", "folder:{}x", "npy:{}x/a.npy"):
        with pytest.raises(
            UserError, match=r"cannot be read \(timed out\); check the address, the credentials and the"
        ):
            load_dataset(options_of(source.format(URL + str(tmp_path))), with_labels=False)


LABELS: dict[str, Case] = {
    "shards: some have none": (
        lambda at: write_tar(at / "a.tar", {"a.png": png(IMAGES[0]), "a.cls": b"1", "b.png": png(IMAGES[1])}),
        "shards:a.tar",
        ["b.png: 1 of 2 images have no label (.cls)"],
    ),
    "shards: a word": (
        lambda at: write_tar(at / "a.tar", {"a.png": png(IMAGES[0]), "a.cls": b"cat"}),
        "shards:a.tar",
        ["a.png: its label (.cls) is 'cat'", "0, 1, 2"],
    ),
    "shards: below 0": (
        lambda at: write_tar(at / "a.tar", {"a.png": png(IMAGES[0]), "a.cls": b"-1"}),
        "shards:a.tar",
        ["'labels' go from -1 to -1"],
    ),
    "parquet: no such column": (
        lambda at: table(at, image=[b"x"]),
        "parquet:a.parquet#image,fine",
        ["no column 'fine'", "integers"],
    ),
    "parquet: words": (
        lambda at: table(at, image=[b"x"], label=["cat"]),
        "parquet:a.parquet",
        ["string in the column 'label'", "expected integers"],
    ),
    "parquet: some have none": (
        lambda at: table(at, image=[b"x", b"y"], label=pa.array([1, None])),
        "parquet:a.parquet",
        ["rows without a value in the column 'label'"],
    ),
    "parquet: of one file alone": (
        lambda at: (table(at, image=[b"x"], label=[1]).rename(at / "a1.parquet"), table(at, image=[b"y"])),
        "parquet:a*.parquet",
        ["no column 'label'"],
    ),
}


@pytest.mark.parametrize("case", LABELS)
def test_wrong_labels_are_told_where_wanted(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, source, words = LABELS[case]
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        load_dataset(options_of(source), with_labels=True)
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize(
    ("missing", "source", "extra"),
    [("pyarrow", as_parquet, "[parquet]"), ("fsspec", as_shards, "[train]")],
)
def test_a_missing_package_has_a_cure(
    missing: str, source: Any, extra: str, user: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = source(tmp_path / "source", IMAGES)
    for module in [name for name in sys.modules if name.startswith(("faqd.train.data.sources.", missing))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    line = ("--data", made if missing == "pyarrow" else behind_a_url(made), *PLAIN, "--image-size", 8)
    outcome = user.distill(tmp_path / "out", *line)
    assert outcome.code == 2 and f"error: this command needs {missing}, which is not installed: " in outcome.stderr
    assert extra in outcome.stderr and not (tmp_path / "out").exists()


def test_a_missing_file_system_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match="Install s3fs to access S3, which fsspec needs for it, with pip install"):
        load_dataset(options_of("shards:s3" + "://bucket/a.tar"), with_labels=False)


@pytest.mark.parametrize("make", [as_shards, as_parquet, as_npy])
def test_a_source_that_grew_is_another_run(make: Any, user: User, tmp_path: Path) -> None:
    source = make(tmp_path / "source", IMAGES)
    line = ("--data", source, *PLAIN, "--image-size", 8, "--weight-bits", 8, "--act-bits", 8)
    succeeds(user.distill(tmp_path / "run", *line, "--time-limit", 0.001))
    for path in (tmp_path / "source").iterdir():
        path.unlink()
    (tmp_path / "source").rmdir()
    make(tmp_path / "source", random_images(41))
    outcome = user.distill(tmp_path / "run", *line, "--resume")
    assert outcome.code == 2 and "files: 40 " in outcome.stderr and "41 " in outcome.stderr, outcome.stderr
