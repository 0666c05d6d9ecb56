"""What `faqd-train distill --decode reduced` makes of photographs: how far their pixels move, and how many a second.

`python -m faqd.benchmarks.studies.reduced_decoding --photographs FOLDER --json FILE` cuts JPEG files to multiples of 8
pixels, encodes them again with quality 92, and brings each to several sizes from the whole and from the reduced one.
"""

from __future__ import annotations

import io
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, get_args

import click
import numpy as np
import PIL
from PIL import Image

from faqd import __version__
from faqd.benchmarks.measure.environment import environment
from faqd.command import emit_json, json_option, run
from faqd.errors import UserError
from faqd.preprocess import Preprocess, Resize
from faqd.train.data.decode import REDUCTIONS, read_picture
from faqd.train.data.listed_files import listed

VERSION = 1
QUALITY = 92
MULTIPLE = max(REDUCTIONS)


def photographs(folder: Path) -> Iterator[bytes]:
    files = listed(folder)
    for index in range(len(files)):
        with Image.open(files.path(index)) as opened:
            if opened.format != "JPEG":
                continue
            width, height = (side // MULTIPLE * MULTIPLE for side in opened.size)
            file = io.BytesIO()
            if width and height:
                opened.convert("RGB").crop((0, 0, width, height)).save(file, "JPEG", quality=QUALITY)
                yield file.getvalue()


def compared(contents: Sequence[bytes], size: int, resize: Resize) -> dict[str, Any] | None:
    """Of the photographs that are reduced for this size: differences in levels of 255, photographs a second."""
    preprocess = Preprocess(size, size, (0.0,) * 3, (1.0,) * 3, resize)
    most, rms, seconds = [], [], {"full": 0.0, "reduced": 0.0}
    for content in contents:
        if read_picture(content, preprocess.scaled_size).pixels.shape == read_picture(content).pixels.shape:
            continue
        fitted = {}
        for how, scaled in (("full", None), ("reduced", preprocess.scaled_size)):
            began = time.perf_counter()
            fitted[how] = preprocess.fit(read_picture(content, scaled).pixels).astype(int)
            seconds[how] += time.perf_counter() - began
        difference = fitted["reduced"] - fitted["full"]
        most.append(int(np.abs(difference).max()))
        rms.append(float(np.sqrt((difference**2).mean())))
    if not most:
        return None
    return {
        "size": size,
        "resize": resize,
        "photographs": len(most),
        "most": {"median": median(most), "largest": max(most)},
        "rms": {"median": round(median(rms), 3), "largest": round(max(rms), 3)},
        "per_second": {how: round(len(most) / taken, 1) for how, taken in seconds.items()},
    }


@click.command(help=(__doc__ or "").splitlines()[0])
@json_option
@click.option(
    "--photographs", "folder", type=click.Path(path_type=Path), required=True, help="Take JPEG files of here."
)
@click.option(
    "--size", "sizes", multiple=True, type=int, default=(224, 112, 64, 32), show_default=True, help="Bring to."
)
def command(json_target: str | None, folder: Path, sizes: tuple[int, ...]) -> None:
    contents = list(photographs(folder))
    rows = [compared(contents, size, resize) for size in sizes for resize in get_args(Resize)]
    found = [row for row in rows if row is not None]
    if not found:
        raise UserError(
            f"{folder}: none of {len(contents)} JPEG files is large enough to be reduced; give larger ones."
        )
    result = {
        "version": VERSION,
        "what": "JPEG files at a part of their size against the whole, both brought to the same size",
        "command": shlex.join(["python", "-m", "faqd.benchmarks.studies.reduced_decoding", *sys.argv[1:]]),
        "environment": environment(),
        "versions": {"faqd": __version__, "pillow": PIL.__version__},
        "files": len(contents),
        "rows": found,
    }
    emit_json(json_target, result)


def main() -> None:
    run(command)


if __name__ == "__main__":
    main()
