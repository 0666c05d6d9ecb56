"""A folder of runs, as `distill` writes it for lists of bits and several seeds, or of bundles: what is in it, as one
table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path


def members(folder: Path, record: str) -> list[Path]:
    """The folders in `folder` that have this record, w2a4-s2 before w2a4-s10; none where it is such a folder itself."""
    if (folder / record).is_file() or not folder.is_dir():
        return []
    return sorted((found.parent for found in folder.glob(f"*/{record}")), key=_by_number)


def _by_number(path: Path) -> list[tuple[int, str]]:
    parts = re.findall(r"\d+|\D+", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Lines with a heading; rows have the same keys in the same order. The first column is left, the others right."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
