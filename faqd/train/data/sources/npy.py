"""One array of images in an npy file, of which each is read where it lies."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from faqd.errors import UserError, first_line
from faqd.train.data.decode import Picture, ScaledSize
from faqd.train.data.listed_files import State
from faqd.train.data.listing import Say
from faqd.train.data.sources.opened import Opened
from faqd.train.data.sources.stored import StoredFile, failed, one_stored_file

CHANNELS = (1, 3)
QUICK = 2**30
"""Bytes of pixels: so many are all looked at, which takes seconds since nothing is decoded."""


@dataclass(frozen=True)
class NpyImages:
    """A `Listing`. start: where the first image begins in the file. shape: (N, height, width, channels), or
    (N, channels, height, width) where channels_first."""

    file: StoredFile
    listed_state: State
    start: int
    shape: tuple[int, int, int, int]
    channels_first: bool
    is_named = False

    @property
    def title(self) -> str:
        return f"npy:{self.file.place}"

    @property
    def is_quick(self) -> bool:
        return math.prod(self.shape) <= QUICK

    def __len__(self) -> int:
        return self.shape[0]

    def name(self, index: int) -> str:
        return f"image {index}"

    def encoded_names(self) -> Iterator[bytes]:
        return (self.name(index).encode() for index in range(len(self)))

    def where(self, index: int) -> str:
        return f"{self.file.place}: {self.name(index)}"

    def sizes(self, say: Say) -> NDArray[np.int64]:
        return np.full(len(self), math.prod(self.shape[1:]), np.int64)

    def picture(self, index: int, scaled: ScaledSize | None = None) -> Picture:
        size = math.prod(self.shape[1:])
        content = self.file.read(self.start + index * size, size)
        if len(content) < size:
            raise failed(self.file.place, "it ends before this image")
        pixels = np.frombuffer(content, np.uint8).reshape(self.shape[1:])
        if self.channels_first:
            pixels = pixels.transpose(1, 2, 0)
        return Picture(np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3))), True, None)

    def picture_size(self, index: int) -> tuple[int, int]:
        return self.shape[2:] if self.channels_first else self.shape[1:3]

    def is_as_listed(self, index: int) -> bool:
        return self.file.state() == self.listed_state

    def in_words(self) -> str:
        digest = hashlib.sha256(repr((self.start, self.shape, self.listed_state)).encode()).hexdigest()
        return f"{len(self):,} images of one array, {digest[:16]}"


def open_npy(where: str) -> Opened:
    """The images of an array; UserError where it is another one."""
    file = one_stored_file("npy", where)
    try:
        state = file.state()
        with file.open() as stream:
            is_first = npy_format.read_magic(stream) == (1, 0)
            read = npy_format.read_array_header_1_0 if is_first else npy_format.read_array_header_2_0
            shape, in_fortran_order, dtype = read(stream)
            start = stream.tell()
    except OSError as error:
        raise UserError(f"{file.place}: cannot be read ({error.strerror or error}).") from None
    except ValueError as error:
        raise UserError(
            f"{file.place}: not a readable npy file ({first_line(error)}); write it with numpy.save."
        ) from None
    first = len(shape) == 4 and shape[3] not in CHANNELS and shape[1] in CHANNELS
    if dtype != np.uint8 or len(shape) != 4 or not math.prod(shape) or not (first or shape[3] in CHANNELS):
        raise UserError(
            f"{file.place}: {dtype} of shape {shape}; expected uint8 of shape (N, height, width, 1 or 3) or "
            "(N, 1 or 3, height, width), N above 0, RGB or grey pixels 0..255."
        )
    if in_fortran_order:
        raise UserError(
            f"{file.place}: is in Fortran's order, in which no image lies in one piece; write it with numpy.save(path, "
            "numpy.ascontiguousarray(images))."
        )
    if state[0] < (end := start + math.prod(shape)):
        raise UserError(
            f"{file.place}: was cut off: {state[0]:,} bytes, and {shape[0]:,} images take {end:,}; write or fetch it "
            "again."
        )
    files = NpyImages(file, state, start, shape, first)
    channels, size = shape[1 if first else 3], files.picture_size(0)
    return Opened(files, size=size, channels="grey" if channels == 1 else "rgb")
