"""Progress of a training run for people: a live bar with an ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

LINE_EVERY_S = 15.0


class Report(Protocol):
    """Called after every iteration with its number, and with a text for every title that has news."""

    def __call__(self, iteration: int, news: Mapping[str, str]) -> None: ...


@contextmanager
def reporting(titles: Sequence[str], total: int, done: int = 0) -> Iterator[Report]:
    """Report on stderr, so that --json - keeps standard output for itself: a line per title."""
    console = Console(stderr=True)
    if not sys.stderr.isatty():
        yield _plain(console, titles, total, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(elapsed_when_finished=True),
        # On a narrow terminal it is this one that is cut short.
        TextColumn("{task.fields[text]}", table_column=Column(ratio=1, no_wrap=True)),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        tasks = {title: progress.add_task(title, total=total, completed=done, text="") for title in titles}

        def live(iteration: int, news: Mapping[str, str]) -> None:
            for title, task in tasks.items():
                progress.update(task, completed=iteration)
                if title in news:
                    progress.update(task, text=news[title])

        yield live


def _plain(console: Console, titles: Sequence[str], total: int, done: int) -> Report:
    started = time.monotonic()
    last = started
    latest: dict[str, str] = {}

    def lines(iteration: int, news: Mapping[str, str]) -> None:
        nonlocal last
        now = time.monotonic()
        latest.update(news)
        if iteration != total and now - last < LINE_EVERY_S:
            return
        last = now
        left = (now - started) * (total - iteration) / max(1, iteration - done)
        for title in titles:
            text = f", {latest[title]}" if title in latest else ""
            console.print(f"{title}: iteration {iteration}/{total}{text}, {left:.0f} s left", soft_wrap=True)

    return lines
