"""Progress of a training run for people: a live bar with an ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

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
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(elapsed_when_finished=True),
        # On a narrow terminal it is this one that is cut short.
        TextColumn("{task.fields[text]}", table_column=Column(ratio=1, no_wrap=True)),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        task = progress.add_task(title, total=total, completed=done, text="")

        def live(iteration: int, text: str | None) -> None:
            progress.update(task, completed=iteration)
            if text:
                progress.update(task, text=text)

        yield live


def _plain(console: Console, title: str, total: int, done: int) -> Report:
    started = time.monotonic()
    last = started
    news = ""

    def line(iteration: int, text: str | None) -> None:
        nonlocal last, news
        now = time.monotonic()
        news = f", {text}" if text else news
        if iteration != total and now - last < LINE_EVERY_S:
            return
        last = now
        left = (now - started) * (total - iteration) / max(1, iteration - done)
        console.print(f"{title}: iteration {iteration}/{total}{news}, {left:.0f} s left", soft_wrap=True)

    return line
