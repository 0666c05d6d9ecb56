"""Images, labels and names of classes in an npz file."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.errors import UserError

MOST_CLASSES = 2**20


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
    labels = checked_labels(str(path), arrays.get("labels"), arrays.get("classes"), len(pixels))
    return np.ascontiguousarray(pixels), *labels


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


def checked_labels(
    path: str, labels: NDArray[Any] | None, names: NDArray[Any] | None, count: int
) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Labels (count,) and the names of their classes, which are numbers where there are none. path: for sentences."""
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
