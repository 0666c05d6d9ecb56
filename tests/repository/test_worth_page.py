"""The README's first picture and tables are those of the committed results."""

from __future__ import annotations

import runpy
from pathlib import Path

import faqd

ROOT = Path(faqd.__file__).parents[1]


def test_the_first_picture_and_tables_are_those_of_the_results() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "worth_page.py"))
    text = (ROOT / "README.md").read_text("utf-8")
    assert text == made["page"](text), "write it again: see docs/worth_page.py"
    assert (ROOT / "docs" / "worth.svg").read_text("utf-8") == made["picture"](), "write it again: docs/worth_page.py"
