"""A word to who waits, where a step takes longer than one expects."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 2.0
"""Seconds without a word."""
_listeners: list[Callable[[str], None]] = []


@contextmanager
def told(say: Callable[[str], None]) -> Iterator[None]:
    """Have `say` called with what takes long meanwhile: command lines do, a library stays silent."""
    _listeners.append(say)
    try:
        yield
    finally:
        _listeners.remove(say)


@contextmanager
def slow(what: str) -> Iterator[None]:
    """A step that is named, as `capturing the network`, once it has taken more than PATIENCE."""
    listeners = list(_listeners)
    timer = threading.Timer(PATIENCE, lambda: [say(f"{what} ...") for say in listeners])
    timer.daemon = True
    if listeners:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
