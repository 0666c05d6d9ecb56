"""A record of an earlier run, read again: for its table, its report, its gates, and to compare it with another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from faqd.benchmarks.record.schema import complaint
from faqd.errors import UserError
from faqd.files import read_json

FORMAT = "faqd-bench"
VERSION = 2


def read_record(path: Path) -> dict[str, Any]:
    """UserError where it is not the record of a bench, is damaged, or of another version."""
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path}: not a record that `faqd-bench ... --json FILE` wrote.")
    if record.get("version") != VERSION:
        raise UserError(
            f"{path}: record version {record.get('version')}, this faqd reads version {VERSION}: run the bench again."
        )
    if (wrong := complaint(record)) is not None:
        raise UserError(f"{path}: the record is damaged ({wrong}): run the bench again.")
    return record
