"""The page of the networks that were tried is that of the committed record."""

from __future__ import annotations

import runpy
from pathlib import Path

import faqd

ROOT = Path(faqd.__file__).parents[1]


def test_the_page_is_that_of_the_record() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "networks_page.py"))
    text = "\n".join(made["page"]()) + "\n"
    assert (ROOT / "docs" / "networks.md").read_text("utf-8") == text, "write it again: see docs/networks_page.py"
