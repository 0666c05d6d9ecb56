"""The small text files in which Linux tells of a machine: one value each, absent where a board has none."""

from __future__ import annotations

from pathlib import Path


def number(path: Path) -> float | None:
    """The number in the file; None where there is no such file or no number."""
    try:
        return float(text(path) or "")
    except ValueError:
        return None


def text(path: Path) -> str | None:
    """The text in the file; None where it is empty or cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None
