"""The table of what each part of the method is worth: rehearsed with few iterations, restarted, and its arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from faqd.benchmarks.studies import ablation as worth
from faqd.benchmarks.studies.ablation_table import summary
from faqd.files import write_json
from tests.fixtures.toy_runs import Outcome, everything_in, faqd_train, outcome_of, succeeds

BITS = "4/4"
METHODS = ["float", "ptq", "qat", "kd-mse", "kd-kl", "kd-fa", "kd-ffa"]


@pytest.fixture(scope="module", autouse=True)
def few_calibration_images() -> Iterator[None]:
    """Choosing scales is most of what fourteen students cost before they train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("faqd.train.loop.calibration_images.CALIBRATION_IMAGES", 32)
        threads = torch.get_num_threads()
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    succeeds(faqd_train("teacher", "--arch", "resnet14", "--steps", 40, "--out", run))
    return run


def compared(teacher: Path, out: Path, *more: object) -> Outcome:
    line = ("--data", "digits", "--teacher", teacher, "--arch", "resnet8", "--steps", 6, "--bits", BITS, "--seeds", 2)
    return outcome_of(worth.command, (*line, "--device", "cpu", "--out", out, "--json", "-", *more))


@pytest.fixture(scope="module")
def study(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A folder where the command was interrupted after a few cells and then ended, and what it said at last."""
    out = tmp_path_factory.mktemp("study") / "work"
    written = []

    def interrupted(path: Path, value: Any) -> None:
        write_json(path, value)
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("faqd.benchmarks.studies.ablation.write_json", interrupted)
        assert compared(teacher, out).code == 130
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert {path.name for path in before} == {f"{name}-s0.json" for name in ("float-w32a32", "ptq-w4a4", "qat-w4a4")}
    outcome = succeeds(compared(teacher, out))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    return out, outcome


def test_every_cell_is_measured_and_tabled(study: tuple[Path, Outcome]) -> None:
    out, outcome = study
    result = json.loads(outcome.stdout)
    rows = {(row["method"], row["bits"]): row for row in result["table"]}
    assert list(rows) == [(name, "32/32" if name == "float" else BITS) for name in METHODS]
    assert all(row["n"] == 2 for row in rows.values())
    assert [name for (name, _), row in rows.items() if row["difference"] is None] == ["float", "kd-mse"]
    cells = [json.loads(path.read_text()) for path in (out / "cells").iterdir()]
    assert sorted(result["cells"], key=str) == sorted(cells, key=str) and len(cells) == 2 * len(METHODS)
    # Six iterations from fresh weights: more than drawing lots gives, and not the same by every method.
    assert max(row["mean"] for row in rows.values()) > 0.13
    assert len({row["mean"] for row in rows.values()}) > 3
    assert f"| kd-fa | | {100 * rows['kd-fa', BITS]['mean']:.2f} ± ".replace("| |", "|  |") in outcome.stderr


def test_a_cell_has_the_accuracy_that_eval_gives_its_run(study: tuple[Path, Outcome]) -> None:
    out, _ = study
    for name in ("float-w32a32-s1", "kd-ffa-w4a4-s1"):
        result = json.loads(succeeds(faqd_train("eval", out / "students" / name, "--json", "-")).stdout)
        cell = json.loads((out / "cells" / f"{name}.json").read_text())
        assert cell["accuracy"] == result["student_accuracy"] and cell["agreement"] == result["agreement"]


def test_a_student_of_the_table_saw_no_label_and_no_other_student(
    teacher: Path, study: tuple[Path, Outcome], tmp_path: Path
) -> None:
    out, _ = study
    line = ("--teacher", teacher, "--arch", "resnet8", "--weight-bits", 4, "--act-bits", 4)
    seeds = ("--seed", 1, "--data-seed", 1)
    succeeds(faqd_train("distill", *line, *seeds, "--batch-size", 64, "--steps", 6, "--out", tmp_path / "run"))
    ours, wanted = (everything_in(run) for run in (out / "students" / "kd-fa-w4a4-s1", tmp_path / "run"))
    assert ours["weights.safetensors"] == wanted["weights.safetensors"]


def test_another_study_needs_another_folder(teacher: Path, study: tuple[Path, Outcome]) -> None:
    out, _ = study
    before = everything_in(out)
    outcome = compared(teacher, out, "--steps", 7)
    assert outcome.code == 2 and "holds a study with other options" in outcome.stderr
    assert everything_in(out) == before
    assert "--bits 4: expected weights and activations" in compared(teacher, out, "--bits", "4").stderr


def test_differences_are_paired_by_seed() -> None:
    accuracies = {"kd-mse": (0.50, 0.70, 0.90), "kd-fa": (0.51, 0.72, 0.93)}
    cells = [
        {"method": method, "bits": BITS, "seed": seed, "accuracy": value}
        for method, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    rows = summary(
        [*cells, {**cells[0], "method": "float", "bits": "32/32"}, {**cells[1], "method": "float", "bits": "32/32"}],
        "kd-mse",
    )
    assert [row["mean"] for row in rows[:2]] == pytest.approx([0.7, 0.72]) and rows[0]["std"] == pytest.approx(0.2)
    assert rows[0]["difference"] is None and rows[2]["difference"] is None
    # Differences of 1, 2 and 3 points: t(2) = 4.303, and a standard error of 1 / sqrt(3).
    assert rows[1]["difference"] == pytest.approx(
        {"mean": 0.02, "low": 0.02 - 0.024843, "high": 0.02 + 0.024843}, abs=1e-5
    )
