"""An option that would do nothing is refused with its reason, before anything is read or measured."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from faqd.benchmarks.cli import bench_command
from tests.fixtures.toy_runs import faqd_deploy, faqd_train, outcome_of

SOURCE = ("--teacher", "net.py:build", "--teacher-weights", "best.pth", "--data", "folder:images", "--out", "out")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--temperature 2", "--temperature: only the outputs of --logit kl are softened; leave it out."),
        ("--temperature 4.0 --logit mse", "--temperature: only the outputs"),
        ("--logit kl --temperature 2 --logit-weight 0", "--logit, --temperature: the outputs do not count"),
        ("--affinity none --affinity-floor 0.1", "--affinity-floor: no affinity is compared"),
        ("--columns 15 --affinity l2", "--columns: only --affinity fast has projections"),
        ("--steps 3 --epochs 2", "--epochs: --steps says how long the training is"),
        ("--act-bits 32 --rounding ceil", "--rounding: no activation is rounded with --act-bits 32"),
        ("--weight-bits 3 --equalize always", "--equalize: only students of 4/4 bits and more"),
        ("--init scratch --equalize always", "--equalize: only students of 4/4 bits and more"),
        ("--data folder:more", "folder:more: give one source"),
        ("--download", "--download: --data folder:"),
        ("--data-root sets", "is no published data set to look for (cifar10, cifar100, tiny-imagenet are)"),
    ],
)
def test_distill(line: str, said: str) -> None:
    refused = faqd_train("distill", *SOURCE, *line.split())
    assert refused.code == 2 and said in refused.stderr, refused.stderr


@pytest.mark.parametrize(
    "line",
    [
        "--logit kl --temperature 2",
        "--affinity fast --columns 3",
        "--weight-bits 4,8 --equalize always",
        "--act-bits 32,8 --rounding ceil",
    ],
)
def test_what_has_an_effect_goes_on_to_the_files(line: str) -> None:
    refused = faqd_train("distill", *SOURCE, *line.split())
    assert refused.code == 2 and "net.py: no such file" in refused.stderr, refused.stderr


def test_other_commands_that_read_data_or_a_run() -> None:
    for said, outcome in (
        ("--labels: --data npz:", faqd_train("teacher", "--data", "npz:a.npz", "--labels", "--out", "run")),
        (
            "--float-type: --target onnxruntime",
            faqd_deploy("ptq", *SOURCE, "--target", "onnxruntime", "--float-type", "fp32"),
        ),
        ("--image-size: a run knows its input", faqd_train("inspect", "--teacher", ".", "--image-size", "8")),
    ):
        assert outcome.code == 2 and said in outcome.stderr, outcome.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--from r.json --batch 4 --threads 1", "--batch, --threads: --from measures nothing; leave them out."),
        ("--from r.json --min-agreement 0.9 --report r.html", "r.json: no such file"),
        ("--compare a.json b.json --report r.html", "--report: --compare measures nothing"),
        ("--compare a.json b.json --max-p99-ms 3", "--max-p99-ms: --compare measures nothing"),
        ("bundle --skip-latency --duration 1 --sweep", "--duration, --sweep: --skip-latency times nothing"),
        ("bundle --energy-duration 0 --power-rail VIN", "--power-rail: --energy-duration 0 measures no energy"),
        (
            "bundle --threads 100000",
            f"may use {len(os.sched_getaffinity(0))} core(s) of the machine; give at most that.",
        ),
    ],
)
def test_the_bench(line: str, said: str) -> None:
    refused = outcome_of(bench_command, tuple(line.split()))
    assert refused.code == 2 and said in refused.stderr, refused.stderr
