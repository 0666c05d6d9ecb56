"""What commands say of a bundle: its proof, and how much of the teacher is left, which is another thing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from faqd.bundle import (
    EVAL,
    MANIFEST,
    STUDENT_ONNXRUNTIME,
    STUDENT_TENSORRT,
    STUDENT_TENSORRT_FP32,
    VERIFY,
    load_bundle,
)
from faqd.files import sha256
from faqd.proof import fidelity_of
from tests.fixtures.toy_runs import User, faqd_deploy, new_user, succeeds


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


@pytest.fixture(scope="module")
def good(user: User) -> tuple[Path, str]:
    """A bundle, and what `ptq` said of it."""
    out = user.folder / "good"
    return out, succeeds(faqd_deploy("ptq", *user.teacher, *user.data, "--out", out)).stderr


@pytest.fixture(scope="module")
def ruined(user: User) -> tuple[Path, str]:
    out = user.folder / "ruined"
    bits = ("--weight-bits", 1, "--act-bits", 1)
    return out, succeeds(faqd_deploy("ptq", *user.teacher, *user.data, *bits, "--out", out)).stderr


def test_a_good_one(good: tuple[Path, str]) -> None:
    out, said = good
    lines = said.splitlines()
    assert lines[-1] == f"{out}: net.py:build 8/8, verified; of its teacher: kept."
    (proof,) = (line for line in lines if line.startswith("proof: "))
    counted = r"[\d,]+ quantized values compared, (0 differ|\d+ differs? by one, at ties)"
    assert re.fullmatch(rf"proof: the files compute the student: {counted}\.", proof)
    found = json.loads((out / VERIFY).read_text())["fidelity"]
    assert list(found) == [STUDENT_TENSORRT_FP32, STUDENT_TENSORRT, STUDENT_ONNXRUNTIME]
    assert all(each["verdict"] == "kept" and 0.97 <= each["least"] < 1 for each in found.values())
    for name in found:
        assert any(line.startswith(f"  {name}: 0.99") and "; the same class on " in line for line in lines)
    assert "Try " not in said


def test_a_ruined_one_is_proved_and_called_ruined(ruined: tuple[Path, str]) -> None:
    out, said = ruined
    assert said.splitlines()[-1] == f"{out}: net.py:build 1/1, verified; of its teacher: ruined."
    assert "fidelity: ruined." in said and "`faqd-train recover`" in said


def test_commands_say_both(good: tuple[Path, str], ruined: tuple[Path, str]) -> None:
    for (out, _), word in ((good, "kept"), (ruined, "ruined")):
        for command, proof in (("inspect", "verify: passed"), ("verify", "proof: the files compute the student: ")):
            told = succeeds(faqd_deploy(command, out)).stdout
            assert f"fidelity: {word}." in told and proof in told
        assert json.loads(succeeds(faqd_deploy("inspect", out, "--json", "-")).stdout)["fidelity"]


@pytest.mark.parametrize("command", ["verify", "explain", "inspect"])
def test_a_json_file_takes_nothing_from_what_is_printed(command: str, good: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = good
    line = (command, out, *(["--rules-only"] if command == "explain" else []))
    kept = succeeds(faqd_deploy(*line, "--json", tmp_path / "kept.json")).stdout
    assert kept == succeeds(faqd_deploy(*line)).stdout and json.loads((tmp_path / "kept.json").read_text())


def test_a_minimum_is_an_exit_code(user: User, good: tuple[Path, str], ruined: tuple[Path, str]) -> None:
    assert faqd_deploy("verify", good[0], "--min-fidelity", 0.97).code == 0
    outcome = faqd_deploy("verify", ruined[0], "--min-fidelity", 0.97)
    assert outcome.code == 1 and "is below --min-fidelity 0.97" in outcome.stderr
    out = user.folder / "refused"
    bits = ("--weight-bits", 1, "--act-bits", 1, "--min-fidelity", 0.9)
    outcome = faqd_deploy("ptq", *user.teacher, *user.data, *bits, "--out", out)
    assert outcome.code == 1 and "is below --min-fidelity 0.9" in outcome.stderr and (out / MANIFEST).is_file()
    assert faqd_deploy("verify", good[0], "--min-fidelity", 1.5).code == 2


def test_what_is_said_of_other_files_is_not_repeated(user: User) -> None:
    out = user.folder / "changed"
    succeeds(faqd_deploy("ptq", *user.teacher, *user.data, "--out", out))
    written = load_bundle(out).manifest["fidelity"]
    record = json.loads((out / VERIFY).read_text())
    newer = {file: {**each, "least": 0.5} for file, each in record["fidelity"].items()}
    for said, wanted in (
        ({"fidelity": newer}, newer),
        ({"fidelity": newer, "manifest_sha256": "0" * 64}, written),
        ({"fidelity": {STUDENT_TENSORRT: {"verdict": "splendid"}}}, written),
    ):
        (out / VERIFY).write_text(json.dumps({**record, **said}))
        assert fidelity_of(load_bundle(out)) == wanted
    (out / VERIFY).unlink()
    assert fidelity_of(load_bundle(out)) == written


def test_the_manifest_says_both_and_is_the_one_that_is_proved(user: User, good: tuple[Path, str]) -> None:
    out, _ = good
    manifest, record = (json.loads((out / name).read_text()) for name in (MANIFEST, VERIFY))
    assert manifest["proof"] == {"tensorrt": "passed", "onnxruntime": "passed"}
    assert manifest["fidelity"] == record["fidelity"] and record["manifest_sha256"] == sha256(out / MANIFEST)
    facts = json.loads(succeeds(faqd_deploy("inspect", out, "--json", "-")).stdout)
    assert facts == manifest, "what inspect finds here and now is what was found when it was written"
    before = (out / MANIFEST).read_bytes()
    succeeds(faqd_deploy("verify", out))
    assert (out / MANIFEST).read_bytes() == before


@pytest.mark.parametrize(("key", "value"), [("proof", {"tensorrt": "splendid"}), ("fidelity", {STUDENT_TENSORRT: 1})])
def test_a_manifest_that_says_something_else_is_damaged(
    user: User, good: tuple[Path, str], key: str, value: object
) -> None:
    out = Path(shutil.copytree(good[0], user.folder / f"damaged-{key}"))
    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps({**manifest, key: value}))
    outcome = faqd_deploy("inspect", out)
    assert outcome.code == 2 and f"damaged, {key}/" in outcome.stderr


def test_outputs_of_another_teacher_are_refused(user: User) -> None:
    out = user.folder / "other"
    succeeds(faqd_deploy("ptq", *user.teacher, *user.data, "--out", out))
    arrays = dict(np.load(out / EVAL))
    (key,) = (key for key in arrays if key.startswith("teacher."))
    np.savez(out / EVAL, **{**arrays, key: arrays[key][:, :3]})
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"][EVAL]["sha256"] = sha256(out / EVAL)
    (out / MANIFEST).write_text(json.dumps(manifest))
    outcome = faqd_deploy("verify", out)
    assert outcome.code == 2 and "is not of the teacher's shape" in outcome.stderr


@pytest.mark.parametrize("key", ["weight_bits", "act_bits"])
def test_bits_that_are_stated_are_those_of_the_files(user: User, key: str) -> None:
    out = user.folder / f"edited-{key}"
    succeeds(faqd_deploy("ptq", *user.teacher, *user.data, "--out", out))
    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps({**manifest, key: 4}))
    outcome = faqd_deploy("verify", out)
    assert outcome.code == 2 and "says " in outcome.stderr and "that it has 8/8" in outcome.stderr


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc here")
def test_a_place_where_nothing_can_be_made_is_refused_before_the_work(user: User) -> None:
    outcome = faqd_deploy("ptq", *user.teacher, *user.data, "--out", "/proc/bundle")
    assert outcome.code == 2 and "no folder can be made there" in outcome.stderr and "wrote" not in outcome.stderr


def test_images_beyond_memory_are_refused_before_they_are_read(user: User) -> None:
    outcome = faqd_deploy("ptq", *user.teacher, *user.data, "--image-size", 1_000_000, "--out", user.folder / "large")
    assert outcome.code == 2 and "GiB, and this machine has" in outcome.stderr
