"""docs/operators.md says of every row what it stands for and what becomes of it."""

from __future__ import annotations

import runpy
from pathlib import Path

import faqd
from faqd.quantize.operators.registry import OPERATORS

DOCS = Path(faqd.__file__).parents[1] / "docs"


def test_the_tables_of_the_page_are_what_the_rows_say() -> None:
    text = (DOCS / "operators.md").read_text("utf-8")
    written = runpy.run_path(str(DOCS / "operators_page.py"))["page"](text)
    assert text == written, "write it again: see docs/operators_page.py"


def test_every_row_says_what_it_stands_for() -> None:
    assert all(row.stands_for and all(vars(row.treatment).values()) for row in OPERATORS)
