"""A run keeps the best weights that it saw, the untrained student's among them: training never destroys one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from faqd.quantize.calibrate import calibrate
from faqd.quantize.capture.capture import capture
from faqd.quantize.config import QuantConfig
from faqd.quantize.prepare import insert_quantizers
from faqd.train.data.datasets import load_dataset
from faqd.train.loop.batches import splits_on
from faqd.train.loop.calibration_images import calibration_batches
from faqd.train.loop.select import Best, is_due
from faqd.train.networks.tensor_files import read_tensors
from faqd.train.run.folder import data_options, load_teacher
from tests.fixtures.toy_runs import Outcome, faqd_train, succeeds

LINE = ("--data", "digits", "--batch-size", 32, "--steps", 12)
METRICS = """
import numpy as np


def distance(outputs, found):
    assert set(found) == {"images", "teacher"} and found["images"].shape[1:] == (8, 8, 1)
    assert found["images"].dtype == np.uint8 and len(found["images"]) == len(outputs["logits"])
    return -np.square(outputs["logits"] - found["teacher"]["logits"]).mean()


def nothing(outputs, found):
    return None
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    succeeds(faqd_train("teacher", "--arch", "resnet8", "--steps", 40, "--out", run))
    return run


def distilled(teacher: Path, out: Path, *more: object) -> Outcome:
    return faqd_train("distill", "--teacher", teacher, *LINE, "--out", out, *more)


def record_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


def ptq_of(run: Path, method: Any = "mse") -> dict[str, torch.Tensor]:
    """The teacher of a run quantized without training, on the same images."""
    train, _ = splits_on(torch.device("cpu"), load_dataset(data_options(record_of(run)), with_labels=False))
    example = train.normalised(train.pixels[:2]).contiguous()
    student = insert_quantizers(capture(load_teacher(run)[0], example), QuantConfig(8, 8), example)
    student.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    calibrate(student, calibration_batches(train), method)
    return student.network.state_dict()


@pytest.mark.parametrize("more", [("--lr", 0.03), ("--lr", 1), ("--optimizer", "sgd", "--lr", 0.2)])
def test_a_rate_a_hundred_times_too_large_ends_as_ptq(teacher: Path, tmp_path: Path, more: tuple[object, ...]) -> None:
    outcome = succeeds(distilled(teacher, tmp_path / "run", *more))
    record = record_of(tmp_path / "run")
    assert record["kept"]["iteration"] == 0 and record["kept"]["last"] > 2 * record["kept"]["untrained"]
    assert outcome.stderr.count("kept: iteration 0 of 12, the untrained student") == 1
    assert record["select"] == record["select_untrained"]
    ours, wanted = read_tensors(tmp_path / "run" / "weights.safetensors"), ptq_of(tmp_path / "run")
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[name], wanted[name]) for name in wanted)


def test_calibration_is_that_of_ptq(teacher: Path, tmp_path: Path) -> None:
    succeeds(distilled(teacher, tmp_path / "run", "--lr", 1, "--calibration", "max"))
    ours = read_tensors(tmp_path / "run" / "weights.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in ptq_of(tmp_path / "run", "max").items())


def test_training_that_helps_is_kept(teacher: Path, tmp_path: Path) -> None:
    succeeds(distilled(teacher, tmp_path / "run", "--weight-bits", 2, "--act-bits", 2, "--steps", 24))
    kept = record_of(tmp_path / "run")["kept"]
    assert kept["iteration"] > 12 and kept["measure"] < 0.8 * kept["untrained"]


def test_from_scratch_the_last_weights_are_kept(teacher: Path, tmp_path: Path) -> None:
    outcome = succeeds(distilled(teacher, tmp_path / "run", "--init", "scratch"))
    assert "kept" not in record_of(tmp_path / "run") and "kept" not in outcome.stderr


def test_a_measure_of_the_user_selects(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(METRICS)
    line = ("--weight-bits", 2, "--select", f"{tmp_path / 'mine.py'}:distance")
    succeeds(distilled(teacher, tmp_path / "run", *line))
    kept = record_of(tmp_path / "run")["kept"]
    assert kept["iteration"] > 0 and kept["measure"] < kept["untrained"]


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("nothing", (), "returned a NoneType; return a number"),
        ("missing", (), "has no function of that name"),
        ("distance", ("--init", "scratch"), "keeps its last weights"),
    ],
)
def test_a_wrong_measure_is_named(
    teacher: Path, tmp_path: Path, name: str, more: tuple[object, ...], said: str
) -> None:
    (tmp_path / "mine.py").write_text(METRICS)
    outcome = distilled(teacher, tmp_path / "run", "--select", f"{tmp_path / 'mine.py'}:{name}", *more)
    assert outcome.code == 2 and said in outcome.stderr


def test_looks_are_early_and_often() -> None:
    assert [i for i in range(201) if is_due(i, 200)] == [0, 1, 2, 4, 8, 16, 25, 50, 75, 100, 125, 150, 175, 200]
    assert [i for i in range(4) if is_due(i, 3)] == [0, 1, 2, 3]


def test_what_is_no_number_is_never_the_best() -> None:
    best, network = Best(), nn.Linear(1, 1)
    for iteration, (weight, measure) in enumerate([(0.0, 3.0), (1.0, math.nan), (2.0, 1.0), (3.0, 2.0)]):
        nn.init.constant_(network.weight, weight)
        best.see(iteration, measure, network)
    assert (best.iteration, best.measure, best.first, best.last) == (2, 1.0, 3.0, 2.0)
    assert best.weights["weight"].item() == 2
    again = Best.from_json(json.loads(json.dumps(best.to_json())), best.weights)
    assert again == best


@pytest.mark.parametrize(("bits", "told"), [(1, True), (8, False)])
def test_a_student_no_nearer_than_a_constant_is_told_of(bits: int, told: bool, teacher: Path, tmp_path: Path) -> None:
    line = ("--weight-bits", bits, "--act-bits", bits, "--lr", 1e-9)
    said = succeeds(distilled(teacher, tmp_path / "run", *line)).stderr
    assert ("no nearer to the teacher than outputs that are the same for every image" in said) == told
    assert (record_of(tmp_path / "run")["kept"]["measure"] >= 1) == told
