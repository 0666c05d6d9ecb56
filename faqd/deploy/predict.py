"""Pictures in, outputs out: the student of a bundle on files of one's own, preprocessed as the bundle says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.deploy.engine.progress import Say
from faqd.deploy.run_bundle import Backend, Engine
from faqd.errors import UserError
from faqd.files import written_beside
from faqd.train.data.decode import decoded
from faqd.train.data.listed_files import listed

Outputs = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Prediction:
    """outputs: by name, of this picture alone, without an axis of images."""

    file: str
    outputs: Outputs

    def scores(self) -> NDArray[np.float32] | None:
        """One for each class; None where there are several outputs, or the one has places."""
        values = next(iter(self.outputs.values()))
        return values if len(self.outputs) == 1 and values.ndim == 1 else None


def predict_pictures(
    folder: Path,
    places: Sequence[Path],
    backend: Backend,
    top: int,
    out: Path | None,
    with_facts: bool,
    show: Say | None,
    say: Say,
) -> dict[str, Any]:
    """Run the student of a bundle on pictures, `show` a line for each, and write all outputs into the npz file `out`.

    Returns what --json holds; without `with_facts` no picture is in it, so that any number of them can be looked at.
    """
    files = pictures(places)
    kept: list[Prediction] = []
    with Engine(folder, backend) as engine:
        say(f"{engine.bundle.name} on {engine.runs_on}")
        classes = engine.bundle.manifest["classes"]
        for one in predictions(engine, files, say):
            if show is not None:
                show(in_words(one, top, classes))
            if out is not None or with_facts:
                kept.append(one)
    if out is not None:
        write_npz(out, kept)
    images = [to_json(one, top, classes) for one in kept] if with_facts else []
    return {"bundle": engine.bundle.name, "runs_on": engine.runs_on, "images": images}


def pictures(places: Sequence[Path]) -> list[Path]:
    """The files that are named, and those in and below the folders that are."""
    found = []
    for place in places:
        found += [place / name for name in listed(place).names()] if place.is_dir() else [place]
    for path in found:
        if not path.exists():
            raise UserError(f"--images {path}: no such file or folder.")
    return found


def predictions(engine: Engine, files: Sequence[Path], say: Say) -> Iterator[Prediction]:
    """One at a time, in order; what cannot be read is told and left out. UserError where that is all of it."""
    bundle, left_out = engine.bundle, 0
    for path in files:
        picture = decoded(path)
        if isinstance(picture, str):
            say(f"{path}: left out, for files like this one {picture}.")
            left_out += 1
            continue
        pixels = bundle.preprocess.fit(picture.pixels)
        found = engine(bundle.network_input(pixels[None]))
        outputs = found if isinstance(found, dict) else {bundle.manifest["outputs"][0]["name"]: found}
        yield Prediction(str(path), {name: values[0] for name, values in outputs.items()})
    if left_out == len(files):
        raise UserError(f"--images: none of {len(files)} files can be read as a picture.")


def in_words(one: Prediction, top: int, classes: Sequence[str] | None) -> str:
    """The best classes with their scores; for other outputs what they are, since their numbers fill no line."""
    if (scores := one.scores()) is not None:
        told = ", ".join(f"{_name(index, classes)} {scores[index]:.4g}" for index in _best(scores, top))
    else:
        told = "; ".join(
            f"{name} {'x'.join(map(str, values.shape))}, {values.min():.4g} to {values.max():.4g}"
            for name, values in one.outputs.items()
        )
    return f"{one.file}: {told}"


def to_json(one: Prediction, top: int, classes: Sequence[str] | None) -> dict[str, Any]:
    """Vectors whole; of dense outputs the shape, their numbers belong into an npz file."""
    record: dict[str, Any] = {"file": one.file}
    if (scores := one.scores()) is not None:
        record["top"] = [
            {"class": _name(index, classes), "index": int(index), "score": float(scores[index])}
            for index in _best(scores, top)
        ]
    record["outputs"] = {
        name: values.tolist() if values.ndim == 1 else {"shape": list(values.shape)}
        for name, values in one.outputs.items()
    }
    return record


def write_npz(path: Path, made: Sequence[Prediction]) -> None:
    """`files` (N,) and for every output `student.NAME` (N, ...), as eval.npz names the teacher's."""
    arrays: dict[str, Any] = {"files": np.array([one.file for one in made])}
    arrays |= {f"student.{name}": np.stack([one.outputs[name] for one in made]) for name in made[0].outputs}
    with written_beside(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)


def _best(scores: NDArray[np.float32], top: int) -> NDArray[np.int64]:
    return np.argsort(-scores, kind="stable")[:top]


def _name(index: int, classes: Sequence[str] | None) -> str:
    # Labels by number may end before the outputs do.
    return classes[index] if classes is not None and index < len(classes) else str(index)
