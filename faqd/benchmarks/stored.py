"""A record of an earlier run, read again: for its table, its report, its gates, and to compare it with another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from faqd.errors import UserError
from faqd.files import read_json

FORMAT = "faqd-bench"
VERSION = 2
KEYS = (
    "faqd",
    "command",
    "switches",
    "backend",
    "environment",
    "clocks",
    "evaluation",
    "metric",
    "energy",
    "bundles",
    "networks",
    "gates",
    "notes",
)
"""Of version 2, beside format and version."""


def read_record(path: Path) -> dict[str, Any]:
    """UserError where it is not the record of a bench, is damaged, or of another version."""
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path}: not a record that `faqd-bench ... --json FILE` wrote.")
    if record.get("version") != VERSION:
        raise UserError(
            f"{path}: record version {record.get('version')}, this faqd reads version {VERSION}: run the bench again."
        )
    missing = [key for key in KEYS if key not in record]
    if missing or not record["networks"]:
        raise UserError(f"{path}: the record is damaged ({', '.join(missing) or 'networks'} missing): run it again.")
    return record
