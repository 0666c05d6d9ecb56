"""What a user brings: folders of image files, found and read; the tree of Tiny ImageNet."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from faqd.errors import UserError
from faqd.train.data.decode import decoded

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
BROKEN_PERCENT = 1
"""More files than this that cannot be read say that something else is wrong."""
BITS = 14
"""Cameras have up to so many; 16-bit files in which no pixel has more are theirs, and dark."""
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}
"""What no class is called, where all subfolders are called so."""
REPORT_EVERY = 5000
TINY_IMAGENET = "tiny-imagenet-200"


@dataclass(frozen=True)
class Images:
    """pixels: (N, H, W, C) uint8. kept: their indices in the list of files. skipped: files that cannot be read."""

    pixels: NDArray[np.uint8]
    kept: list[int]
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class TinyImageNet:
    """The files of the published tree, relative to `folder`; the class of each is a WordNet id."""

    folder: Path
    classes: tuple[str, ...]
    train: list[str]
    train_wnids: list[str]
    val: list[str]
    val_wnids: list[str]


def list_images(folder: Path) -> list[str]:
    """The image files below `folder`, relative, sorted; hidden ones are left out (file managers leave copies)."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.")
    below = (path.relative_to(folder) for path in _walked(folder) if path.suffix.lower() in SUFFIXES)
    files = sorted(path.as_posix() for path in below if not any(part.startswith(".") for part in path.parts))
    if not files:
        raise UserError(f"{folder}: no image in it or below it; expected files that end in {', '.join(SUFFIXES)}.")
    return files


def _walked(folder: Path) -> Iterator[Path]:
    """The files below `folder`, through links to folders too, but through none twice."""
    seen = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(here, name) for name in files)


def class_names(folder: Path, files: Iterable[str]) -> list[str]:
    """The class of each file: the subfolder of `folder` that it lies in, however deep."""
    names = [file.split("/")[:-1] for file in files]
    if not all(names):
        raise UserError(
            f"{folder}: --labels takes the names of its subfolders as classes, but images lie in the folder itself. "
            "Move them into one subfolder per class, or leave --labels out."
        )
    classes = sorted({name[0] for name in names})
    if len(classes) > 1 and SPLITS.issuperset(classes):
        largest = max(classes, key=lambda name: name.startswith("train"))
        raise UserError(
            f"{folder}: --labels takes the names of its subfolders as classes, and these, {', '.join(classes)}, are "
            f"parts of a data set that have all classes each. Give one of them, as folder:{folder}/{largest}, or leave "
            "--labels out."
        )
    return [name[0] for name in names]


def read_images(
    folder: Path,
    files: Sequence[str],
    fit: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None,
    say: Callable[[str], None],
) -> Images:
    """Decode files and `fit` each; without `fit` all must have one size.

    What does not decode, or is too large to, is skipped and named; UserError where that is more than 1 %. `say` also
    tells of 16-bit files that use fewer bits, and of images that show nothing.
    """
    pixels: NDArray[np.uint8] | None = None
    kept: list[int] = []
    skipped: dict[str, str] = {}
    deep: list[int] = []
    transparent: list[str] = []

    def read(file: str) -> NDArray[np.uint8] | str:
        picture = decoded(folder / file)
        if isinstance(picture, str):
            return picture
        if not picture.shows:
            transparent.append(file)
        if picture.deep is not None:
            deep.append(picture.deep)
        return picture.pixels if fit is None else fit(picture.pixels)

    with ThreadPoolExecutor() as pool:
        for index, image in enumerate(pool.map(read, files)):
            if index and index % REPORT_EVERY == 0:
                say(f"{folder}: {index} of {len(files)} images read.")
            if isinstance(image, str):
                skipped[files[index]] = image
                continue
            if pixels is None:
                # One block from the start: a list of images would need their memory twice when it is stacked.
                pixels = np.empty((len(files), *image.shape), np.uint8)
            if image.shape != pixels.shape[1:]:
                raise UserError(
                    f"{folder}: images of different sizes, {_size(pixels[0])} ({files[kept[0]]}) and {_size(image)} "
                    f"({files[index]}); say with --image-size what they are brought to."
                )
            pixels[len(kept)] = image
            kept.append(index)
    if skipped:
        _report(folder, skipped, len(files), say)
    assert pixels is not None
    _tell_of_dark_files(folder, deep, say)
    if transparent:
        say(
            f"{folder}: {len(transparent)} of {len(files)} images are transparent everywhere ({min(transparent)}), so "
            "that a viewer shows nothing; their colours are read as if they were not."
        )
    return Images(pixels[: len(kept)], kept, tuple(skipped))


def find_tiny_imagenet(root: Path) -> TinyImageNet:
    """The published tree below `root`, or `root` itself; validation images in the order of their list."""
    candidates = [root / TINY_IMAGENET, root]
    listing = Path("val") / "val_annotations.txt"
    folder = next((place for place in candidates if (place / listing).is_file()), None)
    if folder is None:
        raise UserError(
            f"Tiny ImageNet is not there: looked for {listing} in {' and '.join(map(str, candidates))}. "
            f"Unpack the published {TINY_IMAGENET}.zip there, or say with --data-root where it is; "
            "--download does not fetch it."
        )
    rows = [line.split("\t") for line in (folder / listing).read_text(encoding="utf-8").splitlines() if line]
    train = [f"train/{file}" for file in list_images(folder / "train")]
    train_wnids = [file.split("/")[1] for file in train]
    classes = tuple(sorted(set(train_wnids)))
    if not rows or any(len(row) < 2 or row[1] not in classes for row in rows):
        raise UserError(f"{folder / listing}: not the published list (image, WordNet id, box); unpack it again.")
    val = [f"val/images/{row[0]}" for row in rows]
    missing = [file for file in val if not (folder / file).is_file()]
    if missing:
        raise UserError(f"{folder}: {len(missing)} files of {listing} are missing ({missing[0]}); unpack it again.")
    return TinyImageNet(folder, classes, train, train_wnids, val, [row[1] for row in rows])


def _tell_of_dark_files(folder: Path, deep: list[int], say: Callable[[str], None]) -> None:
    """A sentence where no 16-bit file uses its 16 bits. deep: of each such file what Picture has."""
    if deep and max(deep) < 2 ** (BITS - 8):
        bits = 8 + max(deep).bit_length()
        say(
            f"{folder}: no pixel of the {len(deep)} images of 16 bits passes {2**bits - 1}, but for one in a thousand, "
            f"as of {bits}-bit data; the upper 8 of 16 bits are taken, so that they load dark. Where they hold {bits} "
            f"bits, write them again with values shifted up by {16 - bits} bits."
        )


def _size(image: NDArray[np.uint8]) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"


def _report(folder: Path, skipped: dict[str, str], count: int, say: Callable[[str], None]) -> None:
    found = f"{folder}: " + ", ".join(_named(skipped, reason, count) for reason in dict.fromkeys(skipped.values()))
    if 100 * len(skipped) > BROKEN_PERCENT * count:
        raise UserError(
            f"{found}; more than {BROKEN_PERCENT} % are too many to skip. Repair, shrink, convert or remove them."
        )
    say(f"{found}; skipped.")


def _named(skipped: dict[str, str], reason: str, count: int) -> str:
    files = [file for file, why in skipped.items() if why == reason]
    return f"{len(files)} of {count} images {reason} ({', '.join(files[:5])}{', …' * (len(files) > 5)})"
