"""A folder of runs is evaluated, exported and shown as one; a folder that is something else is called that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from faqd.benchmarks.cli import bench_command
from faqd.sweep import members, table
from tests.fixtures.toy_runs import faqd_deploy, faqd_train, new_user, outcome_of, succeeds


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    user = new_user(tmp_path_factory.mktemp("user"))
    succeeds(user.distill(user.folder / "runs", "--weight-bits", "2,8", "--steps", 2))
    shutil.copytree(user.folder / "runs" / "w8a8-s0", user.folder / "runs" / "w8a8-s10")
    (user.folder / "runs" / "w8a8-s10" / "weights.safetensors").unlink()
    return user.folder / "runs"


NAMES = ["w2a8-s0", "w8a8-s0", "w8a8-s10"]


def test_members_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("w8a8-s10", "w8a8-s2", "w2a8-s0", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("run.json" if name != "other" else "x")).touch()
    assert [path.name for path in members(tmp_path, "run.json")] == ["w2a8-s0", "w8a8-s2", "w8a8-s10"]
    (tmp_path / "run.json").touch()
    assert members(tmp_path, "run.json") == members(tmp_path / "none", "run.json") == []
    assert table([{"run": "a", "n": "10"}, {"run": "bcd", "n": "2"}]) == ["run   n", "a    10", "bcd   2"]


def test_eval_and_inspect_give_one_table_of_runs(runs: Path) -> None:
    found = succeeds(faqd_train("eval", runs))
    heading, *rows = found.stdout.splitlines()
    assert heading.split()[:2] == ["run", "images"] and [row.split()[0] for row in rows] == NAMES[:2]
    assert "w8a8-s10: this run did not finish" in found.stderr
    both = json.loads(succeeds(faqd_train("eval", runs, "--json", "-")).stdout)
    assert [one["run"] for one in both] == NAMES[:2] and all("snr_db" in one for one in both)
    assert {**json.loads(faqd_train("eval", runs / NAMES[0], "--json", "-").stdout), "run": NAMES[0]} == both[0]
    heading, *rows = succeeds(faqd_deploy("inspect", runs)).stdout.splitlines()
    assert [row.split()[0] for row in rows] == NAMES and [row.split()[3] for row in rows] == ["yes", "yes", "no"]


def test_export_writes_every_bundle_that_can_be_and_names_the_others(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundles"
    found = faqd_deploy("export", runs, "--out", out, "--eval-samples", 8, "--json", tmp_path / "all.json")
    assert found.code == 1 and "w8a8-s10: no bundle: " in found.stderr and "this run did not finish" in found.stderr
    assert sorted(path.name for path in out.iterdir()) == NAMES[:2]
    assert [one["bundle"] for one in json.loads((tmp_path / "all.json").read_text())] == NAMES[:2]
    heading, *rows = succeeds(faqd_deploy("inspect", out)).stdout.splitlines()
    assert heading.split()[0] == "bundle" and [row.split()[:4] for row in rows] == [
        [NAMES[0], "distilled", "2/8", "passed"],
        [NAMES[1], "distilled", "8/8", "passed"],
    ]
    again = faqd_deploy("export", runs, "--out", out, "--min-fidelity", "1")
    assert again.stderr.count("is there already, and stays") == 2 and "is below --min-fidelity 1" in again.stderr


def test_a_folder_that_is_something_else_is_called_that(runs: Path, tmp_path: Path) -> None:
    run, bundle = runs / NAMES[1], tmp_path / "bundles" / "one"
    succeeds(faqd_deploy("export", run, "--out", bundle, "--eval-samples", 8))
    for said, outcome in (
        (f"it is a run, of which `faqd-deploy export {run} --out BUNDLE` makes one", outcome_of(bench_command, (run,))),
        ("it is a file: name the folder", faqd_deploy("verify", bundle / "manifest.json")),
        ("it holds bundles: name one of one", faqd_deploy("verify", bundle.parent)),
        ("`faqd-deploy export RUN --out BUNDLE` makes one", faqd_deploy("verify", tmp_path)),
        (f"`faqd-deploy export RUN --out {tmp_path / 'no'}` makes one", faqd_deploy("verify", tmp_path / "no")),
        ("it is a bundle: name the run that it was made of", faqd_train("eval", bundle)),
        ("it holds runs: name one of w2a8-s0, w8a8-s0", faqd_train("inspect", "--teacher", runs)),
    ):
        assert outcome.code == 2 and said in outcome.stderr, outcome.stderr
