"""Files and folders behind a URL, through fsspec: s3://, gs://, hf:// and whatever else it has."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
import numpy as np
from numpy.typing import NDArray

from faqd.errors import UserError, first_line
from faqd.train.data.decode import Picture, ScaledSize, decoded, size_of_picture
from faqd.train.data.listed_files import ABSENT, State
from faqd.train.data.listing import SUFFIXES, Names, Say
from faqd.train.data.sources.stored import ENDINGS, StoredFile, failed, is_url

ASKED_EVERY_S = 60
"""Whether a file behind a URL has changed costs a question over the network: it is asked so often at most."""
VERSIONS = ("ETag", "etag", "md5Hash", "md5", "crc32c", "blob_id", "mtime", "LastModified", "last_modified", "updated")
"""What file systems call what changes when a file does; the first that is there counts."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL, as `StoredFile` has it."""

    url: str

    @property
    def place(self) -> str:
        return self.url

    def state(self) -> State:
        return _state(self.url, int(time.monotonic() // ASKED_EVERY_S))

    def read(self, start: int, size: int) -> bytes:
        files, path = _file_system(self.url)
        return bytes(_asked(self.url, lambda: files.cat_file(path, start=start, end=start + size)))

    def read_whole(self) -> bytes:
        files, path = _file_system(self.url)
        return bytes(_asked(self.url, lambda: files.cat_file(path)))

    def open(self) -> BinaryIO:
        files, path = _file_system(self.url)
        return cast(BinaryIO, _asked(self.url, lambda: files.open(path, "rb")))

    def beside(self, name: str) -> RemoteFile:
        return RemoteFile(f"{self.url.rsplit('/', 1)[0]}/{name}")

    def replace(self, content: bytes) -> None:
        files, path = _file_system(self.url)
        _asked(self.url, lambda: files.pipe_file(path, content))


@dataclass(frozen=True)
class ListedUrls:
    """Image files below a URL, a `Listing`; names are relative to it. states: (N, 2), of each its State."""

    title: str
    encoded: Names
    states: NDArray[np.int64]
    is_named = True
    is_quick = False

    def __len__(self) -> int:
        return len(self.encoded)

    def name(self, index: int) -> str:
        return self.encoded[index].decode()

    def encoded_names(self) -> Any:
        return iter(self.encoded)

    def where(self, index: int) -> str:
        return f"{self.title}/{self.name(index)}"

    def sizes(self, say: Say) -> NDArray[np.int64]:
        return self.states[:, 0]

    def picture(self, index: int, scaled: ScaledSize | None = None) -> Picture | str:
        return decoded(RemoteFile(self.where(index)).read_whole(), scaled)

    def picture_size(self, index: int) -> tuple[int, int]:
        return size_of_picture(RemoteFile(self.where(index)).read_whole())

    def is_as_listed(self, index: int) -> bool:
        return RemoteFile(self.where(index)).state() == tuple(self.states[index].tolist())

    def in_words(self) -> str:
        digest = hashlib.sha256(self.encoded.block)
        for numbers in (self.encoded.ends, self.states):
            digest.update(np.ascontiguousarray(numbers).data)
        return f"{len(self):,} files, {digest.hexdigest()[:16]}"


def listed_urls(url: str) -> ListedUrls:
    """The image files below a URL; hidden ones are left out."""
    url = url.rstrip("/")
    files, path = _file_system(url)
    found = _found(url, lambda: files.find(path, detail=True))
    root = path.rstrip("/") + "/"
    known = {name.removeprefix(root): info for name, info in found.items() if name.startswith(root)}
    names = [
        name
        for name in sorted(known)
        if name.lower().endswith(SUFFIXES) and not any(part.startswith(".") for part in name.split("/"))
    ]
    if not names:
        raise UserError(f"folder:{url}: no image below it; expected files that end in {', '.join(SUFFIXES)}.")
    states = np.array([_state_in(known[name]) for name in names], np.int64)
    return ListedUrls(url, Names.of(name.encode() for name in names), states)


def files_behind(kind: str, pattern: str) -> list[StoredFile]:
    """The files that a pattern without braces fits, sorted."""
    files, path = _file_system(pattern)
    scheme = pattern.split("://", 1)[0]
    has_pattern = any(sign in path for sign in "*?[")
    places = _found(pattern, lambda: sorted(files.glob(path)) if has_pattern else [path] * files.exists(path))
    shown = [place for place in places if not place.rsplit("/", 1)[-1].startswith(".")]
    if not has_pattern and shown and _found(pattern, lambda: files.isdir(path)):
        raise UserError(
            f"{kind}:{pattern}: is a folder, expected a file, or a pattern that fits some, such as "
            f"{pattern.rstrip('/')}/*{ENDINGS.get(kind, '')}."
        )
    urls = [place if is_url(place) else f"{scheme}://{place}" for place in shown]
    return [RemoteFile(url) for url in (urls if has_pattern else [pattern] * len(shown))]


def _file_system(url: str) -> tuple[Any, str]:
    """What reads it, and its path there. UserError where a package is missing, or nobody knows such URLs."""
    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: {first_line(error)}, which fsspec needs for it, with pip install.") from None
    except Exception as error:  # of a wrong URL, whatever its file system raises
        raise UserError(f"{url}: fsspec cannot open it ({first_line(error)}); give a URL that it knows.") from None
    return files, str(path)


def _asked(url: str, question: Callable[[], Result]) -> Result:
    try:
        return question()
    except Exception as error:  # every file system has errors of its own
        raise failed(url, first_line(error) or type(error).__name__) from error


def _found(url: str, question: Callable[[], Result]) -> Result:
    """The same before the work: UserError where nothing answers."""
    try:
        return _asked(url, question)
    except OSError as error:
        raise UserError(
            f"{url}: cannot be read ({error.strerror}); check the address, the credentials and the network."
        ) from None


@lru_cache(maxsize=1024)
def _state(url: str, minute: int) -> State:
    files, path = _file_system(url)
    files.invalidate_cache()
    try:
        return _state_in(files.info(path))
    except FileNotFoundError:
        return ABSENT
    except Exception as error:  # every file system has errors of its own
        raise failed(url, first_line(error)) from error


def _state_in(info: dict[str, Any]) -> State:
    version = next((info[name] for name in VERSIONS if info.get(name) is not None), info.get("created"))
    # A list of files may have as a number what a single one has as a date.
    said = version.timestamp() if isinstance(version, datetime) else version
    token = int.from_bytes(hashlib.sha256(str(said).encode()).digest()[:8], "big") >> 1
    return int(info.get("size") or 0), token
