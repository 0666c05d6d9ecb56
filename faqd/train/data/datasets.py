"""The data sets that a teacher and its student are trained on, split the same way for both.

Images are held in memory as uint8; where they are too many for that, they are decoded when they are asked for. Labels
are read only where `with_labels` says so: nothing that a student sees, the order of its images included, can depend on
them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from faqd.errors import UserError
from faqd.preprocess import Preprocess
from faqd.train.data import cifar
from faqd.train.data import image_files as images
from faqd.train.data.evaluation import read_evaluation, without_copies
from faqd.train.data.listed_files import chosen
from faqd.train.data.listing import Listing
from faqd.train.data.npz_files import read_npz
from faqd.train.data.options import DataOptions, fitted, preprocess_of
from faqd.train.data.pool import read_pool
from faqd.train.data.sources.open import STREAMED, open_source
from faqd.train.data.split import SHARE, Split, shares_of, split_by_content

Say = Callable[[str], None]

DEFAULT_ROOT = Path("data")
"""Where published data sets are looked for without `--data-root`."""

# Per channel over the training pixels, in units of a pixel range 0..1.
DIGITS_MEAN_STD = ((0.3051,), (0.3760,))
CIFAR_MEAN_STD = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
TINY_IMAGENET_MEAN_STD = ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821))


@dataclass(frozen=True)
class Augmentation:
    """What may be done to a training image of this data set: a random crop out of a black frame, a mirroring.

    pad: pixels of the frame on every side. flip: mirrored left to right half of the time.
    """

    pad: int = 0
    flip: bool = False


@dataclass(frozen=True)
class Dataset:
    """One data set, cut into what trains, what selects the model and what is reported.

    classes: names, None where the source has none or they were not read. skipped: image files that do not decode.
    files: what tells a list of images from another. eval_files: the list that `eval` was taken of, where it has names.
    """

    source: str
    preprocess: Preprocess
    classes: tuple[str, ...] | None
    train: Split
    select: Split
    eval: Split
    augmentation: Augmentation
    skipped: tuple[str, ...]
    files: str | None = None
    eval_files: Listing | None = None


def load_dataset(
    options: DataOptions, *, with_labels: bool | Literal["eval"], say: Say = lambda _: None, trained: bool = False
) -> Dataset:
    """The data set that `options` names; UserError says what is missing or wrong with it.

    with_labels=False never reads a label, of no split. True gives the labels that there are: those of a folder
    without `labels`, or of an npz file that has none, stay None. "eval" does so for images that evaluate alone, where
    they have a source of their own. trained: on this data set without such a source, before it was named.
    """
    kind, _, where = options.source.partition(":")
    if kind not in _LOADERS or (kind not in PUBLISHED_KINDS) != bool(where):
        known = ", ".join(name + (":PATH" if name not in PUBLISHED_KINDS else "") for name in _LOADERS)
        raise UserError(f"--data {options.source}: no such source; expected one of {known}.")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"limit of training images {options.limit}: expected 1 or more.")
    of_all = bool(with_labels) if options.evaluation is None else with_labels is True
    dataset = _LOADERS[kind](replace(options, evaluation=None) if trained else options, where, of_all, say)
    if options.evaluation is not None:
        dataset = _with_evaluation(dataset, options, bool(with_labels), trained, say)
    return dataset if options.limit is None else replace(dataset, train=dataset.train.at(slice(options.limit)))


def _with_evaluation(dataset: Dataset, options: DataOptions, with_labels: bool, trained: bool, say: Say) -> Dataset:
    """The data set with evaluation images of their own: none of them trains or selects, or has done so."""
    assert options.evaluation is not None
    read = read_evaluation(options, dataset.preprocess, dataset.classes, with_labels, say)
    learned = {name: getattr(dataset, name) for name in ("train", "select")}
    in_memory = {name: split for name, split in learned.items() if isinstance(split.pixels, np.ndarray)}
    found, evaluation = 0, read.split
    for name, split in in_memory.items():
        if trained:
            kept = without_copies(evaluation, split)
            found, evaluation = found + len(evaluation) - len(kept), kept
        else:
            learned[name] = without_copies(split, evaluation)
            found += len(split) - len(learned[name])
    if found:
        did = "were learned from, and do not evaluate" if trained else f"are in {options.source} too, and only evaluate"
        say(f"--eval-data {options.evaluation}: {found:,} of its images {did}.")
    if empty := [name for name, split in {**learned, "eval": evaluation}.items() if not len(split)]:
        raise UserError(
            f"--eval-data {options.evaluation}: has the images of {options.source}, so that none is left "
            f"{'to evaluate on' if empty == ['eval'] else 'to learn from'}; give others."
        )
    return replace(
        dataset,
        train=learned["train"],
        select=learned["select"],
        eval=evaluation,
        eval_files=None if evaluation.names is None else read.files,
        classes=read.classes or dataset.classes,
        skipped=(*dataset.skipped, *read.skipped),
    )


def labelled_if_possible(options: DataOptions, say: Say, *, trained: bool = False) -> Dataset:
    """Data that were learned from without labels, which nobody looked at: what is wrong with them is told. trained: as
    `load_dataset` has it."""
    try:
        return load_dataset(options, with_labels="eval", say=say, trained=trained)
    except UserError as error:
        dataset = load_dataset(options, with_labels=False, say=say, trained=trained)
        say(f"The bundle is written without labels: {error}")
        return dataset


def _digits(options: DataOptions, where: str, with_labels: bool, say: Say) -> Dataset:
    # Imported here because it takes a second, which the other sources need not pay.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # The scanner's counts are 0..16.
    grey_NHW = np.rint(bunch.images * 255 / 16).astype(np.uint8)
    preprocess = preprocess_of(options, (8, 8), "grey", DIGITS_MEAN_STD)
    labels = bunch.target.astype(np.int64) if with_labels else None
    pool = Split(fitted(preprocess, grey_NHW[..., None]), labels)
    # Fixed, and by RandomState: its stream is frozen, while that of numpy's Generator may change.
    evaluation, select, train = np.split(np.random.RandomState(0).permutation(len(pool)), [500, 630])
    return Dataset(
        source=options.source,
        preprocess=preprocess,
        classes=tuple("0123456789"),
        train=pool.at(train),
        select=pool.at(select),
        eval=pool.at(evaluation),
        # A mirrored digit is another sign.
        augmentation=Augmentation(pad=preprocess.height // 8, flip=False),
        skipped=(),
    )


def _cifar(options: DataOptions, where: str, with_labels: bool, say: Say) -> Dataset:
    root = options.root or DEFAULT_ROOT
    published = cifar.load_cifar(options.source, root, download=options.download, with_labels=with_labels, say=say)
    preprocess = preprocess_of(options, (32, 32), "rgb", CIFAR_MEAN_STD[options.source])
    pool, test = (Split(fitted(preprocess, images), labels) for images, labels in published.batches)
    select, train = split_by_content(pool, SHARE)
    return Dataset(
        source=options.source,
        preprocess=preprocess,
        classes=published.classes,
        train=train,
        select=select,
        eval=test,
        # 4 of 32 pixels, the usual recipe of residual networks on CIFAR.
        augmentation=Augmentation(pad=preprocess.height // 8, flip=True),
        skipped=(),
    )


def _tiny_imagenet(options: DataOptions, where: str, with_labels: bool, say: Say) -> Dataset:
    files = images.find_tiny_imagenet(options.root or DEFAULT_ROOT)
    preprocess = preprocess_of(options, (64, 64), "rgb", TINY_IMAGENET_MEAN_STD)
    code_of = {wnid: code for code, wnid in enumerate(files.classes)}
    pools: list[Split] = []
    skipped: list[str] = []
    for listed, wnids in ((files.train, files.train_wnids), (files.val, files.val_wnids)):
        read = images.read_images(chosen(files.folder, listed), preprocess.fit, say)
        labels = np.array([code_of[wnids[i]] for i in read.kept], np.int64) if with_labels else None
        pools.append(Split(read.pixels, labels))
        skipped += read.skipped
    select, train = split_by_content(pools[0], SHARE)
    return Dataset(
        source=options.source,
        preprocess=preprocess,
        classes=files.classes,
        train=train,
        select=select,
        eval=pools[1],
        # An eighth of the side, the same relative shift as 4 pixels on CIFAR; photographs may be mirrored.
        augmentation=Augmentation(pad=preprocess.height // 8, flip=True),
        skipped=tuple(skipped),
    )


def _streamed(options: DataOptions, where: str, with_labels: bool, say: Say) -> Dataset:
    opened = open_source(
        options.source.partition(":")[0],
        where,
        with_labels=with_labels,
        by_folders=options.labels,
        # Names of folders are looked at wherever they count in the end: an export has labels, a distillation has none.
        refuses_labels=options.evaluation is None,
        say=say,
    )
    read = read_pool(options, opened, say)
    dataset = _unpublished(options, read.preprocess, read.classes, read.splits, read.skipped)
    return replace(dataset, files=read.files, eval_files=opened.files if opened.files.is_named else None)


def _npz(options: DataOptions, where: str, with_labels: bool, say: Say) -> Dataset:
    pixels, labels, classes = read_npz(Path(where).expanduser(), with_labels=with_labels)
    preprocess = preprocess_of(options, pixels.shape[1:3], "grey" if pixels.shape[3] == 1 else "rgb")
    pool = Split(fitted(preprocess, pixels), labels)
    return _unpublished(options, preprocess, classes, split_by_content(pool, *shares_of(options)), ())


_LOADERS: dict[str, Callable[[DataOptions, str, bool, Say], Dataset]] = {
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "tiny-imagenet": _tiny_imagenet,
    "npz": _npz,
    **dict.fromkeys(STREAMED, _streamed),
}
PUBLISHED_KINDS = ("digits", "cifar10", "cifar100", "tiny-imagenet")
"""What is named without a path."""


def _unpublished(
    options: DataOptions,
    preprocess: Preprocess,
    classes: tuple[str, ...] | None,
    splits: list[Split],
    skipped: tuple[str, ...],
) -> Dataset:
    *evaluation, select, train = splits
    # Half the usual shift, and no mirroring: whether a mirrored image is still one of its kind (text, road signs,
    # organs are not) is known only to who knows the domain.
    augmentation = Augmentation(pad=preprocess.height // 16, flip=False)
    # Without a part of its own it is what --eval-data names, which follows.
    reported = evaluation[0] if evaluation else select
    return Dataset(options.source, preprocess, classes, train, select, reported, augmentation, skipped)
