"""The benchmark of a training iteration, and the full-length CIFAR-10 run rehearsed on a few images."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from faqd.benchmarks.studies import cifar10, iteration
from faqd.errors import UserError
from faqd.quantize.quantizers.activation import ActivationQuantizer
from faqd.train.data import augment
from faqd.train.loop import batches
from faqd.train.loop.distributed import CPU
from faqd.train.networks.tensor_files import read_tensors
from tests.fixtures.toy_runs import Outcome, outcome_of, succeeds
from tests.train.test_data import small_cifar10

SMALL = ("--teacher", "resnet8", "--student", "resnet8")


def run_of(command: object, *arguments: object) -> Outcome:
    return outcome_of(command, arguments)


@pytest.mark.parametrize("form", ["l1", "l2"])
def test_both_iterations_compute_the_same(form: str, tmp_path: Path) -> None:
    found = iteration.checked(form, "resnet14", "resnet8", CPU, tmp_path)
    assert set(found) == {"losses", "weight gradients", "other gradients"}
    assert max(found.values()) < 1e-10


def test_another_gradient_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ActivationQuantizer.forward
    monkeypatch.setattr(ActivationQuantizer, "forward", lambda self, x: plain(self, x) * (1 + 1e-3))
    with pytest.raises(UserError, match="the two iterations differ"):
        iteration.checked("l2", "resnet8", "resnet8", CPU, tmp_path)


def test_another_augmentation_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "augment", lambda *arguments: augment.augment(*arguments).flip(3))
    with pytest.raises(UserError, match="the two iterations differ"):
        iteration.checked("l2", "resnet8", "resnet8", CPU, tmp_path)


def test_the_record_names_times_shares_and_the_machine(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    line = (*SMALL, "--batch-size", 4, "--rounds", 2, "--threads", threads, "--json", tmp_path / "record.json")
    outcome = succeeds(run_of(iteration.command, *line))
    record: dict[str, Any] = json.loads((tmp_path / "record.json").read_text())
    assert record["threads"] == threads and record["environment"]["cpu"] and record["versions"]["torch"]
    assert record["targets"] == []  # the bounds are for other networks
    names = [row["variant"] for row in record["variants"]]
    assert names == [
        f"{form}, {what}" for form in ("l2", "l1") for what in ("straightforward", "FP32 teacher", "bf16 teacher")
    ]
    for row in record["variants"]:
        assert row["rounds"] == 2 and 0 < row["min_ms"] <= row["median_ms"]
        assert math.isclose(sum(row["share"].values()), 1) and len(row["share"]) == 6
        assert row["variant"] in outcome.stdout
        if "against" in row:
            assert row["against"].startswith(row["variant"][:2]) and row["speed_up"]["ratio_of_minima"] > 0


def test_targets_compare_like_with_like() -> None:
    gains = {"l2, FP32 teacher": 5.0, "l2, bf16 teacher": 4.5, "l1, FP32 teacher": 2.0, "l1, bf16 teacher": 3.0}
    rows = [{"variant": name, "speed_up": {"ratio_of_minima": gain}} for name, gain in gains.items()]
    assert [claim["met"] for claim in iteration.targets(rows)] == [True, False, False, True]


def test_the_full_length_run_is_rehearsed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_cifar10(tmp_path / "data" / "cifar-10-batches-py", monkeypatch)
    monkeypatch.setattr(cifar10, "ROUNDS", 1)
    results = tmp_path / "results"
    places = ("--data-root", tmp_path / "data", "--work", tmp_path / "work", "--results", results, "--device", "cpu")
    line = (*SMALL, *places, "--steps", 2, "--batch-size", 4)
    said = []
    for limit in (1e-3, 1e-3, 1e-3, 600):
        assert not results.exists()
        said.append(succeeds(run_of(cifar10.command, *line, "--time-limit", limit)).stderr)
    assert "teacher: paused by --time-limit after iteration 1 of 2" in said[0]
    assert "work: paused by --time-limit after iteration 1 of 2" in said[1]
    assert "teacher: paused by --time-limit; the same command goes on" in said[2]
    record: dict[str, Any] = json.loads((results / "cifar10-resnet8.json").read_text())
    assert [entry["run"] for entry in record["students"]] == ["w8a8-s0", "w4a4-s0", "w2a4-s0", "w1a4-s0"]
    for entry in (record["teacher"], *record["students"]):
        assert entry["images"] == 20 and 0 <= entry["teacher_accuracy"] <= 1 and entry["seconds_per_epoch"] > 0
        assert entry["recipe"]["training"]["seed"] == entry["recipe"]["training"]["data_seed"] == 0
    assert all(0 <= entry["student_accuracy"] <= 1 for entry in record["students"])
    assert record["device"] == "CPU" and len(record["iteration"]["variants"]) == 6
    kept = read_tensors(results / "cifar10-resnet8.safetensors")
    assert kept.keys() == read_tensors(tmp_path / "work" / "teacher" / "weights.safetensors").keys()
