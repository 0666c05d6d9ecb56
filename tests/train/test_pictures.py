"""Picture files as cameras and tools leave them: upright, of any depth, or skipped for the reason that is true."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from faqd.errors import UserError
from faqd.train.data.datasets import load_dataset
from faqd.train.data.decode import read_picture
from faqd.train.data.image_files import read_images
from faqd.train.data.listed_files import listed
from faqd.train.data.options import DataOptions


def save(folder: Path, count: int, darker: int = 1) -> None:
    draw = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8) // darker).save(folder / f"{index}.png")


def options_of(folder: Path) -> DataOptions:
    return DataOptions(f"folder:{folder}", mean="none", std="none")


def _photographed(orientation: Any, also: bytes = b"") -> bytes:
    """A JPEG of one bright corner whose EXIF holds an orientation, and whatever else."""
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :8] = 255
    file = io.BytesIO()
    Image.fromarray(stored).save(file, "JPEG", quality=95)
    count = 1 + bool(also)
    entries = struct.pack("<HHIHH", 274, 3, 1, orientation, 0) + also
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", count) + entries + struct.pack("<I", 0)
    head, rest = file.getvalue()[:2], file.getvalue()[2:]
    return head + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + rest


@pytest.mark.parametrize(
    "also",
    [
        b"",
        struct.pack("<HHII", 305, 5, 1, 4000),  # software, as a fraction that lies beyond the end
        struct.pack("<HHII", 305, 5, 2, 8),
        struct.pack("<HHII", 34665, 4, 1, 9999),
        struct.pack("<HHI4s", 36867, 77, 4, b"\xff\xfe\0\0"),
    ],
)
def test_an_image_is_turned_whatever_else_its_metadata_hold(also: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(_photographed(6, also))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of such metadata
        read = read_picture(tmp_path / "a.jpg").pixels
    assert read.shape == (32, 16, 3) and read[:8, 8:].mean() > 200 and read[16:].mean() < 20


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_an_orientation_outside_of_exif_turns_nothing(suffix: str, tmp_path: Path) -> None:
    about = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    words = PngInfo()
    words.add_itxt("XML:com.adobe.xmp", about.decode())
    more: dict[str, Any] = {"pnginfo": words} if suffix == "png" else {"xmp": about}
    Image.new("RGB", (32, 16)).save(tmp_path / f"a.{suffix}", **more)
    assert read_picture(tmp_path / f"a.{suffix}").pixels.shape == (16, 32, 3)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_every_format_is_turned_by_its_exif(suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (32, 16)).save(tmp_path / f"a.{suffix}", exif=exif)
    assert read_picture(tmp_path / f"a.{suffix}").pixels.shape == (32, 16, 3)


OTHER_KINDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "GIF": (lambda path: Image.new("P", (8, 8)).save(path, "GIF"), "are GIF files by their content"),
    "TIFF": (lambda path: Image.new("RGB", (8, 8)).save(path, "TIFF"), "are TIFF files"),
    "AVIF": (lambda path: path.write_bytes(b"\0\0\0\x20ftypavif" + bytes(40)), "are AVIF files"),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html>"), "are web pages"),
    "a pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    "nothing": (lambda path: path.write_bytes(b""), "are empty files"),
    "a broken link": (lambda path: path.symlink_to("nowhere.png"), "are no files, or links that lead nowhere"),
    "a pipe": (lambda path: os.mkfifo(path), "are no files, or links that lead nowhere"),
    "noise": (lambda path: path.write_bytes(bytes(range(100))), "do not decode"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_file_that_is_no_image_is_called_what_it_is(kind: str, tmp_path: Path) -> None:
    make, words = OTHER_KINDS[kind]
    save(tmp_path, 10)
    make(tmp_path / "other.png")
    with pytest.raises(
        UserError, match=r"1 of 11 images .*\(other\.png\).*Repair, shrink, convert or remove"
    ) as refused:
        load_dataset(options_of(tmp_path), with_labels=False)
    assert words in str(refused.value)


@pytest.mark.parametrize("orientation", [0, 9, 60000])
def test_an_orientation_that_is_none_turns_nothing(orientation: int, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(_photographed(orientation))
    assert read_picture(tmp_path / "a.jpg").pixels.shape == (16, 32, 3)


def test_what_is_too_large_is_said_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 220)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    Image.new("1", (40, 40)).save(tmp_path / "map.png")
    (tmp_path / "torn.png").write_bytes(b"no image")
    said: list[str] = []
    options = replace(options_of(tmp_path), image_size=(8, 8))
    assert load_dataset(options, with_labels=False, say=said.append).skipped == ("map.png", "torn.png")
    assert said[0].endswith(
        "1 of 222 images have more than 1,000 pixels, which is too large (map.png), 1 of 222 images do not decode "
        "(torn.png); skipped."
    )
    for index in range(3):
        Image.new("1", (40 + index, 40)).save(tmp_path / f"map{index}.png")
    with pytest.raises(
        UserError, match=r"4 of 225 images have more than 1,000 pixels.*Repair, shrink, convert or remove them"
    ):
        load_dataset(options, with_labels=False)


def _deep_colour(path: Path, values_HWC: NDArray[np.uint16]) -> None:
    """A PNG of 16 bits in each of three colours, which Pillow reads and does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values_HWC.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values_HWC)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    whole = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + whole)


@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (10, "no pixel of the 60 images of 16 bits passes 1023, but for one in a thousand, as of 10-bit"),
        (12, "passes 4095, but for one in a thousand, as of 12-bit data"),
        (14, "14 bits, write them again with values shifted up by 2 bits"),
        (16, None),
    ],
)
def test_sixteen_bit_files_of_fewer_bits_are_told(
    bits: int, words: str | None, colour: bool, hot: bool, tmp_path: Path
) -> None:
    draw = np.random.default_rng(0)
    for index in range(60):
        values = draw.integers(0, 2**bits, (32, 32, 3), np.uint16)
        if hot:
            values[3, 5] = 65535
        if colour:
            _deep_colour(tmp_path / f"{index}.png", values)
        else:
            Image.fromarray(values[..., 0]).save(tmp_path / f"{index}.png")
    said: list[str] = []
    load_dataset(options_of(tmp_path), with_labels=False, say=said.append)
    assert [words in text for text in said if words] == [True] * bool(words) and len(said) == bool(words)


def test_dark_files_of_eight_bits_are_no_deep_ones(tmp_path: Path) -> None:
    save(tmp_path, 60, darker=64)
    said: list[str] = []
    load_dataset(options_of(tmp_path), with_labels=False, say=said.append)
    assert not said


def test_pictures_that_show_nothing_are_told(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, alpha in (("a.png", 0), ("b.png", 255), ("c.webp", 0), ("d.png", None)):
        colours = rng.integers(0, 256, (8, 8, 3), np.uint8)
        layers = [colours] if alpha is None else [colours, np.full((8, 8, 1), alpha, np.uint8)]
        Image.fromarray(np.concatenate(layers, 2)).save(tmp_path / name, lossless=True, exact=True)
    said: list[str] = []
    read_images(listed(tmp_path), None, said.append)
    (told,) = said
    assert "2 of 4 images are transparent everywhere (a.png)" in told
