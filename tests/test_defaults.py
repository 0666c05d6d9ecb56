"""The study of the defaults: rehearsed on one network, and restarted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from faqd.benchmarks.studies import defaults
from tests.toy_runs import Outcome, new_user, outcome_of, succeeds

METRIC = """
def closeness(outputs, found):
    assert len(found["images"]) == len(outputs["logits"])
    return -float(abs(outputs["logits"] - found["teacher"]["logits"]).max())
"""


def tried(folder: Path, *more: object) -> Outcome:
    line = (folder / "networks.json", "--out", folder / "work", "--bits", "4/4", "--steps", 4, "--json", "-")
    return outcome_of(defaults.command, (*line, *more))


def test_every_cell_is_judged_beside_ptq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_user(tmp_path)
    (tmp_path / "mine.py").write_text(METRIC)
    entry = {
        "teacher": "net.py:build",
        "weights": "best.pth",
        "data": {"data": f"folder:{tmp_path / 'images'}", "mean": "none", "std": "none"},
        "metric": "mine.py:closeness",
    }
    (tmp_path / "networks.json").write_text(json.dumps({"toy": entry}))
    (found,) = json.loads(succeeds(tried(tmp_path)).stdout)["cells"].values()
    assert found["images"] > 5 and found["ptq"].keys() == found["distilled"].keys() == {"distance", "metric"}
    assert found["kept"]["measure"] <= found["kept"]["untrained"] and found["recipe"]["training"]["steps"] == 4
    monkeypatch.setattr(defaults, "cell", lambda *_: pytest.fail("a finished cell is not made again"))
    assert json.loads(succeeds(tried(tmp_path)).stdout)["cells"] == {"toy-w4a4-s0": found}
    assert "holds a study with other options" in tried(tmp_path, "--steps", 5).stderr
    assert "--only other: not in" in tried(tmp_path, "--only", "other").stderr
