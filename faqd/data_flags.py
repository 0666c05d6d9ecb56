"""Options that say where images come from, the same in every command that reads data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from faqd.command import section
from faqd.errors import UserError

data_flags = section(
    "Data",
    click.option(
        "--data",
        metavar="SOURCE",
        multiple=True,
        help="Read digits, cifar10, cifar100, tiny-imagenet, folder:PATH (any tree of images), npz:PATH, npy:PATH, "
        "shards:PATTERN (tar files), parquet:PATTERN or arrow:PATTERN; paths may be URLs such as s3://.",
    ),
    click.option(
        "--eval-data",
        metavar="SOURCE",
        help="Evaluate on folder:PATH or another source as --data has them, not on a tenth of --data; its labels are "
        "read for that alone.",
    ),
    click.option("--data-root", type=click.Path(path_type=Path), help="Look for a published data set in this folder."),
    click.option("--download", is_flag=True, help="Fetch a published data set that is not there yet."),
    click.option("--image-size", metavar="H[xW]", help="Bring images to this size in pixels."),
    click.option(
        "--resize",
        type=click.Choice(["stretch", "crop", "letterbox"]),
        show_default="stretch",
        help="Bring images to that size in this way.",
    ),
    click.option(
        "--channels", type=click.Choice(["rgb", "bgr", "grey"]), help="Feed the network channels in this order."
    ),
    click.option("--mean", metavar="M[,M,M]", help="Subtract this from pixels in 0..1, per channel; or none."),
    click.option("--std", metavar="S[,S,S]", help="Divide by this after that, per channel; or none."),
    click.option("--labels", is_flag=True, help="Take the subfolder names of folder: sources for classes."),
    click.option("--limit", type=click.IntRange(1), help="Use only so many training images, for a quick try."),
)

"""`data_values` reads them back."""


def data_values(options: dict[str, Any]) -> dict[str, Any]:
    """Take the data options out of a command's keyword arguments, as fields of train.data.options.DataOptions."""
    taken = {name: options.pop(name) for name in DATA_NAMES}
    taken["data"] = _one_source(taken["data"])
    _refuse_idle(taken)
    taken["root"] = taken.pop("data_root")
    for field, option in (("source", "data"), ("evaluation", "eval_data")):
        taken[field] = absolute_source(taken.pop(option))
    taken["image_size"] = parse_size(taken["image_size"])
    taken["mean"], taken["std"] = _numbers("--mean", taken["mean"]), _numbers("--std", taken["std"])
    return taken


def _one_source(sources: tuple[str, ...]) -> str | None:
    """`--data` may stand on the line several times only so that the second one is not the only one that counts."""
    if len(sources) > 1:
        raise UserError(
            f"--data {' and '.join(sources)}: give one source; folders can be linked into one, and it is searched "
            "through links."
        )
    return sources[0] if sources else None


def _refuse_idle(taken: dict[str, Any]) -> None:
    """UserError where an option says nothing to the source that is named."""
    if taken["data"] is None:
        return
    kind = taken["data"].partition(":")[0]
    if kind not in PUBLISHED:
        for option in ("download", "data_root"):
            if taken[option]:
                raise UserError(
                    f"--{option.replace('_', '-')}: --data {taken['data']} is no published data set to look for "
                    f"({', '.join(PUBLISHED)} are); leave it out."
                )
    if taken["labels"] and kind != "folder" and not (taken["eval_data"] or "").startswith("folder:"):
        raise UserError(f"--labels: --data {taken['data']} has no subfolders to take classes from; leave it out.")


def refuse_idle_labels(labels: bool, eval_data: str | None) -> None:
    """UserError where `--labels` is given beside an `--eval-data` that has no subfolders."""
    if labels and eval_data is not None and not eval_data.startswith("folder:"):
        raise UserError(f"--labels: --eval-data {eval_data} has no subfolders to take classes from; leave it out.")


PUBLISHED = ("cifar10", "cifar100", "tiny-imagenet")
DATA_NAMES = (
    "data",
    "eval_data",
    "data_root",
    "download",
    "image_size",
    "resize",
    "channels",
    "mean",
    "std",
    "labels",
    "limit",
)
"""The options of `data_flags`, as keyword arguments."""


MOVED_DATA = (
    click.option(
        "--data", metavar="SOURCE", show_default="where they were", help="Read the images of the run from here."
    ),
    click.option("--data-root", type=click.Path(path_type=Path), help="Look for a published data set in this folder."),
)
"""Where the images of a run are by now, for a section."""


def absolute_source(source: str | None) -> str | None:
    """The source with a path that holds from any folder, since a run remembers it; of what is no path as it is."""
    kind, _, where = (source or "").partition(":")
    if "://" in where or where.startswith("pipe:") or where == "-":
        return source
    return f"{kind}:{Path(where).expanduser().resolve()}" if where else source


def parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--image-size {text}: expected a number of pixels such as 224, or HEIGHTxWIDTH.")
    return int(parts[0]), int(parts[-1])


def _numbers(option: str, text: str | None) -> tuple[float, ...] | str | None:
    if text is None or text == "none":
        return text
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"{option} {text}: expected numbers such as 0.485,0.456,0.406, or none.")
    return numbers
