"""What `--data` and `--eval-data` name beside published sets: which kind of source it is, and what is in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from faqd.train.data.image_files import class_names
from faqd.train.data.listed_files import listed
from faqd.train.data.listing import Listing, Say
from faqd.train.data.sources.npy import open_npy
from faqd.train.data.sources.opened import Opened
from faqd.train.data.sources.shards import open_shards
from faqd.train.data.sources.stored import is_url

STREAMED = ("folder", "npy", "shards", "parquet", "arrow")
"""Kinds of sources whose images are decoded in training where they are too many for memory."""


def open_source(
    kind: str, where: str, *, with_labels: bool, by_folders: bool, refuses_labels: bool, say: Say
) -> Opened:
    """List the images of one of STREAMED; UserError says what is wrong with it.

    with_labels: read those that there are. by_folders: names of subfolders are classes. refuses_labels: what keeps
    such names from being classes is an error though no label is wanted yet.
    """
    if kind == "npy":
        return open_npy(where)
    if kind == "shards":
        return open_shards(where, with_labels, say)
    if kind == "parquet" or kind == "arrow":
        # Here, because the other sources need no pyarrow.
        from faqd.train.data.sources.tables import open_tables

        return open_tables("parquet" if kind == "parquet" else "arrow", where, with_labels, say)
    return _folder(_listed(where), with_labels and by_folders, by_folders and refuses_labels)


def _listed(where: str) -> Listing:
    if is_url(where):
        # Here, because a folder of this machine needs no fsspec.
        from faqd.train.data.sources.urls import listed_urls

        return listed_urls(where)
    return listed(Path(where).expanduser())


def _folder(files: Listing, with_labels: bool, refuses_labels: bool) -> Opened:
    if not with_labels and not refuses_labels:
        return Opened(files)
    names = class_names(files.title, map(files.name, range(len(files))))
    if not with_labels:
        return Opened(files)
    classes = tuple(sorted(set(names)))
    return Opened(files, np.searchsorted(classes, names).astype(np.int64), classes)
