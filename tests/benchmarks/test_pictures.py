"""`faqd-bench --pictures`: what the user's own script drew, in the page of the report."""

from __future__ import annotations

import re
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faqd.benchmarks.report import pictures
from tests.benchmarks.test_bench import call
from tests.fixtures.tiny_bundles import make_bundle

QUICK = ("--duration", "0.02", "--rounds", "2", "--warm-up", "0", "--batch", "1", "--backend", "onnxruntime")


def drawn(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 32, 3), np.uint8)).save(folder / name)
    return folder


def test_they_stand_in_the_page_and_in_that_of_a_stored_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle(tmp_path / "b").folder
    folder = drawn(tmp_path / "drawn", "b & c.png", "a.jpg")
    (folder / "notes.txt").write_text("no picture")
    page, record = tmp_path / "r.html", tmp_path / "r.json"
    assert call(monkeypatch, bundle, *QUICK, "--report", page, "--pictures", folder, "--json", record) == 0
    html = page.read_text()
    assert "img-src data:" in html  # or no browser shows them
    assert re.findall(r"<figcaption>(.*?)</figcaption>", html) == ["a", "b &amp; c"]
    for name, (kind, content) in zip(
        ("a.jpg", "b & c.png"), re.findall(r'src="data:image/(\w+);base64,([^"]+)"', html), strict=True
    ):
        assert b64decode(content) == (folder / name).read_bytes() and kind in {"jpeg", "png"}
    assert call(monkeypatch, "--from", record, "--report", page, "--pictures", folder) == 0
    assert page.read_text() == html
    assert call(monkeypatch, "--from", record, "--report", page) == 0
    assert "<figcaption>" not in page.read_text()


def test_what_cannot_be_shown_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, page = make_bundle(tmp_path / "b").folder, tmp_path / "r.html"
    many = drawn(tmp_path / "many", *(f"{n}.png" for n in range(4)))
    monkeypatch.setattr(pictures, "MOST", 3)
    drawn(tmp_path / "empty")
    for folder, more, said in (
        (tmp_path / "none", ("--report", page), "no such folder"),
        (tmp_path / "empty", ("--report", page), "holds no PNG or JPEG file"),
        (many, ("--report", page), "more than 3 pictures"),
        (many, (), "--pictures: they are shown in the page of --report"),
    ):
        assert call(monkeypatch, bundle, *QUICK, *more, "--pictures", folder) == 2
        told = capsys.readouterr().err
        assert said in told and "latency of" not in told and not page.exists()
