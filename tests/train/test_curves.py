"""`faqd-train curves`: the losses of runs as a table, as JSON and for TensorBoard."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.fixtures.toy_runs import faqd_train, new_user, succeeds


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    user = new_user(tmp_path_factory.mktemp("user"))
    succeeds(user.distill(user.folder / "runs", "--epochs", 3, "--weight-bits", "4,8"))
    return user.folder / "runs"


def test_a_run_and_a_folder_of_runs(runs: Path) -> None:
    one = succeeds(faqd_train("curves", runs / "w8a8-s0")).stdout
    stored = [json.loads(line) for line in (runs / "w8a8-s0" / "metrics.jsonl").read_text().splitlines()]
    heading, *rows = one.splitlines()[1:]
    assert heading.split()[:4] == ["iteration", "epoch", "logit_loss", "affinity_loss"]
    assert [row.split()[0] for row in rows] == [str(line["iteration"]) for line in stored] and len(rows) == 3
    assert rows[-1].split()[2] == f"{stored[-1]['logit_loss']:.4g}"
    both = json.loads(succeeds(faqd_train("curves", runs, "--json", "-")).stdout)
    assert list(both) == ["w4a8-s0", "w8a8-s0"] and both["w8a8-s0"] == stored


def test_what_is_being_written_or_damaged(runs: Path, tmp_path: Path) -> None:
    for name in ("begun", "half", "damaged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_bytes((runs / "w8a8-s0" / "run.json").read_bytes())
    whole = (runs / "w8a8-s0" / "metrics.jsonl").read_text()
    (tmp_path / "half" / "metrics.jsonl").write_text(whole + '{"iteration": 99, "ep')
    (tmp_path / "damaged" / "metrics.jsonl").write_text(whole + "[3]\n")
    assert len(json.loads(succeeds(faqd_train("curves", tmp_path / "half", "--json", "-")).stdout)["half"]) == 3
    for name, said in (("begun", "no losses yet"), ("damaged", "line 4 is damaged"), ("absent", "not a run folder")):
        outcome = faqd_train("curves", tmp_path / name)
        assert outcome.code == 2 and said in outcome.stderr
    outcome = succeeds(faqd_train("curves", tmp_path, "--json", "-"))
    assert list(json.loads(outcome.stdout)) == ["half"] and outcome.stderr.count("error") == 0
    assert "no losses yet" in outcome.stderr and "line 4 is damaged" in outcome.stderr


def test_tensorboard_reads_what_is_written(runs: Path, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    target = tmp_path / "curves"
    for _ in range(2):  # the second replaces the first
        said = succeeds(faqd_train("curves", runs, "--tensorboard", target)).stderr
        assert f"2 in {target}" in said
    for name in ("w4a8-s0", "w8a8-s0"):
        assert len(list((target / name).iterdir())) == 1
        events = reader.EventAccumulator(str(target / name)).Reload()
        stored = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        found = [(event.step, event.value) for event in events.Scalars("logit_loss")]
        assert found == [(line["iteration"], pytest.approx(line["logit_loss"])) for line in stored]
    (target / "w8a8-s0" / "notes.txt").write_text("mine")
    outcome = faqd_train("curves", runs, "--tensorboard", target)
    assert outcome.code == 2 and "holds notes.txt" in outcome.stderr and (target / "w8a8-s0" / "notes.txt").exists()


def test_without_tensorboard_the_cure_is_named(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    outcome = faqd_train("curves", runs, "--tensorboard", tmp_path / "curves")
    assert outcome.code == 2 and "needs tensorboard, which is not installed" in outcome.stderr
    assert "[tensorboard]" in outcome.stderr and not (tmp_path / "curves").exists()
