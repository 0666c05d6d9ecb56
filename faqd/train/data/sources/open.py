"""What `--data` and `--eval-data` name beside published sets: which kind of source it is, and what is in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from faqd.train.data.image_files import class_names
from faqd.train.data.listed_files import listed
from faqd.train.data.listing import Say
from faqd.train.data.sources.opened import Opened

STREAMED = ("folder",)
"""Kinds of sources whose images are decoded in training where they are too many for memory."""


def open_source(
    kind: str, where: str, *, with_labels: bool, by_folders: bool, refuses_labels: bool, say: Say
) -> Opened:
    """List the images of one of STREAMED; UserError says what is wrong with it.

    with_labels: read those that there are. by_folders: names of subfolders are classes. refuses_labels: what keeps
    such names from being classes is an error though no label is wanted yet.
    """
    return _folder(where, with_labels and by_folders, by_folders and refuses_labels)


def _folder(where: str, with_labels: bool, refuses_labels: bool) -> Opened:
    folder = Path(where).expanduser()
    files = listed(folder)
    if not with_labels and not refuses_labels:
        return Opened(files)
    names = class_names(folder, files.names())
    if not with_labels:
        return Opened(files)
    classes = tuple(sorted(set(names)))
    return Opened(files, np.searchsorted(classes, names).astype(np.int64), classes)
