"""The studies of image sources: what one writes holds the images that it says, and what another compares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faqd.benchmarks.studies.reduced_decoding import compared, photographs
from faqd.train.data.sources.open import open_source
from tests.train.test_reduced import encoded

pytest.importorskip("pyarrow")


@pytest.mark.parametrize("kind", ["folder", "shards", "parquet", "arrow", "npy"])
def test_every_source_holds_the_files_in_turn(kind: str, tmp_path: Path) -> None:
    from faqd.benchmarks.studies import streamed_sources

    files = []
    for number in range(3):
        files.append(tmp_path / f"{number}.jpg")
        Image.new("RGB", (224, 224), (80 * number, 0, 0)).save(files[-1])
    (tmp_path / "source").mkdir()
    source, _, where = streamed_sources.WRITERS[kind](tmp_path / "source", files, 7).partition(":")
    listing = open_source(source, where, with_labels=False, by_folders=False, refuses_labels=False, say=print).files
    pictures = [listing.picture(index) for index in range(len(listing))]
    reds = [
        None if isinstance(picture, str) else round(float(picture.pixels[..., 0].mean()) / 80) for picture in pictures
    ]
    assert reds == [0, 1, 2, 0, 1, 2, 0]


def test_reduced_photographs_are_compared_with_whole_ones(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(91, 130, seed=number))
    (tmp_path / "small.jpg").write_bytes(encoded(16, 16))
    (tmp_path / "other.png").write_bytes(encoded(96, 96, "PNG"))
    contents = list(photographs(tmp_path))
    assert len(contents) == 4
    row = compared(contents, 16, "stretch")
    assert row is not None and row["photographs"] == 3
    assert 0 < row["rms"]["median"] <= row["rms"]["largest"] <= row["most"]["largest"] < 64
    assert all(np.isfinite(rate) for rate in row["per_second"].values()) and compared(contents, 64, "stretch") is None
