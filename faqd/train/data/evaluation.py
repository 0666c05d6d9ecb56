"""Evaluation images of the user's own, apart from those that are learned from: `--eval-data`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.errors import UserError
from faqd.preprocess import Preprocess
from faqd.train.data.image_files import class_names, read_images
from faqd.train.data.listed_files import listed
from faqd.train.data.memory import refuse_beyond_memory
from faqd.train.data.npz_files import read_npz
from faqd.train.data.options import DataOptions, fitted
from faqd.train.data.split import Split, keys_of

Say = Callable[[str], None]
Classes = tuple[str, ...] | None


@dataclass(frozen=True)
class EvaluationImages:
    """classes: what labels count, None where there are none. skipped: files that do not decode."""

    split: Split
    classes: Classes
    skipped: tuple[str, ...]


def read_evaluation(
    options: DataOptions, preprocess: Preprocess, known: Classes, with_labels: bool, say: Say
) -> EvaluationImages:
    """All images of `options.evaluation`, fitted as the others are.

    known: the classes of training images, where these have labels: evaluation's are numbered as they are. UserError
    where there are others.
    """
    kind, _, where = str(options.evaluation).partition(":")
    if kind not in ("folder", "npz") or not where:
        raise UserError(f"--eval-data {options.evaluation}: expected folder:PATH or npz:PATH.")
    path = Path(where).expanduser()
    skipped: tuple[str, ...] = ()
    if kind == "npz":
        pixels, labels, classes = read_npz(path, with_labels=with_labels)
        pixels, names = fitted(preprocess, pixels), None
    else:
        split, classes, skipped = _folder(path, preprocess, with_labels and options.labels, say)
        pixels, labels, names = split.images, split.labels, split.names
    if labels is not None and classes is not None and known is not None and classes != known:
        labels, classes = _renumbered(labels, classes, known, options), known
    return EvaluationImages(Split(pixels, labels, names), classes, skipped)


def _folder(
    folder: Path, preprocess: Preprocess, with_labels: bool, say: Say
) -> tuple[Split, Classes, tuple[str, ...]]:
    files = listed(folder).names()
    refuse_beyond_memory(f"folder:{folder}", len(files), preprocess.height, preprocess.width, len(preprocess.mean))
    classes_of = class_names(folder, files) if with_labels else None
    read = read_images(folder, files, preprocess.fit, say)
    names = np.array([files[index] for index in read.kept])
    if classes_of is None:
        return Split(read.pixels, None, names), None, read.skipped
    classes = tuple(sorted(set(classes_of)))
    labels = np.searchsorted(classes, [classes_of[index] for index in read.kept]).astype(np.int64)
    return Split(read.pixels, labels, names), classes, read.skipped


def _renumbered(
    labels: NDArray[np.int64], classes: tuple[str, ...], known: tuple[str, ...], options: DataOptions
) -> NDArray[np.int64]:
    if unknown := [name for name in classes if name not in known]:
        raise UserError(
            f"--eval-data {options.evaluation}: has labels of the class {unknown[0]}, which {options.source} has not "
            f"({', '.join(known[:5])}{' ...' * (len(known) > 5)}); both need the same names of classes."
        )
    return np.array([known.index(name) for name in classes], np.int64)[labels]


def without_copies(split: Split, others: NDArray[Any]) -> Split:
    """The images of a split in memory that are not among others."""
    return split.at(~np.isin(keys_of(split.images), keys_of(others)))
