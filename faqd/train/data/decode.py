"""One picture: decoded, upright, RGB, or what its file is instead."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ScaledSize = Callable[[int, int], tuple[int, int]]
"""Of the height and width of an upright picture: what it will be scaled to."""
REDUCTIONS, LEAST_OF_SCALED = (8, 4, 2), 2
"""What JPEG decoders can reduce a side by, and how many times the size that a picture is scaled to must be left."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""Pillow's other decoders stay closed: they are many, old and seldom what a user means."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image upright, by its EXIF orientation."""
TURNED_ASIDE = 5
"""From this orientation on width and height change places."""
ORIENTATION = 274
"""The EXIF tag of that."""
BRIGHT_SHARE = 1e-3
"""So many of an image's values may be brighter than what it is said to reach: sensors have hot pixels."""
_KINDS = (
    (rb"GIF8", "GIF files"),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "TIFF files"),
    (rb".{4}ftyp.*avi[fs]", "AVIF files"),
    (rb".{4}ftyp(he[iv][cxms]|mif1|msf1)", "HEIC files"),
    (rb".{4}ftyp", "films"),
    (rb"\0\0\0\x0cJXL |\xff\x0a", "JPEG XL files"),
    (rb"\0\0\0\x0cjP  ", "JPEG 2000 files"),
    (rb"%PDF", "PDF documents"),
    (rb"\s*<svg|\s*<\?xml", "drawings in SVG or XML"),
    (rb"(\xef\xbb\xbf)?\s*<", "web pages"),
    (rb"version https://git-lfs", "pointers of Git LFS (run `git lfs pull`)"),
)
"""What begins so, among what is found under the names of images."""


@dataclass(frozen=True)
class Picture:
    """pixels: (H, W, 3) uint8, RGB, upright. shows: whether some of it is not transparent. deep: of a file of 16 bits,
    the upper 8 of the value that no pixel passes but hot ones."""

    pixels: NDArray[np.uint8]
    shows: bool
    deep: int | None

    def without_pixels(self) -> Picture:
        return replace(self, pixels=np.empty((0, 0, 3), np.uint8))


def read_picture(file: Path | bytes, scaled: ScaledSize | None = None) -> Picture:
    """One image file, or what is in it, turned as its EXIF orientation says. scaled: a JPEG may be decoded at a part of
    its size, where that is far beyond what it will be scaled to."""
    with Image.open(_opened(file), formats=FORMATS) as opened:
        if scaled is not None and opened.format == "JPEG":
            _reduce(opened, scaled)
        # Asked before it is decoded: of 16-bit colour Pillow keeps the high bytes and forgets that there were others.
        is_deep = opened.mode.startswith("I") or any("16" in str(tile.args) for tile in opened.tile)
        image = _upright(opened)
        if image.mode.startswith("I"):
            # 16-bit grey: the high byte, as Pillow reads 16-bit colour; its own conversion clips at 255.
            high = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
            return Picture(np.repeat(high[..., None], 3, axis=2), True, _reach(high))
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA")
        shows = "A" not in image.getbands() or image.getchannel("A").getbbox() is not None
        # Drops transparency instead of choosing a background: that is what the common training loaders do, so it
        # is what the teacher saw.
        pixels = np.asarray(image.convert("RGB"))
        return Picture(pixels, shows, _reach(pixels) if is_deep else None)


def _reduce(opened: Image.Image, scaled: ScaledSize) -> None:
    """Let the decoder leave out what scaling would take away. Not where a side is no multiple of the reduction: the
    last pixels would stand for another part of the picture than the others, which shifts all of them."""
    (width, height), turned = opened.size, _turned_aside(opened)
    wanted = scaled(width, height)[::-1] if turned else scaled(height, width)
    for by in REDUCTIONS:
        left = min(height / by / wanted[0], width / by / wanted[1])
        if left >= LEAST_OF_SCALED and not width % by and not height % by:
            opened.draft(None, (width // by, height // by))
            return


def _reach(pixels: NDArray[np.uint8]) -> int:
    return int(np.partition(pixels.ravel(), last := int((1 - BRIGHT_SHARE) * (pixels.size - 1)))[last])


def size_of_picture(file: Path | bytes) -> tuple[int, int]:
    """(height, width) of an image file that decodes, upright; only its metadata are read."""
    with Image.open(_opened(file), formats=FORMATS) as opened:
        return (opened.width, opened.height) if _turned_aside(opened) else (opened.height, opened.width)


def _turned_aside(opened: Image.Image) -> bool:
    try:
        return bool(opened.getexif().get(ORIENTATION, 1) >= TURNED_ASIDE)
    except Exception:  # of metadata that are damaged, nearly anything
        return False


def _opened(file: Path | bytes) -> Path | BinaryIO:
    return file if isinstance(file, Path) else io.BytesIO(file)


def _upright(opened: Image.Image) -> Image.Image:
    """`opened` turned by the one tag that says how, whatever else its metadata hold: nothing of them is kept."""
    try:
        opened.load()  # behind the pixels a PNG may have more metadata
        for xmp in ("xmp", "XML:com.adobe.xmp"):  # getexif() looks there too; tools that turn pixels leave it as it was
            opened.info.pop(xmp, None)
        turn = TURNS.get(opened.getexif().get(ORIENTATION, 1))
    except Exception:  # of metadata that are damaged, nearly anything
        turn = None
    return opened.transpose(turn) if turn is not None else opened


def decoded(file: Path | bytes, scaled: ScaledSize | None = None) -> Picture | str:
    """The picture, as `read_picture` has it, or what is wrong with its file. OSError where a system fails to read
    it, which may pass."""
    if isinstance(file, Path) and not file.is_file():
        return "are no files, or links that lead nowhere"
    try:
        return read_picture(file, scaled)
    except Image.DecompressionBombError:
        assert Image.MAX_IMAGE_PIXELS is not None
        return f"have more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, which is too large"
    # Pillow's decoders raise almost anything on a damaged file: SyntaxError, struct.error, EOFError, IndexError.
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        return _other_kind(file) or "do not decode"


def _other_kind(file: Path | bytes) -> str | None:
    """What a file is that only has the name of an image of FORMATS."""
    with file.open("rb") if isinstance(file, Path) else io.BytesIO(file) as stream:
        head = stream.read(32)
    if not head:
        return "are empty files"
    kind = next((kind for begin, kind in _KINDS if re.match(begin, head, re.DOTALL)), None)
    return f"are {kind} by their content, whatever their names end in" if kind else None
