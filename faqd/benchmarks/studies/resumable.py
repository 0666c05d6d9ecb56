"""A folder of training runs that one command fills, stopped and started as often as need be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from faqd.errors import INTERRUPTED, UserError
from faqd.files import read_json, write_json
from faqd.train.run.folder import METRICS

STUDY = "study.json"


def claim(folder: Path, asked: dict[str, Any]) -> None:
    """Write down what the folder holds. UserError where it holds something else."""
    asked = json.loads(json.dumps(asked))
    path = folder / STUDY
    if path.is_file() and read_json(path) != asked:
        raise UserError(f"{folder}: holds a study with other options; give another --out.")
    write_json(path, asked)


@contextmanager
def going_on(folder: Path) -> Iterator[None]:
    """An interrupted training says which folder goes on, and not the run's own advice."""
    try:
        yield
    except UserError as error:
        if error.exit_code != INTERRUPTED:
            raise
        raise UserError(f"{folder}: interrupted; the same command goes on.", exit_code=INTERRUPTED) from None


def training_seconds(run: Path) -> float:
    """Of all students that learned side by side with this one; what a kill threw away is not in it."""
    return float(json.loads((run / METRICS).read_text(encoding="utf-8").splitlines()[-1])["seconds"])


def say(text: str) -> None:
    click.echo(text, err=True)
