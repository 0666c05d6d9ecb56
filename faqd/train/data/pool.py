"""Images as a pool that is cut into splits: decoded whole, or picture by picture where they are too many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from faqd.errors import UserError
from faqd.preprocess import Preprocess
from faqd.train.data.findings import Findings
from faqd.train.data.image_files import REPORT_EVERY, Images, each_image, read_images
from faqd.train.data.listing import Listing, Say
from faqd.train.data.memory import refuse_beyond_memory
from faqd.train.data.options import DataOptions, fitted, preprocess_of
from faqd.train.data.pictures import HEAD, PictureFiles, Pictures
from faqd.train.data.sources.opened import Classes, Labels, Opened
from faqd.train.data.split import Split, cut, keys_of, shares_of, split_by_content, split_by_files

IN_MEMORY = 2**30
"""Bytes of pixels: more are decoded picture by picture, in every epoch anew."""
REPORTED, FEWEST_REPORTED = 2**28, 500
"""Bytes of pixels in the eval split of so many images, but so many images at least: a bundle holds them."""
LOOKED_AT = 10_000
"""Of more images not each one is looked at before training: neither for its split nor for whether it decodes."""
BROKEN_PERCENT = 5
"""Refused: of the first pictures of so many; a sample of 512 cannot tell 1 % from less."""


@dataclass(frozen=True)
class Pool:
    """splits: evaluation, unless other images evaluate, select and train. files: the list in words. skipped: what
    cannot be read, of few images."""

    preprocess: Preprocess
    classes: Classes
    splits: list[Split]
    skipped: tuple[str, ...]
    files: str


def read_pool(options: DataOptions, opened: Opened, say: Say) -> Pool:
    """The images of a source in three splits, which depend on the images and not on how much memory there is."""
    files, labels, classes = opened.files, opened.labels, opened.classes
    preprocess = preprocess_of(options, opened.size or (1, 1), opened.channels)
    shares = shares_of(options)
    if options.image_size is None and opened.size is None:
        return _as_they_are(files, preprocess, classes, labels, shares, say)
    size = (preprocess.height, preprocess.width, len(preprocess.mean))
    refuse_beyond_memory(options.source, min(len(files), HEAD), *size)
    is_large, skipped = is_beyond_memory(files, preprocess), tuple[str, ...]()
    if len(files) > LOOKED_AT and not files.is_quick:
        parts = split_by_files(files, *shares, say=say)
    elif is_large:
        parts, skipped = _looked_at(files, preprocess, shares, say)
    else:
        read = read_images(files, preprocess.fit, say)
        return _small(files, preprocess, classes, labels, shares, read.pixels, read)
    if options.evaluation is None:
        parts[0] = parts[0][: max(FEWEST_REPORTED, REPORTED // int(np.prod(size)))]
    splits = [streamed(files, part, preprocess, labels) for part in parts]
    if options.evaluation is None and files.is_named:
        splits[0] = replace(splits[0], names=np.array([files.name(index) for index in parts[0]]))
    if not is_large:
        splits = [_in_memory(split, say) for split in splits]
    else:
        _look_at_first(splits[-1], say)
    return Pool(preprocess, classes, splits, skipped, files.in_words())


def is_beyond_memory(files: Listing, preprocess: Preprocess) -> bool:
    """Whether images of that size are decoded when they are asked for, whatever this machine has."""
    return len(files) * preprocess.height * preprocess.width * len(preprocess.mean) > IN_MEMORY


def streamed(files: Listing, part: NDArray[np.int64], preprocess: Preprocess, labels: Labels) -> Split:
    """Images by their numbers, none of them decoded yet."""
    size = (preprocess.height, preprocess.width, len(preprocess.mean))
    pictures = Pictures(PictureFiles(files, part, preprocess.fit, preprocess.scaled_size), size)
    return Split(pictures, None if labels is None else labels[part])


def _as_they_are(
    files: Listing,
    preprocess: Preprocess,
    classes: Classes,
    labels: Labels,
    shares: Sequence[float],
    say: Say,
) -> Pool:
    """A few images without --image-size: they have one, which the first tells."""

    def unchanged(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if len(files) * image.nbytes > IN_MEMORY:
            raise _needs_size(files)
        return image

    if len(files) > LOOKED_AT:
        raise _needs_size(files)
    read = read_images(files, unchanged, say)
    preprocess = replace(preprocess, height=read.pixels.shape[1], width=read.pixels.shape[2])
    return _small(files, preprocess, classes, labels, shares, fitted(preprocess, read.pixels), read)


def _needs_size(files: Listing) -> UserError:
    return UserError(
        f"{files.title}: {len(files):,} images are too many to look at each for its size; say with --image-size what "
        "they are brought to."
    )


def _small(
    files: Listing,
    preprocess: Preprocess,
    classes: Classes,
    labels: Labels,
    shares: Sequence[float],
    pixels: NDArray[np.uint8],
    read: Images,
) -> Pool:
    names = np.array([files.name(index) for index in read.kept]) if files.is_named else None
    pool = Split(pixels, None if labels is None else labels[read.kept], names)
    return Pool(preprocess, classes, split_by_content(pool, *shares), read.skipped, files.in_words())


def _looked_at(
    files: Listing, preprocess: Preprocess, shares: Sequence[float], say: Say
) -> tuple[list[NDArray[np.int64]], tuple[str, ...]]:
    """The splits that `_small` would make, as indices; of each image only its hash is kept."""
    findings = Findings()
    kept: list[int] = []
    keys: list[NDArray[np.uint64]] = []
    for index, image in each_image(files, preprocess.fit, findings, say):
        kept.append(index)
        keys.append(keys_of([np.ascontiguousarray(image)]))
    places, hashes = np.array(kept), np.concatenate(keys)
    return [places[part] for part in cut(hashes, hashes, *shares)], tuple(findings.broken)


def _in_memory(split: Split, say: Say) -> Split:
    """The same split, decoded; told is what was passed over, and how far it is."""
    pictures = split.pixels
    assert isinstance(pictures, Pictures)
    pixels = np.empty(pictures.shape, np.uint8)
    title, done = pictures.files.files.title, 0
    # As they are stored: neighbours may have to be read together.
    stored = np.argsort(pictures.files.index, kind="stable")
    for start in range(0, len(pixels), REPORT_EVERY):
        positions = stored[start : start + REPORT_EVERY]
        pixels[positions] = pictures[positions]
        done += len(positions)
        say(f"{title}: {done:,} of {len(pixels):,} images read.")
    pictures.findings.refuse_many_broken(title, len(pixels))
    if passed_over := pictures.in_words():
        say(passed_over)
    pictures.findings.tell_strange(title, len(pixels), say)
    return Split(pixels, split.labels, None if pictures.findings.broken else split.names)


def _look_at_first(split: Split, say: Say) -> None:
    """What is wrong with so many images would show in the first."""
    pictures = split.pixels
    assert isinstance(pictures, Pictures)
    count, title = len(pictures[:HEAD]), pictures.files.files.title
    pictures.findings.refuse_many_broken(title, count, BROKEN_PERCENT)
    pictures.findings.tell_strange(title, count, say)
    say(
        f"{title}: {len(pictures.files.files):,} images are more than stay in memory; those that train, "
        f"{len(pictures):,}, are decoded when an iteration needs them."
    )
