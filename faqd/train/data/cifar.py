"""CIFAR-10 and CIFAR-100 from their published files, checked, and without running what a pickle may ask for."""

from __future__ import annotations

import hashlib
import http.client
import io
import pickle
import shutil
import ssl
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from faqd.errors import UserError
from faqd.files import written_beside

Say = Callable[[str], None]


@dataclass(frozen=True)
class Published:
    """What the authors of a data set published. md5: of every file that is read."""

    folder: str
    url: str
    archive_md5: str
    train: tuple[str, ...]
    test: str
    labels: bytes
    classes: tuple[str, ...] | None
    md5: dict[str, str]


PUBLISHED = {
    "cifar10": Published(
        folder="cifar-10-batches-py",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        archive_md5="c58f30108f718f92721af3b95e74349a",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test="test_batch",
        labels=b"labels",
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        md5={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
        },
    ),
    "cifar100": Published(
        folder="cifar-100-python",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
        train=("train",),
        test="test",
        labels=b"fine_labels",
        classes=None,  # in the file meta
        md5={
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
    ),
}


@dataclass(frozen=True)
class Cifar:
    """batches: the training and the test images (N, 32, 32, 3) uint8 with their labels, None where not read."""

    classes: tuple[str, ...]
    batches: tuple[tuple[NDArray[np.uint8], NDArray[np.int64] | None], ...]


def load_cifar(name: str, root: Path, *, download: bool, with_labels: bool, say: Say) -> Cifar:
    """Read `name` from `root` or its published folder below it; fetched first if it is missing and `download`."""
    published = PUBLISHED[name]
    folder = _find(published, root)
    if folder is None and download:
        fetch(published, root, say)
        folder = _find(published, root)
    if folder is None:
        raise UserError(
            f"{name} is not there: looked for {', '.join(published.md5)} in {root / published.folder} and {root}. "
            "Say with --data-root where it is, or let --download fetch it."
        )

    def contents(file: str) -> dict[Any, Any]:
        return unpickled(folder / file, _checked(folder / file, published.md5[file]))

    def images_and_labels(files: tuple[str, ...]) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
        batches = [contents(file) for file in files]
        rows = np.concatenate([batch[b"data"].value() for batch in batches])
        images = np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        if not with_labels:
            return images, None
        return images, np.concatenate([np.array(batch[published.labels], np.int64) for batch in batches])

    classes = published.classes or tuple(name.decode() for name in contents("meta")[b"fine_label_names"])
    return Cifar(classes, (images_and_labels(published.train), images_and_labels((published.test,))))


def unpickled(path: Path, data: bytes) -> dict[Any, Any]:
    """The dictionary in a published pickle, its arrays as `PickledArray`; UserError on anything else."""
    try:
        contents = _Unpickler(path, data).load()
    except UserError:
        raise
    # A pickle is a program: a damaged one can fail in any way.
    except Exception as error:
        raise UserError(f"{path}: not a readable CIFAR file ({error}); fetch it again.") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path}: found {type(contents).__name__}, expected a dictionary; not a CIFAR file.")
    return contents


class PickledArray:
    """Stands for a pickled numpy array: keeps what the pickle says of it, runs none of numpy's own code."""

    def __init__(self, *_: object) -> None:
        self.shape: tuple[int, ...] = ()
        self.raw = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, dtype, fortran, self.raw = state
        if not isinstance(dtype, _PickledDtype) or dtype.name != b"u1" or fortran:
            raise ValueError("an array that is not uint8 in C order")

    def value(self) -> NDArray[np.uint8]:
        return np.frombuffer(self.raw, np.uint8).reshape(self.shape)


class _PickledDtype:
    def __init__(self, name: object, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment: one byte has neither."""


_STAND_INS: dict[tuple[str, str], type] = {
    ("numpy.core.multiarray", "_reconstruct"): PickledArray,
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): _PickledDtype,
}


class _Unpickler(pickle.Unpickler):
    """Gives a stand-in for each of the three names of numpy in the published files; refuses all others."""

    def __init__(self, path: Path, data: bytes) -> None:
        # The files were written by Python 2, whose strings are bytes.
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise UserError(
                f"{self._path}: asks to run {module}.{name}, which no CIFAR file does; refused. "
                "Delete it and fetch the published one."
            )
        return _STAND_INS[module, name]


def fetch(published: Published, root: Path, say: Say) -> None:
    """Download the published archive into `root`, check it and unpack the files that are read."""
    archive = root / published.url.rsplit("/", 1)[1]
    if archive.is_file():
        _check(archive, _md5(archive), published.archive_md5)
    else:
        say(f"Fetching {published.url} to {archive}.")
        with written_beside(archive) as temporary:
            _download(published.url, temporary)
            _check(archive, _md5(temporary), published.archive_md5)
    with written_beside(root / published.folder) as temporary, tarfile.open(archive) as tar:
        temporary.mkdir()
        # Only the expected members, each as plain bytes under our own name: no path of the archive is ever used.
        for file in published.md5:
            member = tar.extractfile(f"{published.folder}/{file}")
            assert member is not None
            with member, (temporary / file).open("wb") as target:
                shutil.copyfileobj(member, target)
    say(f"Unpacked {archive} to {root / published.folder}.")


def _download(url: str, path: Path) -> None:
    console = Console(stderr=True)
    try:
        with (
            urllib.request.urlopen(url, timeout=30) as response,
            path.open("wb") as target,
            Progress(console=console, disable=not console.is_terminal) as progress,
        ):
            task = progress.add_task(path.name, total=int(response.headers["Content-Length"] or 0) or None)
            while block := response.read(1 << 20):
                target.write(block)
                progress.advance(task, len(block))
    except (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"{url} could not be fetched ({error}). Check the network and run the same command again, or fetch the "
            "file on another machine, unpack it, and say with --data-root where."
        ) from None


def _find(published: Published, root: Path) -> Path | None:
    places = (root / published.folder, root)
    return next((place for place in places if all((place / file).is_file() for file in published.md5)), None)


def _checked(path: Path, md5: str) -> bytes:
    data = path.read_bytes()
    _check(path, hashlib.md5(data, usedforsecurity=False).hexdigest(), md5)
    return data


def _check(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(
            f"{path}: md5 {found}, expected {expected}: not the published file, or damaged. "
            "Delete it and fetch it again, with --download or by hand."
        )


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
