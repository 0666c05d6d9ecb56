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
FIRST_LINE_S = 2.0
"""After so long the pace can be told."""


class Report(Protocol):
    """Called after every iteration with its number, and with a text for every title that has news."""

    def __call__(self, iteration: int, news: Mapping[str, str]) -> None: ...


@contextmanager
def reporting(titles: Sequence[str], total: int, done: int = 0) -> Iterator[Report]:
    """Report on stderr, so that --json - keeps standard output for itself: a line per title."""
    console, started = Console(stderr=True), time.monotonic()
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
        TextColumn("{task.fields[pace]}"),
        # On a narrow terminal it is this one that is cut short.
        TextColumn("{task.fields[text]}", table_column=Column(ratio=1, no_wrap=True)),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        tasks = {title: progress.add_task(title, total=total, completed=done, text="", pace="") for title in titles}

        def live(iteration: int, news: Mapping[str, str]) -> None:
            pace = f"{(time.monotonic() - started) / max(1, iteration - done):.2g} s each"
            for title, task in tasks.items():
                progress.update(task, completed=iteration, pace=pace)
                if title in news:
                    progress.update(task, text=news[title])

        yield live


def _plain(console: Console, titles: Sequence[str], total: int, done: int) -> Report:
    started = time.monotonic()
    next_line = started + FIRST_LINE_S
    latest: dict[str, str] = {}

    def lines(iteration: int, news: Mapping[str, str]) -> None:
        nonlocal next_line
        now = time.monotonic()
        latest.update(news)
        # The first iteration is no pace: it warms up.
        if iteration != total and (now < next_line or iteration - done < 2):
            return
        next_line = now + LINE_EVERY_S
        each = (now - started) / max(1, iteration - done)
        left = each * (total - iteration)
        for title in titles:
            text = f", {latest[title]}" if title in latest else ""
            console.print(
                f"{title}: iteration {iteration}/{total}{text}, {each:.2g} s each, {left:.0f} s left", soft_wrap=True
            )

    return lines
