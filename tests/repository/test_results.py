"""The figures in the README and the docs are those of the committed results."""

from __future__ import annotations

import io
import re
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from rich.console import Console

from faqd.benchmarks.report.terminal import WIDTH, print_result
from faqd.benchmarks.studies.ablation_table import markdown
from faqd.benchmarks.studies.scaling_model import Assumed, tables
from faqd.files import read_json
from faqd.train.recipes import Training, usual_training

ROOT = Path(__file__).parents[2]


def test_docs_show_the_committed_cifar10_result() -> None:
    stream = io.StringIO()
    print_result(
        read_json(ROOT / "results" / "cifar10-short" / "resnet20.json"),
        Console(file=stream, width=WIDTH, no_color=True),
    )
    shown = [line.strip() for line in (ROOT / "docs" / "training.md").read_text(encoding="utf-8").splitlines()]
    lines = [line.strip() for line in stream.getvalue().splitlines() if line.strip()]
    accuracy_table = lines[: next(i for i, line in enumerate(lines) if line.startswith("latency in ms"))]
    assert len(accuracy_table) > 10
    assert [line for line in accuracy_table if line not in shown] == []


@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_docs_show_what_each_part_is_worth(data: str) -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert markdown(read_json(ROOT / "results" / "worth" / f"{data}.json")) in text


def test_docs_show_what_the_defaults_do() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = [row for file in sorted((ROOT / "results" / "defaults").glob("*.json")) for row in rows_of(file)]
    assert len(rows) > 5
    assert [row for row in rows if row not in text] == []


def test_docs_show_what_commands_cost() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for row in read_json(ROOT / "results" / "costs" / "costs.json")["networks"]:
        pixels = row["pixels"] ** 2
        batch = usual_training(Training(20, 0, None, optimizer=None, frozen_norm=None), False, pixels).batch_size
        told = [
            f"{row[key]['seconds']:.0f} s, {row.get(peak, row[key]['peak_mib']) / 1024:.1f} GiB"
            for key, peak in (("ptq", ""), ("distill_start", "distill_peak_mib"), ("export", ""))
        ]
        told.insert(2, f"{row['iteration_s']:.2f} s ({batch} images)")
        assert f"| {row['network']}, {row['pixels']} | {' | '.join(told)} |" in text, told


def test_docs_show_what_a_cached_teacher_and_the_compiler_save() -> None:
    cache = read_json(ROOT / "results" / "teacher-cache" / "yolox_nano.json")
    told = f"{cache['median_s']['cached']:.2f} s instead of {cache['median_s']['plain']:.2f}"
    told_size = f"{cache['images']} images take {cache['cache_bytes'] / 2**20:.0f} MiB"
    text = " ".join((ROOT / "docs" / "training.md").read_text(encoding="utf-8").split())
    assert told in text and told_size in text
    text = " ".join((ROOT / "docs" / "decisions.md").read_text(encoding="utf-8").split())
    rows = read_json(ROOT / "results" / "compiled" / "compiled.json")["rows"]
    for name, words in (("teacher", "a batch of 64 where torch's own operators take"), ("student", "where they take")):
        least = rows[name]["least"]
        assert f"{rows[name]['compile_s']:.0f} s to compile and {least['compiled_s']:.3f} s {words}" in text
        assert f"{words} {least['plain_s']:.3f}" in text
        assert not rows[name]["same_bits"]


def test_docs_show_how_it_scales() -> None:
    record = read_json(ROOT / "results" / "scaling" / "scaling.json")
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert tables(record) in text
    held = record["listing"]["bytes_a_file"]
    assert f"keeps {held:.0f} bytes a file" in " ".join(text.split())
    assert f"hold {8 * held * 1e8 / 2**30:.0f} GiB of lists" in " ".join(text.split())
    assert record["assumed"] == asdict(Assumed())


def rows_of(file: Path) -> list[str]:
    """A row of the table for each network and bits: means over the seeds of the defaults."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, cell in read_json(file).get("cells", {}).items():
        if re.fullmatch(r"s\d+", name.rpartition("-")[2]):
            found.setdefault(name.rpartition("-")[0], []).append(cell)
    rows = []
    for name, cells in found.items():
        network, _, bits = name.rpartition("-w")
        figures = [f"{flavour} {each}" for flavour in ("tensorrt", "onnxruntime") for each in ("ptq", "distilled")]
        means = [fmean(percent(cell[each][flavour]) for cell in cells) for flavour, each in map(str.split, figures)]
        shown = " | ".join(f"{mean:.2f}" for mean in [percent(cells[0]["teacher"]), *means])
        rows.append(f"| {network} | {bits.replace('a', '/')} | {shown} | {len(cells)} |")
    return rows


def percent(figures: dict[str, float]) -> float:
    return figures["metric"] if "metric" in figures else 100 * figures["top1"]
