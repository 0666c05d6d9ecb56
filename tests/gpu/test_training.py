"""Distillation on a CUDA GPU: the same losses as on the CPU, images resident or not, half precision, pauses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures.toy_runs import User, new_user, succeeds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch sees no CUDA device"),
]


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


def losses(user: User, out: Path, *more: object) -> dict[str, float]:
    outcome = user.distill(out, "--steps", 6, "--weight-bits", 4, "--act-bits", 4, "--json", "-", *more)
    found: dict[str, Any] = json.loads(succeeds(outcome).stdout)
    return dict(found["select"])


@pytest.fixture(scope="module")
def on_cpu(user: User, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return losses(user, tmp_path_factory.mktemp("cpu") / "run", "--device", "cpu")


@pytest.mark.parametrize(
    "options",
    [(), ("--teacher-dtype", "bf16"), ("--autocast", "bf16"), ("--autocast", "fp16"), ("--affinity", "l1")],
    ids=lambda options: " ".join(options) or "float32",
)
def test_the_losses_are_those_of_the_cpu(
    user: User, on_cpu: dict[str, float], options: tuple[str, ...], tmp_path: Path
) -> None:
    other = "--affinity" in options
    wanted = losses(user, tmp_path / "cpu", "--device", "cpu", *options) if other else on_cpu
    found = losses(user, tmp_path / "gpu", "--device", "cuda", *options)
    assert found == pytest.approx(wanted, rel=0.1)


def test_images_may_stay_on_the_host(
    user: User, on_cpu: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("faqd.train.loop.batches.SHARE_OF_FREE", 0.0)
    assert losses(user, tmp_path / "run", "--device", "cuda") == pytest.approx(on_cpu, rel=0.1)


def test_a_paused_run_goes_on(user: User, on_cpu: dict[str, float], tmp_path: Path) -> None:
    line = ("--device", "cuda", "--steps", 6, "--weight-bits", 4, "--act-bits", 4, "--time-limit", 0.001)
    assert "paused" in succeeds(user.distill(tmp_path / "run", *line)).stderr
    assert losses(user, tmp_path / "run", "--device", "cuda", "--resume") == pytest.approx(on_cpu, rel=0.1)
