"""The study of what commands take: it measures the command itself, and names one that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from faqd.benchmarks.studies.costs import cost, lay_out
from faqd.errors import UserError
from tests.fixtures.toy_runs import faqd_deploy, succeeds


def test_the_memory_is_that_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name, code in (
        ("small", "import time; time.sleep(0.3)"),
        ("large", "x = b'x' * (200 << 20)\nimport time; time.sleep(0.3)"),
        ("fails", "raise SystemExit('no')"),
    ):
        (tmp_path / f"{name}.py").write_text(code)
    small, large = (cost([name], tmp_path)["peak_mib"] for name in ("small", "large"))
    assert 0 < small < 100 and 180 < large - small < 400
    with pytest.raises(UserError, match="fails: ended with an error: no"):
        cost(["fails"], tmp_path)


def test_what_it_lays_out_is_a_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("faqd.benchmarks.studies.costs.IMAGES", 60)
    options = lay_out(tmp_path, "resnet20", 16)
    found = succeeds(faqd_deploy("ptq", *options, "--out", "bundle"))
    assert "16 x 16 pixels" in found.stderr and "verified" in found.stderr
