"""What a teacher says of every training image, in files that are mapped into memory: `--cache-teacher`.

A cache is a folder by the name of its key: cache.json, and an array (images x views, ...) of each output (float32) and
of each map that is compared (float16). It belongs to one teacher in one dtype, one list of training images, one
preprocessing, one set of views and one set of taps, and may serve any number of runs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from faqd.errors import UserError
from faqd.files import read_json, refuse_unmakeable, write_json, written_beside
from faqd.train.data.augment import shifted, ways
from faqd.train.data.datasets import Augmentation, Say
from faqd.train.loop.batches import Batches, Images, Target
from faqd.train.loop.progress import reporting
from faqd.train.recipes import Training

FORMAT, VERSION = "faqd-teacher-cache", 1
RECORD = "cache.json"
KEY_LETTERS = 16
DTYPES: dict[str, np.dtype[Any]] = {"outputs": np.dtype(np.float32), "maps": np.dtype(np.float16)}

Teach = Callable[[Tensor], Target]


def refuse_uncacheable(how: Augmentation, training: Training) -> None:
    """UserError where every iteration makes another image of a file, or another one than the cache is written of."""
    if training.decode == "reduced":
        raise UserError(
            "--cache-teacher: holds the answers to images as they are, and --decode reduced trains on others; "
            "leave one of the two out."
        )
    if training.views is None and ways(how) > 1:
        raise UserError(
            f"--cache-teacher: every iteration cuts its images out anew, in {ways(how):,} ways here, which no cache "
            "holds. Give --views 1 for each image as it is, or --views 4 for four fixed crops of each."
        )


def facts_of(source: dict[str, Any], sha256: str, dtype: str, train: Images, taps: list[str]) -> dict[str, Any]:
    """What tells a cache from another. source, sha256: of the teacher and of its weights. taps: nodes, in any order."""
    fixed = [[0, 0, 0]] if train.views is None else train.views.tolist()
    facts = {
        "teacher": source,
        "teacher_sha256": sha256,
        "teacher_dtype": dtype,
        "images": len(train.pixels),
        "images_sha256": _digest(train),
        "scale": train.scale.flatten().tolist(),
        "offset": train.offset.flatten().tolist(),
        "views": fixed,
        "taps": sorted(set(taps)),
        "torch": torch.__version__,
    }
    # As the file has it, where a tuple is a list.
    as_written: dict[str, Any] = json.loads(json.dumps(facts))
    return as_written


def _digest(train: Images) -> str:
    if isinstance(train.pixels, Tensor):
        return hashlib.sha256(train.pixels.cpu().numpy().data).hexdigest()
    files = train.pixels.pictures.files
    digest = hashlib.sha256(f"{files.files.in_words()}, {train.pixels.shape}".encode())
    digest.update(np.ascontiguousarray(files.index).data)
    return digest.hexdigest()


def written_cache(
    place: Path, facts: dict[str, Any], train: Images, teach: Teach, batches: Batches, training: Training, say: Say
) -> Path:
    """The folder of the cache with these facts in `place`, written if it is not there.

    UserError where it is damaged, does not fit on the disk, or a map has no float16; nothing half-written is left.
    """
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:KEY_LETTERS]
    folder, views = place / key, len(facts["views"])
    if folder.is_dir():
        _refuse_damaged(folder, facts)
        say(f"teacher cache: {folder} is taken, {_mib(read_json(folder / RECORD)['bytes'])}.")
        return folder
    if others := sorted(path.parent.name for path in place.glob(f"*/{RECORD}")):
        say(
            f"teacher cache: {place} has {len(others)} of another teacher, other images, views or feature layers "
            f"({', '.join(others[:3])}{', …' * (len(others) > 3)}), which stay; remove what you no longer need."
        )
    refuse_unmakeable(place)
    example = teach(train.normalised(train.pixels[:1]))
    values = [(kind, value) for kind in DTYPES for value in getattr(example, kind).values()]
    size = sum(value.numel() * DTYPES[kind].itemsize for kind, value in values) * len(train.pixels) * views
    passes = batches.iterations(training) / batches.per_epoch
    pays = "is worth it" if passes > views else "is worth it for other runs alone"
    say(
        f"teacher cache: {_mib(size)} for {len(train.pixels):,} images in {views} view{'s' * (views > 1)}, written "
        f"once; that costs {views} of the {passes:.3g} passes of this run, and {pays}."
    )
    existing = next(path for path in (place, *place.parents) if path.exists())
    if size > (free := shutil.disk_usage(existing).free):
        raise UserError(
            f"--cache-teacher {place}: {_mib(size)} are needed and {_mib(free)} are free; give another disk, fewer "
            "--views, or leave the option out."
        )
    with written_beside(folder) as temporary:
        temporary.mkdir()
        arrays = {
            (kind, name): (temporary / f"{kind}-{number}.npy")
            for kind in DTYPES
            for number, name in enumerate(getattr(example, kind))
        }
        moved = _write(arrays, example, train, teach, batches.part_size)
        record = {
            "format": FORMAT,
            "version": VERSION,
            **facts,
            "bytes": size,
            "maps_moved": moved,
            "arrays": [[kind, name, path.name, path.stat().st_size] for (kind, name), path in arrays.items()],
        }
        write_json(temporary / RECORD, record)
    return folder


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _write(
    arrays: dict[tuple[str, str], Path], example: Target, train: Images, teach: Teach, part: int
) -> dict[str, float]:
    """Write all arrays from front to back, through files: a full disk is an error there, and a signal in mapped memory.
    By map, what float16 has moved in it: |float16 - float32| / |float32|."""
    total, views = len(train.pixels), [None] if train.views is None else list(train.views)
    squares = {name: [0.0, 0.0] for name in example.maps}
    with ExitStack() as open_files, reporting(["teacher cache"], total) as report:
        streams = {key: open_files.enter_context(path.open("wb")) for key, path in arrays.items()}
        for (kind, name), stream in streams.items():
            shape = (total * len(views), *getattr(example, kind)[name].shape[1:])
            header = {"descr": np.lib.format.dtype_to_descr(DTYPES[kind]), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)
        for start in range(0, total, part):
            pixels = train.pixels[start : min(start + part, total)].to(train.scale.device)
            targets = [teach(train.normalised(_seen(pixels, train, view))) for view in views]
            for (kind, name), stream in streams.items():
                # An image's views lie together.
                value = torch.stack([getattr(each, kind)[name].float() for each in targets], 1).flatten(0, 1)
                _append(stream, value.cpu().contiguous().numpy(), DTYPES[kind], name, squares)
            report(min(start + part, total), {})
    return {name: (moved / whole) ** 0.5 if whole else 0.0 for name, (moved, whole) in squares.items()}


def _seen(pixels: Tensor, train: Images, view: Tensor | None) -> Tensor:
    return pixels if view is None else shifted(pixels, train.augmentation, view.expand(len(pixels), 3))


def _append(stream: IO[bytes], value: Any, dtype: np.dtype[Any], name: str, squares: dict[str, list[float]]) -> None:
    with np.errstate(over="ignore"):
        rounded = np.ascontiguousarray(value, dtype)
    if dtype == np.float16:
        if not np.isfinite(rounded).all():
            raise UserError(
                f"--cache-teacher: the map {name} of the teacher reaches {np.abs(value).max():.3g}, and float16, in "
                "which maps are kept, 65504; leave the option out, or choose another --feature-layer."
            )
        wide = value.astype(np.float64)
        squares[name][0] += float(np.square(rounded - wide).sum())
        squares[name][1] += float(np.square(wide).sum())
    stream.write(rounded.data)


def _refuse_damaged(folder: Path, facts: dict[str, Any]) -> None:
    record = read_json(folder / RECORD)
    cure = "remove that folder, and it is written again"
    if not isinstance(record, dict) or any(record.get(name) != value for name, value in facts.items()):
        raise UserError(f"{folder}: the cache of another teacher or other images under this name; {cure}.")
    for _, _, name, size in record.get("arrays", [("", "", RECORD, 0)]):
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found != size:
            raise UserError(
                f"{folder / name}: {found:,} bytes, and {size:,} were written: cut short or changed; {cure}."
            )


def summary(folder: Path) -> dict[str, Any]:
    """What a run records of its cache: the key, and what float16 has moved in each map, relative to its length."""
    return {"key": folder.name, "maps_moved": read_json(folder / RECORD)["maps_moved"]}


class TeacherCache:
    """The targets of training images by position and view, as they were written."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._device = device
        record = read_json(folder / RECORD)
        self._views = len(record["views"])
        self._arrays = [(kind, name, np.load(folder / file, mmap_mode="r")) for kind, name, file, _ in record["arrays"]]

    def __call__(self, positions: Tensor, views: Tensor) -> Target:
        rows = (positions * self._views + views).numpy()
        found: dict[str, dict[str, Tensor]] = {kind: {} for kind in DTYPES}
        for kind, name, array in self._arrays:
            found[kind][name] = torch.from_numpy(array[rows]).float().to(self._device)
        return Target(found["outputs"], found["maps"])
