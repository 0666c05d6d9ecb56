"""Evaluation images of the user's own, apart from those that are learned from: `--eval-data`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from faqd.errors import UserError
from faqd.preprocess import Preprocess
from faqd.train.data.image_files import read_images
from faqd.train.data.listing import Listing, numbers_of
from faqd.train.data.npz_files import read_npz
from faqd.train.data.options import DataOptions, fitted
from faqd.train.data.pictures import Pictures
from faqd.train.data.pool import is_beyond_memory, streamed
from faqd.train.data.sources.open import STREAMED, open_source
from faqd.train.data.sources.opened import Classes, Opened
from faqd.train.data.split import Split, keys_of_split

Say = Callable[[str], None]


@dataclass(frozen=True)
class EvaluationImages:
    """classes: what labels count, None where there are none. skipped: files that do not decode. files: the list that
    they were taken of, None of an npz file."""

    split: Split
    classes: Classes
    skipped: tuple[str, ...]
    files: Listing | None = None


def read_evaluation(
    options: DataOptions, preprocess: Preprocess, known: Classes, with_labels: bool, say: Say
) -> EvaluationImages:
    """All images of `options.evaluation`, fitted as the others are.

    known: the classes of training images, where these have labels: evaluation's are numbered as they are. UserError
    where there are others.
    """
    kind, _, where = str(options.evaluation).partition(":")
    if kind not in ("npz", *STREAMED) or not where:
        expected = ", ".join(f"{name}:PATH" for name in ("npz", *STREAMED))
        raise UserError(f"--eval-data {options.evaluation}: expected one of {expected}.")
    if kind == "npz":
        pixels, labels, classes = read_npz(Path(where).expanduser(), with_labels=with_labels)
        read = EvaluationImages(Split(fitted(preprocess, pixels), labels), classes, ())
    else:
        opened = open_source(
            kind, where, with_labels=with_labels, by_folders=options.labels, refuses_labels=False, say=say
        )
        read = _all_of(opened, preprocess, say)
    labels, classes = read.split.labels, read.classes
    if labels is None or classes is None or known is None or classes == known:
        return read
    split = replace(read.split, labels=renumbered(labels, classes, known, options))
    return replace(read, split=split, classes=known)


def _all_of(opened: Opened, preprocess: Preprocess, say: Say) -> EvaluationImages:
    """In memory, or decoded when they are asked for where they are too many."""
    files, labels = opened.files, opened.labels
    if is_beyond_memory(files, preprocess):
        split = streamed(files, np.arange(len(files)), preprocess, labels)
        named = replace(split, names=np.array(list(map(files.name, range(len(files)))))) if files.is_named else split
        return EvaluationImages(named, opened.classes, (), files)
    read = read_images(files, preprocess.fit, say)
    names = np.array([files.name(index) for index in read.kept]) if files.is_named else None
    split = Split(read.pixels, None if labels is None else labels[read.kept], names)
    return EvaluationImages(split, opened.classes, read.skipped, files)


def renumbered(
    labels: NDArray[np.int64], classes: tuple[str, ...], known: tuple[str, ...], options: DataOptions
) -> NDArray[np.int64]:
    """Labels of `classes` as numbers of `known`; UserError where one is not among them."""
    if unknown := [name for name in classes if name not in known]:
        raise UserError(
            f"--eval-data {options.evaluation}: has labels of the class {unknown[0]}, which {options.source} has not "
            f"({', '.join(known[:5])}{' ...' * (len(known) > 5)}); both need the same names of classes."
        )
    return np.array([known.index(name) for name in classes], np.int64)[labels]


def names_and_sizes(
    split: Split, files: Listing | None
) -> tuple[NDArray[np.str_], NDArray[np.int64]] | tuple[None, None]:
    """(N,), (N, 2): of the files of decoded images, by which annotations are found, and of the pictures in them, height
    and width. None where other files were read in the place of broken ones, so that names say nothing."""
    replaced = isinstance(split.pixels, Pictures) and bool(split.pixels.findings.broken)
    if split.names is None or files is None or replaced:
        return None, None
    sizes = [files.picture_size(number) for number in numbers_of(files, split.names)]
    return split.names, np.array(sizes, np.int64).reshape(-1, 2)


def without_copies(split: Split, others: Split) -> Split:
    """The images of a split that are not among others; all of both are looked at."""
    return split.at(np.flatnonzero(~np.isin(keys_of_split(split), keys_of_split(others))))
