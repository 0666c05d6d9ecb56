"""The figures in the README and the docs are those of the committed results."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from faqd.benchmarks.report.terminal import WIDTH, print_result
from faqd.benchmarks.studies.ablation_table import markdown
from faqd.files import read_json

ROOT = Path(__file__).parents[1]


def test_readme_shows_the_committed_cifar10_result() -> None:
    stream = io.StringIO()
    print_result(read_json(ROOT / "results" / "cifar10-short.json"), Console(file=stream, width=WIDTH, no_color=True))
    shown = [line.strip() for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
    lines = [line.strip() for line in stream.getvalue().splitlines() if line.strip()]
    accuracy_table = lines[: next(i for i, line in enumerate(lines) if line.startswith("latency in ms"))]
    assert len(accuracy_table) > 10
    assert [line for line in accuracy_table if line not in shown] == []


@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_docs_show_what_each_part_is_worth(data: str) -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert markdown(read_json(ROOT / "results" / f"worth-{data}.json")) in text
