"""Progress of a training run for people: a live bar with an ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 15.0


class Report(Protocol):
    """Called after every iteration with its number, and with a text where there is news."""

    def __call__(self, iteration: int, text: str | None) -> None: ...


@contextmanager
def reporting(title: str, total: int, done: int = 0) -> Iterator[Report]:
    """Report on stderr, so that --json - keeps standard output for itself."""
    console = Console(stderr=True)
    if not sys.stderr.isatty():
        yield _plain(console, title, total, done)
        return
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, completed=done, text="")

        def live(iteration: int, text: str | None) -> None:
            progress.update(task, completed=iteration, **({"text": text} if text else {}))

        yield live


def _plain(console: Console, title: str, total: int, done: int) -> Report:
    started = time.monotonic()
    last = started

    def line(iteration: int, text: str | None) -> None:
        nonlocal last
        now = time.monotonic()
        if iteration != total and now - last < LINE_EVERY_S:
            return
        last = now
        left = (now - started) * (total - iteration) / max(1, iteration - done)
        news = f", {text}" if text else ""
        console.print(f"{title}: iteration {iteration}/{total}{news}, {left:.0f} s left", soft_wrap=True)

    return line
