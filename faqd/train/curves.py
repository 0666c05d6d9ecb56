"""How the losses of a run fell: its metrics.jsonl as a table, and for TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faqd.errors import UserError
from faqd.files import written_beside
from faqd.schema import wrong
from faqd.sweep import members, table
from faqd.train.run.folder import METRICS, RECORD, read_record

EVENTS = "events.out.tfevents."
"""What the files of TensorBoard begin with."""


def runs_in(folder: Path) -> list[Path]:
    """The run, or those of a folder of runs; UserError where it is neither."""
    if runs := members(folder, RECORD):
        return runs
    read_record(folder)
    return [folder]


def points(run: Path) -> list[dict[str, float]]:
    """One for each line of metrics.jsonl: `iteration`, `epoch`, the losses and `seconds`; a line that is being written
    is left out. UserError where there is none yet, or the file is damaged."""
    path = run / METRICS
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if line.endswith("\n"):
            try:
                point = json.loads(line)
            except ValueError:
                point = None
            if (complaint := next(wrong(point, {"iteration": int, "epoch": int}), None)) is not None:
                raise UserError(f"{path}: line {number} is damaged ({complaint}); the losses behind it are unknown.")
            found.append({name: value for name, value in point.items() if isinstance(value, (int, float))})
    if not found:
        raise UserError(f"{run}: no losses yet; {METRICS} gets its first line after an epoch.")
    return found


def lines(run: Path, found: Sequence[dict[str, float]]) -> list[str]:
    """The table of a run; a column for every figure, of which some lines may have none."""
    names = list(dict.fromkeys(name for point in found for name in point))
    return [f"{run}:", *table([{name: _cell(point.get(name)) for name in names} for point in found])]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def write_events(found: Sequence[dict[str, float]], folder: Path) -> None:
    """Write a run for TensorBoard; one that was written there before is replaced. UserError where something else is
    there."""
    from torch.utils.tensorboard import SummaryWriter  # needs the package `tensorboard`

    others = [path.name for path in folder.iterdir() if not path.name.startswith(EVENTS)] if folder.is_dir() else []
    if others:
        raise UserError(f"{folder}: holds {others[0]}, which TensorBoard has not written; give another folder.")
    with written_beside(folder) as temporary, SummaryWriter(str(temporary)) as writer:
        for point in found:
            for name, value in point.items():
                if name != "iteration":
                    writer.add_scalar(name, value, int(point["iteration"]))
