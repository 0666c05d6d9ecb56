"""The table and the list of docs/operators.md from the rows: `python docs/operators_page.py` writes both again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap

from faqd.quantize.operators.registry import OPERATORS
from faqd.quantize.operators.row import Operator
from faqd.quantize.operators.treatment import Treatment

PAGE = Path(__file__).with_name("operators.md")


def page(text: str) -> str:
    """The page with its table and its list as the rows are now."""
    islands = [row for row in OPERATORS if row.role == "other"]
    quantized = [row for row in OPERATORS if row.role != "other"]
    return _between("operators", table(quantized), _between("islands", listing(islands), text))


def table(rows: list[Operator]) -> Iterator[str]:
    yield "| operator, as module, function or method | quantization range of its result | TensorRT | onnxruntime |"
    yield "|---|---|---|---|"
    alike: dict[Treatment, list[Operator]] = {}
    for row in rows:
        alike.setdefault(row.treatment, []).append(row)
    for treatment, group in alike.items():
        yield f"| {_words(group)} | {treatment.grid} | {treatment.tensorrt} | {treatment.onnxruntime} |"


def listing(rows: list[Operator]) -> Iterator[str]:
    yield from wrap(f"Rows of this kind: {_words(rows)}.", 120)


def _words(rows: list[Operator]) -> str:
    """What the rows stand for, each thing once."""
    return "; ".join(dict.fromkeys(row.stands_for for row in rows))


def _between(name: str, lines: Iterator[str], text: str) -> str:
    begin, end = f"<!-- {name}: written by docs/operators_page.py -->\n", f"<!-- {name}: end -->"
    marked = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    made, count = marked.subn(lambda _: begin + "".join(f"{line}\n" for line in lines) + end, text)
    assert count == 1, f"{PAGE.name} has no place for {name}"
    return made


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
