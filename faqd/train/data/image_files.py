"""Images that are read at once, and what is wrong with the others; classes of folders, the tree of Tiny ImageNet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from faqd.errors import UserError
from faqd.train.data.decode import Picture
from faqd.train.data.findings import Findings
from faqd.train.data.listed_files import listed
from faqd.train.data.listing import Listing, Say
from faqd.train.data.pictures import Fit

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


def class_names(folder: str, files: Iterable[str]) -> list[str]:
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


def read_images(files: Listing, fit: Fit | None, say: Say) -> Images:
    """Decode images and `fit` each; without `fit` all must have one size.

    What does not decode, or is too large to, is skipped and named; UserError where that is more than 1 %. `say` also
    tells of 16-bit files that use fewer bits, and of images that show nothing.
    """
    pixels: NDArray[np.uint8] | None = None
    kept: list[int] = []
    findings = Findings()
    for index, image in each_image(files, fit, findings, say):
        if pixels is None:
            # One block from the start: a list of images would need their memory twice when it is stacked.
            pixels = np.empty((len(files), *image.shape), np.uint8)
        if image.shape != pixels.shape[1:]:
            raise UserError(
                f"{files.title}: images of different sizes, {_size(pixels[0])} ({files.name(kept[0])}) and "
                f"{_size(image)} ({files.name(index)}); say with --image-size what they are brought to."
            )
        pixels[len(kept)] = image
        kept.append(index)
    assert pixels is not None
    return Images(pixels[: len(kept)], kept, tuple(findings.broken))


def each_image(
    files: Listing, fit: Fit | None, findings: Findings, say: Say
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """The images that decode and their places in `files`; then what is wrong with the others, as in `read_images`."""

    def read(index: int) -> tuple[Picture | str, NDArray[np.uint8] | None]:
        try:
            picture = files.picture(index)
        except OSError as error:
            raise UserError(f"{files.where(index)}: cannot be read ({error.strerror}).") from error
        if isinstance(picture, str):
            return picture, None
        return picture.without_pixels(), picture.pixels if fit is None else fit(picture.pixels)

    with ThreadPoolExecutor() as pool:
        for index, (picture, image) in enumerate(pool.map(read, range(len(files)))):
            if index and index % REPORT_EVERY == 0:
                say(f"{files.title}: {index} of {len(files)} images read.")
            findings.see(files.name(index), picture)
            if image is not None:
                yield index, image
    findings.refuse_many_broken(files.title, len(files))
    if findings.broken:
        say(f"{findings.broken_in_words(files.title, len(files))}; skipped.")
    findings.tell_strange(files.title, len(files), say)


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
    train = [f"train/{file}" for file in listed(folder / "train").names()]
    train_wnids = [file.split("/")[1] for file in train]
    classes = tuple(sorted(set(train_wnids)))
    if not rows or any(len(row) < 2 or row[1] not in classes for row in rows):
        raise UserError(f"{folder / listing}: not the published list (image, WordNet id, box); unpack it again.")
    val = [f"val/images/{row[0]}" for row in rows]
    missing = [file for file in val if not (folder / file).is_file()]
    if missing:
        raise UserError(f"{folder}: {len(missing)} files of {listing} are missing ({missing[0]}); unpack it again.")
    return TinyImageNet(folder, classes, train, train_wnids, val, [row[1] for row in rows])


def _size(image: NDArray[np.uint8]) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"
