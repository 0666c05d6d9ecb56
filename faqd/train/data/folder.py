"""A folder of images as a pool that is cut into splits: decoded whole, or picture by picture where it is too large."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from faqd.errors import UserError
from faqd.preprocess import Preprocess
from faqd.train.data.findings import Findings, Say
from faqd.train.data.image_files import REPORT_EVERY, Images, class_names, each_image, read_images
from faqd.train.data.listed_files import ListedFiles, listed
from faqd.train.data.memory import refuse_beyond_memory
from faqd.train.data.options import DataOptions, fitted, preprocess_of
from faqd.train.data.pictures import HEAD, PictureFiles, Pictures
from faqd.train.data.split import Split, cut, keys_of, shares_of, split_by_content, split_by_files

IN_MEMORY = 2**30
"""Bytes of pixels: a folder with more is decoded picture by picture, in every epoch anew."""
REPORTED, FEWEST_REPORTED = 2**28, 500
"""Bytes of pixels in the eval split of such a folder, but so many images at least: a bundle holds them."""
LOOKED_AT = 10_000
"""Of more files not each one is looked at before training: neither for its split nor for whether it decodes."""
BROKEN_PERCENT = 5
"""Refused: of the first pictures of such a folder; a sample of 512 cannot tell 1 % from less."""

Classes = tuple[str, ...] | None
Labels = NDArray[np.int64] | None


@dataclass(frozen=True)
class Folder:
    """splits: evaluation, unless other images evaluate, select and train. files: the list in words. skipped: what
    cannot be read, of few files."""

    preprocess: Preprocess
    classes: Classes
    splits: list[Split]
    skipped: tuple[str, ...]
    files: str


def read_folder(options: DataOptions, folder: Path, with_labels: bool, say: Say) -> Folder:
    """The images of `folder` in three splits, which depend on the files and not on how much memory there is."""
    files = listed(folder)
    # Names of folders are looked at wherever they count in the end: an export has labels, a distillation has none.
    named = options.labels and (with_labels or options.evaluation is None)
    classes_of = class_names(folder, files.names()) if named else None
    names = classes_of if with_labels else None
    classes = None if names is None else tuple(sorted(set(names)))
    labels = None if names is None or classes is None else np.searchsorted(classes, names).astype(np.int64)
    preprocess = preprocess_of(options, (1, 1), "rgb")
    if options.image_size is None:
        return _as_they_are(files, preprocess, classes, labels, shares_of(options), say)
    size = (preprocess.height, preprocess.width, len(preprocess.mean))
    refuse_beyond_memory(options.source, min(len(files), HEAD), *size)
    is_large = len(files) * int(np.prod(size)) > IN_MEMORY
    shares, skipped = shares_of(options), tuple[str, ...]()
    if len(files) > LOOKED_AT:
        parts = split_by_files(files, *shares)
    elif is_large:
        parts, skipped = _looked_at(files, preprocess, shares, say)
    else:
        read = read_images(folder, files.names(), preprocess.fit, say)
        return _small(files, preprocess, classes, labels, shares, read.pixels, read)
    if options.evaluation is None:
        parts[0] = parts[0][: max(FEWEST_REPORTED, REPORTED // int(np.prod(size)))]
    splits = [
        Split(Pictures(PictureFiles(files, part, preprocess.fit), size), None if labels is None else labels[part])
        for part in parts
    ]
    if options.evaluation is None:
        splits[0] = replace(splits[0], names=np.array([files.name(index) for index in parts[0]]))
    if not is_large:
        splits = [_in_memory(split, say) for split in splits]
    else:
        _look_at_first(splits[-1], say)
    return Folder(preprocess, classes, splits, skipped, files.in_words())


def _as_they_are(
    files: ListedFiles,
    preprocess: Preprocess,
    classes: Classes,
    labels: Labels,
    shares: Sequence[float],
    say: Say,
) -> Folder:
    """A small folder without --image-size: its images have one, which the first tells."""

    def unchanged(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if len(files) * image.nbytes > IN_MEMORY:
            raise _needs_size(files)
        return image

    if len(files) > LOOKED_AT:
        raise _needs_size(files)
    read = read_images(files.folder, files.names(), unchanged, say)
    preprocess = replace(preprocess, height=read.pixels.shape[1], width=read.pixels.shape[2])
    return _small(files, preprocess, classes, labels, shares, fitted(preprocess, read.pixels), read)


def _needs_size(files: ListedFiles) -> UserError:
    return UserError(
        f"{files.folder}: {len(files):,} images are too many to look at each for its size; say with --image-size what "
        "they are brought to."
    )


def _small(
    files: ListedFiles,
    preprocess: Preprocess,
    classes: Classes,
    labels: Labels,
    shares: Sequence[float],
    pixels: NDArray[np.uint8],
    read: Images,
) -> Folder:
    names = np.array([files.name(index) for index in read.kept])
    pool = Split(pixels, None if labels is None else labels[read.kept], names)
    return Folder(preprocess, classes, split_by_content(pool, *shares), read.skipped, files.in_words())


def _looked_at(
    files: ListedFiles, preprocess: Preprocess, shares: Sequence[float], say: Say
) -> tuple[list[NDArray[np.int64]], tuple[str, ...]]:
    """The splits that `_small` would make, as indices; of each image only its hash is kept."""
    findings = Findings()
    kept: list[int] = []
    keys: list[NDArray[np.uint64]] = []
    for index, image in each_image(files.folder, files.names(), preprocess.fit, findings, say):
        kept.append(index)
        keys.append(keys_of([np.ascontiguousarray(image)]))
    places, hashes = np.array(kept), np.concatenate(keys)
    return [places[part] for part in cut(hashes, hashes, *shares)], tuple(findings.broken)


def _in_memory(split: Split, say: Say) -> Split:
    """The same split, decoded; told is what was passed over, and how far it is."""
    pictures = split.pixels
    assert isinstance(pictures, Pictures)
    pixels = np.empty(pictures.shape, np.uint8)
    folder, done = pictures.files.files.folder, 0
    for start in range(0, len(pixels), REPORT_EVERY):
        pixels[start : start + REPORT_EVERY] = pictures[start : start + REPORT_EVERY]
        done += len(pixels[start : start + REPORT_EVERY])
        say(f"{folder}: {done:,} of {len(pixels):,} images read.")
    pictures.findings.refuse_many_broken(folder, len(pixels))
    if passed_over := pictures.in_words():
        say(passed_over)
    pictures.findings.tell_strange(folder, len(pixels), say)
    return Split(pixels, split.labels, None if pictures.findings.broken else split.names)


def _look_at_first(split: Split, say: Say) -> None:
    """What is wrong with so many images would show in the first."""
    pictures = split.pixels
    assert isinstance(pictures, Pictures)
    count, folder = len(pictures[:HEAD]), pictures.files.files.folder
    pictures.findings.refuse_many_broken(folder, count, BROKEN_PERCENT)
    pictures.findings.tell_strange(folder, count, say)
    say(
        f"{folder}: {len(pictures.files.files):,} images are more than stay in memory; those that train, "
        f"{len(pictures):,}, are decoded when an iteration needs them."
    )
