"""The run folder: what one training was, and what came of it.

run.json says what was asked for and what the network is; weights.safetensors are the final weights,
teacher.safetensors the teacher's; network.pt2 and teacher.pt2 hold networks that come from the user's files;
metrics.jsonl has one line per epoch; checkpoint-ITERATION is there until the end.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from faqd import __version__
from faqd.data_flags import PUBLISHED
from faqd.errors import UserError
from faqd.files import leftovers, read_json, refuse_unmakeable, sha256, write_json
from faqd.preprocess import Preprocess
from faqd.sweep import members
from faqd.train.data.options import DataOptions
from faqd.train.networks.own_tensors import own_tensors, put_tensors
from faqd.train.networks.source import NetworkSource
from faqd.train.networks.tensor_files import read_tensors, stated_in, write_tensors
from faqd.train.recipes import Recipe, recipe_json
from faqd.train.run.program import put_programs

FORMAT = "faqd-run"
VERSION = 1
RECORD = "run.json"
WEIGHTS = "weights.safetensors"
TEACHER_WEIGHTS = "teacher.safetensors"
METRICS = "metrics.jsonl"
_NEEDED = ("version", "kind", "asked", "recipe", "data", "network", "preprocess")


def is_done(folder: Path, record: dict[str, Any], resume: bool) -> bool:
    """Whether `folder` holds this very run, finished; False where it can begin or go on.

    UserError if it holds something else, or an unfinished run and there is no --resume, or where none can be made.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give another --out, the folder of the run.")
    if not (folder / RECORD).is_file():
        if folder.is_dir() and set(folder.iterdir()) > set(leftovers(folder)):
            raise UserError(f"{folder}: is not empty and holds no run; give another --out.")
        refuse_unmakeable(folder)
        return False
    found = read_record(folder)
    if not resume:
        raise UserError(f"{folder}: already holds a run. Give another --out, or --resume to go on with this one.")
    if found["kind"] != record["kind"]:
        raise UserError(f"{folder}: holds a {found['kind']} run; give another --out for a {record['kind']} run.")
    found_otherwise = differences(record["asked"], found["asked"])
    if found_otherwise:
        raise UserError(
            f"{folder}: holds a run with other options ({'; '.join(found_otherwise)}); --resume needs the same ones. "
            "Give another --out for a new run."
        )
    return (folder / WEIGHTS).is_file()


def begin(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of a run; from here on the folder is taken. One that is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / RECORD).is_file():
        write_json(folder / RECORD, {"format": FORMAT, "version": VERSION, "faqd": __version__, **record})


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes from training in `folder` meanwhile; UserError where one does. Ends with the process."""
    place = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process trains in it; wait for it, or give another --out.") from None
        except OSError:
            pass  # a network file system without locks
        yield
    finally:
        os.close(place)


def conclude(folder: Path, results: dict[str, Any], network: nn.Module) -> dict[str, Any]:
    """Keep the user's networks, add the results to the record, then write the final weights: a run that has them is
    finished."""
    record = {**read_record(folder), **results}
    record |= put_programs(folder, record)
    write_json(folder / RECORD, record)
    stated = json.dumps(_trained_as(record)) if record["kind"] == "distill" else None
    write_tensors(folder / WEIGHTS, own_tensors(network), stated)
    return record


_BITS = ("weight_bits", "act_bits", "target", "scales", "rounding")
"""What of a recipe the weights of a student mean nothing without."""


def _trained_as(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record["recipe"][key] for key in _BITS}


def refuse_other_bits(folder: Path, record: dict[str, Any]) -> None:
    """UserError where the record of a finished distillation run was changed behind its training: its weights know."""
    said = _trained_as(record)
    try:
        stated = json.loads(stated_in(folder / WEIGHTS) or "{}").items()
    except (ValueError, AttributeError):
        raise UserError(f"{folder / WEIGHTS}: damaged; copy or write it again.") from None
    for key, trained in stated:
        if said.get(key, trained) != trained:
            raise UserError(
                f"{folder / RECORD}: says {key} {said[key]}, and its weights were trained with {trained}; the file was "
                "changed after the run. Put it back, or train again."
            )


def differences(asked: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What a record that is there was asked for, and is not now, or the other way round; in words."""
    # As JSON has it: a tuple is a list there.
    now, there = _flat(json.loads(json.dumps(asked))), _flat(found)
    names = sorted(key for key in now.keys() | there.keys() if now.get(key) != there.get(key))
    return [f"{name}: {there.get(name)} there, {now.get(name)} now" for name in names]


def _flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return found


def read_record(folder: Path) -> dict[str, Any]:
    if not (folder / RECORD).is_file():
        within = ", ".join(found.name for found in members(folder, RECORD))
        if (folder / "manifest.json").is_file():
            cure = "it is a bundle: name the run that it was made of"
        else:
            cure = f"it holds runs: name one of {within}" if within else "`faqd-train` makes one with --out"
        raise UserError(f"{folder}: not a run folder (no {RECORD}); {cure}.")
    record: dict[str, Any] = read_json(folder / RECORD)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{folder / RECORD}: not the record of a run; give another folder.")
    if record.get("version") != VERSION:
        raise UserError(
            f"{folder}: run version {record.get('version')}, this faqd reads version {VERSION}: install the faqd that "
            "made the run, or train again."
        )
    if missing := [name for name in _NEEDED if name not in record]:
        raise UserError(f"{folder / RECORD}: has no '{missing[0]}'; copy the whole folder again, or train again.")
    return record


def finished(folder: Path) -> dict[str, Any]:
    """The record of a finished run; UserError if it was interrupted."""
    record = read_record(folder)
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: this run did not finish; run its command again with --resume.")
    return record


def load_exactly(network: nn.Module, path: Path) -> None:
    """Fill `network` with weights that faqd wrote; UserError if they belong to another network."""
    fill(network, read_tensors(path), path)


def fill(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Put the tensors of `path` into `network`; UserError if they are not exactly its own."""
    wanted = own_tensors(network)
    if state.keys() != wanted.keys() or any(state[k].shape != wanted[k].shape for k in wanted):
        raise UserError(
            f"{path}: weights of another network than {path.parent / RECORD} describes; the folder was changed after "
            "the run. Copy the whole folder again, or train again."
        )
    put_tensors(network, state)


def load_teacher(folder: Path) -> tuple[nn.Module, NetworkSource, str]:
    """Network, source and weights SHA-256 of the teacher in a finished run of either kind."""
    record = finished(folder)
    name = TEACHER_WEIGHTS if record["kind"] == "distill" else WEIGHTS
    source = NetworkSource.from_json(record["teacher"] if record["kind"] == "distill" else record["network"], folder)
    network = source.build()
    load_exactly(network, folder / name)
    network.eval()
    return network, source, sha256(folder / name)


def asked_json(recipe: Recipe, data: DataOptions, files: str | None) -> dict[str, Any]:
    """What a run was asked for, as --resume compares it: not where data lie, nor what a recipe says of itself.

    files: what tells a folder from one with other images."""
    settings, source = recipe_json(recipe), data_json(data)
    for values, names in ((settings, ("about",)), (source, ("root", "download"))):
        for name in names:
            del values[name]
    return {"recipe": settings, "data": source, **({"files": files} if files else {})}


def data_json(options: DataOptions) -> dict[str, Any]:
    return {**asdict(options), "root": str(options.root) if options.root else None}


@dataclass(frozen=True)
class MovedData:
    """Where the images of a run are now. root: of published data sets. source: of others, as DataOptions has it; the
    same images, for they are split by what is in them."""

    root: Path | None = None
    source: str | None = None


NOT_MOVED = MovedData()


def data_options(record: dict[str, Any], moved: MovedData = NOT_MOVED) -> DataOptions:
    """The data options of a run; UserError where `moved` says something that this run has no use for."""
    values = {**record["data"]}
    for key in ("image_size", "mean", "std"):
        if isinstance(values[key], list):
            values[key] = tuple(values[key])
    values["root"] = Path(values["root"]) if values["root"] else None
    found = DataOptions(**values)
    if moved.source is not None and ":" not in found.source:
        raise UserError(f"--data {moved.source}: the run is of {found.source}; say with --data-root where that is.")
    if moved.root is not None and found.source not in PUBLISHED:
        cure = "say with --data where that is" if ":" in found.source else "they come with scikit-learn; leave it out"
        raise UserError(
            f"--data-root {moved.root}: the run is of {found.source}, which is no published data set to look for "
            f"({', '.join(PUBLISHED)} are); {cure}."
        )
    return replace(found, root=moved.root or found.root, source=moved.source or found.source)


def images_of_run(record: dict[str, Any], moved: MovedData = NOT_MOVED) -> DataOptions:
    """`data_options`, to be read again; UserError where images are no longer in their place, and `moved` is silent."""
    found = data_options(record, moved)
    kind, _, where = found.source.partition(":")
    is_one_place = Path(where).is_absolute() and not any(map(where.count, _SEVERAL))
    if moved.source is None and is_one_place and not Path(where).exists():
        raise UserError(
            f"{where}: the images of this run were there and are no longer; say where they are now, such as "
            f"--data {kind}:PATH."
        )
    return found


_SEVERAL = "{*?["
"""What a place that stands for several files has in it."""


def run_preprocess(record: dict[str, Any]) -> Preprocess:
    return Preprocess.from_json(record["preprocess"])


def network_input(images_NHWC: Any, preprocess: Preprocess) -> Tensor:
    """Fitted uint8 images to network input, float32."""
    return torch.from_numpy(preprocess.normalise(images_NHWC))
