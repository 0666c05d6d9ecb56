"""`faqd-deploy ptq --keep-float` as a new user has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fixtures.toy_runs import User, faqd_deploy, new_user, succeeds

BITS = ("--weight-bits", 2, "--act-bits", 2)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


def test_the_bundle_says_what_was_kept_float_and_why(user: User, tmp_path: Path) -> None:
    line = (*user.teacher, *user.data, *BITS, "--out", tmp_path / "b")
    said = succeeds(faqd_deploy("ptq", *line, "--keep-float", 1)).stderr
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    kept = manifest["kept_float"]
    (exclude,) = kept["exclude"]
    assert f"kept float: --exclude '{exclude}'" in said and "verified" in said
    assert said.count("tried: ") == len(kept["trials"]) and max(trial["floats"] for trial in kept["trials"]) == 1
    chosen = next(trial for trial in kept["trials"] if trial["exclude"] == exclude)
    assert chosen["fidelity"] == max(trial["fidelity"] for trial in kept["trials"])
    assert manifest["int8_share"] == pytest.approx(chosen["int8_share"], abs=1e-4)


def test_the_expression_that_it_says_makes_the_same_student(user: User, tmp_path: Path) -> None:
    line = (*user.teacher, *user.data, *BITS)
    succeeds(faqd_deploy("ptq", *line, "--keep-float", 1, "--out", tmp_path / "found"))
    found = json.loads((tmp_path / "found" / "manifest.json").read_text())
    succeeds(faqd_deploy("ptq", *line, "--exclude", *found["kept_float"]["exclude"], "--out", tmp_path / "given"))
    given = json.loads((tmp_path / "given" / "manifest.json").read_text())
    assert given["torch_digests"] == found["torch_digests"] and "kept_float" not in given


def test_where_enough_is_there_already_nothing_is_kept_float(user: User, tmp_path: Path) -> None:
    line = (*user.teacher, *user.data, "--keep-float", 3, "--min-fidelity", 0.5, "--out", tmp_path / "b")
    assert "kept float: nothing" in succeeds(faqd_deploy("ptq", *line)).stderr
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert manifest["kept_float"]["exclude"] == [] and manifest["int8_share"] == 1.0


@pytest.mark.parametrize("count", [-1, "few"])
def test_wrong_input(user: User, tmp_path: Path, count: object) -> None:
    outcome = faqd_deploy("ptq", *user.teacher, *user.data, "--keep-float", count, "--out", tmp_path / "b")
    assert outcome.code == 2 and "--keep-float" in outcome.stderr and not (tmp_path / "b").exists()
