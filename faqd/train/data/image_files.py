"""What a user brings: image files, found, decoded, upright, RGB; npz files; the tree of Tiny ImageNet."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from faqd.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""Pillow's other decoders stay closed: they are many, old and seldom what a user means."""
BROKEN_PERCENT = 1
"""More files than this that cannot be read say that something else is wrong."""
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
ORIENTATION = 274
"""The EXIF tag of that."""
BITS = 14
"""Cameras have up to so many; 16-bit files in which no pixel has more are theirs, and dark."""
BRIGHT_SHARE = 1e-3
"""So many of an image's values may be brighter than what it is said to reach: sensors have hot pixels."""
REPORT_EVERY = 5000
MOST_CLASSES = 2**20
TINY_IMAGENET = "tiny-imagenet-200"


@dataclass(frozen=True)
class Images:
    """pixels: (N, H, W, C) uint8. kept: their indices in the list of files. skipped: files that cannot be read."""

    pixels: NDArray[np.uint8]
    kept: list[int]
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """pixels: (H, W, 3) uint8, RGB, upright. shows: whether some of it is not transparent. deep: of a file of 16 bits,
    the upper 8 of the value that no pixel passes but hot ones."""

    pixels: NDArray[np.uint8]
    shows: bool
    deep: int | None


@dataclass(frozen=True)
class TinyImageNet:
    """The files of the published tree, relative to `folder`; the class of each is a WordNet id."""

    folder: Path
    classes: tuple[str, ...]
    train: list[str]
    train_wnids: list[str]
    val: list[str]
    val_wnids: list[str]


def list_images(folder: Path) -> list[str]:
    """The image files below `folder`, relative, sorted; hidden ones are left out (file managers leave copies)."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.")
    below = (path.relative_to(folder) for path in _walked(folder) if path.suffix.lower() in SUFFIXES)
    files = sorted(path.as_posix() for path in below if not any(part.startswith(".") for part in path.parts))
    if not files:
        raise UserError(f"{folder}: no image in it or below it; expected files that end in {', '.join(SUFFIXES)}.")
    return files


def _walked(folder: Path) -> Iterator[Path]:
    """The files below `folder`, through links to folders too, but through none twice."""
    seen = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(here, name) for name in files)


def class_names(folder: Path, files: Iterable[str]) -> list[str]:
    """The class of each file: the subfolder of `folder` that it lies in, however deep."""
    names = [file.split("/")[:-1] for file in files]
    if not all(names):
        raise UserError(
            f"{folder}: --labels takes the names of its subfolders as classes, but images lie in the folder itself. "
            "Move them into one subfolder per class, or leave --labels out."
        )
    return [name[0] for name in names]


def read_images(
    folder: Path,
    files: Sequence[str],
    fit: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None,
    say: Callable[[str], None],
) -> Images:
    """Decode files and `fit` each; without `fit` all must have one size.

    What does not decode, or is too large to, is skipped and named; UserError where that is more than 1 %. `say` also
    tells of 16-bit files that use fewer bits, and of images that show nothing.
    """
    pixels: NDArray[np.uint8] | None = None
    kept: list[int] = []
    skipped: dict[str, str] = {}
    deep: list[int] = []
    transparent: list[str] = []

    def read(file: str) -> NDArray[np.uint8] | str:
        decoded = _decoded(folder / file)
        if isinstance(decoded, str):
            return decoded
        if not decoded.shows:
            transparent.append(file)
        if decoded.deep is not None:
            deep.append(decoded.deep)
        return decoded.pixels if fit is None else fit(decoded.pixels)

    with ThreadPoolExecutor() as pool:
        for index, image in enumerate(pool.map(read, files)):
            if index and index % REPORT_EVERY == 0:
                say(f"{folder}: {index} of {len(files)} images read.")
            if isinstance(image, str):
                skipped[files[index]] = image
                continue
            if pixels is None:
                # One block from the start: a list of images would need their memory twice when it is stacked.
                pixels = np.empty((len(files), *image.shape), np.uint8)
            if image.shape != pixels.shape[1:]:
                raise UserError(
                    f"{folder}: images of different sizes, {_size(pixels[0])} ({files[kept[0]]}) and {_size(image)} "
                    f"({files[index]}); say with --image-size what they are brought to."
                )
            pixels[len(kept)] = image
            kept.append(index)
    if skipped:
        _report(folder, skipped, len(files), say)
    assert pixels is not None
    _tell_of_dark_files(folder, deep, say)
    if transparent:
        say(
            f"{folder}: {len(transparent)} of {len(files)} images are transparent everywhere ({min(transparent)}), so "
            "that a viewer shows nothing; their colours are read as if they were not."
        )
    return Images(pixels[: len(kept)], kept, tuple(skipped))


def read_picture(path: Path) -> Picture:
    """One image file, turned as its EXIF orientation says."""
    with Image.open(path, formats=FORMATS) as opened:
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


def _reach(pixels: NDArray[np.uint8]) -> int:
    return int(np.partition(pixels.ravel(), last := int((1 - BRIGHT_SHARE) * (pixels.size - 1)))[last])


def _upright(opened: Image.Image) -> Image.Image:
    """`opened` turned by the one tag that says how, whatever else its metadata hold: nothing of them is kept."""
    try:
        turn = TURNS.get(opened.getexif().get(ORIENTATION, 1))
    except Exception:  # of metadata that are damaged, nearly anything
        turn = None
    return opened.transpose(turn) if turn is not None else opened


def read_npz(
    path: Path, *, with_labels: bool
) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Images (N, H, W, 1 or 3), labels and class names of an npz file; without `with_labels` only the images."""
    arrays = _npz_arrays(path, ("images", "labels", "classes") if with_labels else ("images",))
    pixels = arrays.get("images")
    if pixels is None:
        raise UserError(f"{path}: no array named 'images'; write it with numpy.savez(path, images=...).")
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3) or not pixels.size:
        raise UserError(
            f"{path}: 'images' is {pixels.dtype} of shape {pixels.shape}; "
            "expected uint8 of shape (N, height, width, 1 or 3), N above 0, RGB or grey pixels 0..255."
        )
    return pixels, *_npz_labels(path, arrays, len(pixels))


def find_tiny_imagenet(root: Path) -> TinyImageNet:
    """The published tree below `root`, or `root` itself; validation images in the order of their list."""
    candidates = [root / TINY_IMAGENET, root]
    listing = Path("val") / "val_annotations.txt"
    folder = next((place for place in candidates if (place / listing).is_file()), None)
    if folder is None:
        raise UserError(
            f"Tiny ImageNet is not there: looked for {listing} in {' and '.join(map(str, candidates))}. "
            f"Unpack the published {TINY_IMAGENET}.zip there, or say with --data-root where it is; "
            "--download does not fetch it."
        )
    rows = [line.split("\t") for line in (folder / listing).read_text(encoding="utf-8").splitlines() if line]
    train = [f"train/{file}" for file in list_images(folder / "train")]
    train_wnids = [file.split("/")[1] for file in train]
    classes = tuple(sorted(set(train_wnids)))
    if not rows or any(len(row) < 2 or row[1] not in classes for row in rows):
        raise UserError(f"{folder / listing}: not the published list (image, WordNet id, box); unpack it again.")
    val = [f"val/images/{row[0]}" for row in rows]
    missing = [file for file in val if not (folder / file).is_file()]
    if missing:
        raise UserError(f"{folder}: {len(missing)} files of {listing} are missing ({missing[0]}); unpack it again.")
    return TinyImageNet(folder, classes, train, train_wnids, val, [row[1] for row in rows])


def _npz_arrays(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Those of the named arrays that are in the file; the others are not even decompressed."""
    try:
        # Opened here: numpy leaves a damaged file open.
        with path.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if isinstance(archive, np.lib.npyio.NpzFile):
                found = {name: archive[name] for name in names if name in archive.files}
                # numpy hands out a member that is no array as its bytes.
                if all(isinstance(array, np.ndarray) for array in found.values()):
                    return found
                raise ValueError("a member is no array")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path}: not a readable npz file ({error}); it is damaged, or holds Python objects. "
            "Write it again with numpy.savez and arrays of numbers or strings."
        ) from None
    raise UserError(f"{path}: a single array; expected an npz file, written with numpy.savez(path, images=...).")


def _npz_labels(
    path: Path, arrays: dict[str, NDArray[Any]], count: int
) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    labels, names = arrays.get("labels"), arrays.get("classes")
    if names is not None and (names.dtype.kind != "U" or names.ndim != 1):
        raise UserError(f"{path}: 'classes' is {names.dtype} of shape {names.shape}; expected a list of strings.")
    if labels is None:
        return None, None if names is None else tuple(names.tolist())
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise UserError(
            f"{path}: 'labels' is {labels.dtype} of shape {labels.shape}; expected integers of shape ({count},)."
        )
    if names is None and labels.max() >= MOST_CLASSES:
        raise UserError(
            f"{path}: 'labels' go up to {labels.max()}; expected the numbers of classes, 0, 1, 2 and so on."
        )
    classes = tuple(names.tolist()) if names is not None else tuple(map(str, range(int(labels.max()) + 1)))
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(f"{path}: 'labels' go from {labels.min()} to {labels.max()}; expected 0..{len(classes) - 1}.")
    return labels.astype(np.int64), classes


def _decoded(path: Path) -> Picture | str:
    """The picture, or what is wrong with its file."""
    try:
        return read_picture(path)
    except Image.DecompressionBombError:
        assert Image.MAX_IMAGE_PIXELS is not None
        return f"have more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, which is too large"
    # Pillow's decoders raise almost anything on a damaged file: SyntaxError, struct.error, EOFError, IndexError.
    except Exception:
        return "do not decode"


def _tell_of_dark_files(folder: Path, deep: list[int], say: Callable[[str], None]) -> None:
    """A sentence where no 16-bit file uses its 16 bits. deep: of each such file what Picture has."""
    if deep and max(deep) < 2 ** (BITS - 8):
        bits = 8 + max(deep).bit_length()
        say(
            f"{folder}: no pixel of the {len(deep)} images of 16 bits passes {2**bits - 1}, but for one in a thousand, "
            f"as of {bits}-bit data; the upper 8 of 16 bits are taken, so that they load dark. Where they hold {bits} "
            f"bits, write them again with values shifted up by {16 - bits} bits."
        )


def _size(image: NDArray[np.uint8]) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"


def _report(folder: Path, skipped: dict[str, str], count: int, say: Callable[[str], None]) -> None:
    found = f"{folder}: " + ", ".join(_named(skipped, reason, count) for reason in dict.fromkeys(skipped.values()))
    if 100 * len(skipped) > BROKEN_PERCENT * count:
        raise UserError(f"{found}; more than {BROKEN_PERCENT} % are too many to skip. Repair, shrink or remove them.")
    say(f"{found}; skipped.")


def _named(skipped: dict[str, str], reason: str, count: int) -> str:
    files = [file for file, why in skipped.items() if why == reason]
    return f"{len(files)} of {count} images {reason} ({', '.join(files[:5])}{', …' * (len(files) > 5)})"
