"""`faqd-train recover` as a new user has it: the cheap first, nothing worse than it began with, a word in the end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from faqd.files import read_json
from faqd.train.recover.record import Step
from faqd.train.recover.verdict import verdict_of
from tests.fixtures.toy_runs import (
    Outcome,
    User,
    everything_in,
    faqd_train,
    new_user,
    succeeds,
    write_images,
    write_net,
)
from tests.train.test_untrained_start import UNEVEN

DEEP = """
from torch import nn


def build():
    layers = []
    for channels in (3, 8, 8):
        layers += [nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU()]
    for layer in layers[::2]:
        nn.init.kaiming_normal_(layer.weight)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))
"""
LOW = ("--weight-bits", 3, "--act-bits", 3, "--keep-float", 1, "--steps", 24, "--batch-size", 32)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> User:
    folder = tmp_path_factory.mktemp("deep")
    write_net(folder, DEEP)
    write_images(folder / "images", 300)
    return User(folder)


@pytest.fixture(scope="module")
def low(deep: User) -> tuple[Path, Outcome]:
    """A recovery at few bits, which goes all the way."""
    out = deep.folder / "low"
    return out, succeeds(recover(deep, out, *LOW))


def recover(user: User, out: Path, *more: object) -> Outcome:
    return faqd_train("recover", *user.teacher, *user.data, "--device", "cpu", "--out", out, *more)


def steps_in(out: Path) -> dict[str, Any]:
    return {step["name"]: step for step in read_json(out / "recover.json")["steps"]}


def fidelity_of(bundle: Path) -> float:
    return min(float(each["least"]) for each in read_json(bundle / "verify.json")["fidelity"].values())


def test_what_is_kept_without_training_ends_there(user: User, tmp_path: Path) -> None:
    out = tmp_path / "r"
    outcome = succeeds(recover(user, out, "--min-fidelity", 0.97))
    assert list(steps_in(out)) == ["ptq"] and sorted(each.name for each in out.iterdir()) == ["bundle", "recover.json"]
    row, total, word = outcome.stdout.splitlines()[1:]
    assert row.startswith("mse scales") and row.endswith("taken") and " s in all" in total
    assert word.startswith("accepted: fidelity 0.9") and "100.0 % of its multiply-accumulates" in word
    assert "proof: " in outcome.stderr and "verified; of its teacher: kept" in outcome.stderr


def test_every_step_is_taken_only_where_it_gains(low: tuple[Path, Outcome]) -> None:
    out, outcome = low
    steps = steps_in(out)
    assert list(steps) == ["ptq", "keep-float", "distilled", "distilled-float"] and steps["ptq"]["taken"] == "taken"
    best = steps["ptq"]["distance"]
    assert best == min(each["distance"] for each in steps["ptq"]["candidates"])
    for step in list(steps.values())[1:]:
        assert (step["distance"] < best) >= (step["taken"] == "taken")
        best = step["distance"] if step["taken"] == "taken" else best
    assert 1 - best > steps["ptq"]["fidelity"] + 0.3
    rows = outcome.stdout.splitlines()
    assert len(rows) == 3 + len(steps["ptq"]["candidates"]) + len(steps) - 1
    assert steps["keep-float"]["int8_share"] < steps["ptq"]["int8_share"] == steps["distilled"]["int8_share"] == 1
    assert steps["distilled-float"]["exclude"] == steps["keep-float"]["exclude"] != steps["distilled"]["exclude"] == []


def test_the_bundle_is_that_of_the_best(low: tuple[Path, Outcome]) -> None:
    out, _ = low
    best = [step for step in steps_in(out).values() if step["taken"] == "taken"][-1]
    manifest = read_json(out / "bundle" / "manifest.json")
    assert manifest["kind"] == ("distilled" if best["name"].startswith("distilled") else "ptq")
    assert manifest["int8_share"] == pytest.approx(best["int8_share"], abs=1e-4)
    verdict = read_json(out / "recover.json")["verdict"]
    assert verdict["fidelity"] == fidelity_of(out / "bundle") == pytest.approx(best["fidelity"], abs=0.15)
    assert verdict["word"] == ("accepted" if verdict["fidelity"] >= 0.97 else "regressed")


def test_training_in_pieces_ends_in_the_same_bundle(deep: User, low: tuple[Path, Outcome], tmp_path: Path) -> None:
    whole, out = low[0], tmp_path / "r"
    for step, told in (
        ("ptq", f"{out / 'bundle'} is the best so far"),
        ("keep-float", f"{out / 'bundle'} is the best so far"),
        ("distilled", "paused by --time-limit after iteration 1 of 24"),
        ("distilled", "paused by --time-limit after iteration 2 of 24"),
    ):
        paused = succeeds(recover(deep, out, *LOW, "--time-limit", 0.001, "--resume"))
        assert told in paused.stderr and paused.stderr.count("step ") == 1 and f"step {step}" in paused.stderr
        assert not paused.stdout and (out / "bundle" / "verify.json").is_file()
    succeeds(recover(deep, out, *LOW, "--resume"))
    assert everything_in(out / "bundle") == everything_in(whole / "bundle")
    for run in ("run", "run-float"):
        weights = [(folder / run / "weights.safetensors").read_bytes() for folder in (whole, out)]
        assert weights[0] == weights[1]
    timeless = [
        {key: [_untimed(each) for each in value] if key == "steps" else value for key, value in record.items()}
        for record in (read_json(folder / "recover.json") for folder in (whole, out))
    ]
    assert timeless[0] == timeless[1]


def _untimed(step: dict[str, Any]) -> dict[str, Any]:
    return {**step, "seconds": 0, "candidates": [_untimed(each) for each in step["candidates"]]}


def test_a_finished_one_is_told_again_and_nothing_is_done(deep: User, low: tuple[Path, Outcome]) -> None:
    out, outcome = low
    before = everything_in(out)
    again = succeeds(recover(deep, out, *LOW, "--resume"))
    assert again.stdout == outcome.stdout and everything_in(out) == before and "step " not in again.stderr


def test_float_layers_that_leave_less_than_half_in_integers_are_not_worth_it(tmp_path: Path) -> None:
    write_net(tmp_path, UNEVEN)
    write_images(tmp_path / "images")
    out, line = tmp_path / "r", ("--min-fidelity", 0.9999, "--keep-float", 2, "--steps", 2)
    outcome = recover(User(tmp_path), out, *line)
    steps = steps_in(out)
    assert outcome.code == 1 and list(steps) == ["ptq", "keep-float", "distilled"]
    assert steps["keep-float"]["taken"] == "not worth it" and steps["keep-float"]["int8_share"] < 0.5
    assert steps["keep-float"]["fidelity"] > steps["ptq"]["fidelity"] > steps["ptq"]["candidates"][0]["fidelity"] + 0.5
    # What the first step chose is where training begins, and not searched again.
    assert outcome.stderr.partition("step distilled")[2].count(" scales, ") == 1
    assert read_json(out / "run" / "run.json")["untrained"]["equalized_tensors"] == 2
    assert read_json(out / "bundle" / "manifest.json")["int8_share"] == 1


def test_what_no_step_saves_is_hopeless(user: User, tmp_path: Path) -> None:
    line = ("--weight-bits", 1, "--act-bits", 1, "--keep-float", 0, "--steps", 2, "--min-fidelity", 0.9)
    outcome = recover(user, tmp_path / "r", *line, "--json", "-")
    record = json.loads(outcome.stdout)
    assert outcome.code == 1 and "below --min-fidelity 0.9" in outcome.stderr
    assert [step["name"] for step in record["steps"]] == ["ptq", "distilled"] and record["verdict"][
        "word"
    ] == "hopeless"
    assert record["verdict"]["fidelity"] < 0.5 and "more bits" in record["verdict"]["help"]
    assert f"hopeless: {record['verdict']['reason']}" in outcome.stderr
    assert record["verdict"]["fidelity"] == fidelity_of(tmp_path / "r" / "bundle")


@pytest.mark.parametrize(
    ("kept", "proved", "word", "told"),
    [
        (0.95, True, "accepted", "0.95 is enough"),
        (0.9, True, "regressed", "so the search ended: ask for more with --min-fidelity 0.98"),
        (0.4, True, "hopeless", "more than half"),
        (0.99, False, "regressed", "not proved: a layer differs"),
    ],
)
def test_the_verdict_is_of_the_files_on_the_evaluation_images(kept: float, proved: bool, word: str, told: str) -> None:
    step = Step("ptq", "mse scales", 0.04, 1.0, 1.0, "taken", candidates=(Step("ptq", "m", 0.04, 1.0, 1.0, "taken"),))
    asked = {"enough": 0.95, "keep_float": 5, "recipe": {"weight_bits": 8, "act_bits": 8}}
    files = {"better.onnx": {"least": 1.0, "images": 9}, "worse.onnx": {"least": kept, "images": 9}}
    verified = {"fidelity": files, "passed": proved, "failures": [] if proved else ["a layer differs"]}
    verdict = verdict_of({"asked": asked, "steps": [step.to_json()]}, verified)
    assert verdict["word"] == word and verdict["fidelity"] == kept and told in verdict["reason"] + verdict["help"]


def test_a_step_is_read_as_it_was_written() -> None:
    of_search = Step("ptq", "b", 0.5, 1.0, 1.0, "no better")
    step = Step(
        "keep-float", "a", math.inf, 0.9, 2.0, "no better", ("^x$",), {"calibration": "mse"}, (of_search,), ({},)
    )
    assert Step.from_json(json.loads(json.dumps(step.to_json(), allow_nan=False))) == step and step.fidelity == 0


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--act-bits", 32), "--act-bits"),
        (("--keep-float", -1), "--keep-float"),
        (("--min-fidelity", "nan"), "--min-fidelity"),
        (("--data", "folder:/nowhere"), "/nowhere"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(
    user: User, tmp_path: Path, more: tuple[object, ...], told: str
) -> None:
    line = [*user.teacher, *(() if "--data" in more else user.data), "--out", tmp_path / "r", *more]
    outcome = faqd_train("recover", *line)
    assert outcome.code == 2 and told in outcome.stderr and not (tmp_path / "r").exists()


def test_a_folder_that_is_taken_is_refused(deep: User, low: tuple[Path, Outcome], tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("mine")
    for out, more, told in (
        (tmp_path, (), "is not empty and holds no recovery"),
        (tmp_path / "other.txt", (), "is a file"),
        (low[0], LOW, "already holds a recovery"),
        (low[0], (*LOW, "--resume", "--keep-float", 2), "keep_float: 1 there, 2 now"),
        (low[0], (*LOW, "--resume", "--min-fidelity", 0.9), "enough: 0.97 there, 0.9 now"),
        (low[0], (*LOW, "--resume", "--steps", 25), "recipe.training.steps: 24 there, 25 now"),
    ):
        before = everything_in(out)
        outcome = recover(deep, out, *more)
        assert outcome.code == 2 and told in outcome.stderr and everything_in(out) == before
