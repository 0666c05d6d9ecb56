"""Training of networks that are not of the zoo, rehearsed with tiny ones and restarted; scenes; and intervals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from faqd.benchmarks.measure.user_metric import load_metric
from faqd.benchmarks.studies import own_networks as foreign
from faqd.benchmarks.studies import own_networks_models as foreign_networks
from faqd.benchmarks.studies import scenes
from faqd.benchmarks.studies.own_networks_table import Judged, rows
from faqd.errors import UserError
from faqd.quantize.capture.capture import capture
from faqd.share import Share
from tests.fixtures.toy_runs import Outcome, everything_in, outcome_of, succeeds
from tests.train.test_data import small_cifar10

TINY = """
import torch
from torch import nn


class Mobile(nn.Module):
    def __init__(self):
        super().__init__()
        self.depthwise = nn.Sequential(nn.Conv2d(3, 6, 3, 4, 1, groups=3), nn.BatchNorm2d(6), nn.ReLU6())
        self.classifier = nn.Linear(6, 10)

    def forward(self, x):
        return self.classifier(self.depthwise(x).mean((2, 3)))


def mobilenet():
    return Mobile()


def segmenter():
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 10, 1))
"""


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with few photographs of noise, and in place of the two networks tiny ones."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "tiny.py").write_text(TINY)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        small_cifar10(folder / "cifar-10-batches-py", patch, each=100)
        patch.setattr("faqd.benchmarks.studies.own_networks_work.NETWORKS", folder / "tiny.py")
        for module in ("faqd.train.loop.calibration_images", "faqd.benchmarks.studies.own_networks"):
            patch.setattr(f"{module}.CALIBRATION_IMAGES", 32)
        yield folder
    torch.set_num_threads(threads)


def studied(small: Path, network: str, *more: object) -> Outcome:
    line = ("--network", network, "--data-root", small, "--out", small / network, "--seeds", 2)
    return outcome_of(foreign.command, (*line, "--teacher-steps", 3, "--steps", 2, "--json", "-", *more))


@pytest.mark.parametrize(("network", "bits"), [("mobilenet", (4,)), ("segmenter", (8, 4))])
def test_the_whole_command_and_its_restart(
    small: Path, network: str, bits: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign, "BITS", bits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreign, "deployable", interrupted)
        assert studied(small, network).code == 130
    before = everything_in(small / network / "students")
    outcome = succeeds(studied(small, network))
    assert everything_in(small / network / "students") == before
    result = json.loads(outcome.stdout)
    labels = [f"{each}/{each}" for each in bits]
    assert [(row["method"], row["bits"], row["n"]) for row in result["table"]] == [
        ("float", "32/32", 1),
        *[(method, bits, 2) for method in ("ptq", "distilled") for bits in labels],
    ]
    name = "pixel_accuracy" if network == "segmenter" else "top1"
    assert f"| distilled | 4/4 | {100 * result['table'][-1][name]['mean']:.2f} [" in outcome.stderr
    # The bundles have the accuracy of the students they are made of, through onnxruntime.
    first = {(row["method"], row["bits"]): row[name]["by_seed"][0] for row in result["table"]}
    assert accuracy(result["bundles"]["teacher"]) == pytest.approx(first["float", "32/32"])
    students = result["bundles"]["students"]
    assert list(students) == [f"{method}-w{each}a{each}" for each in bits for method in ("ptq", "distilled")]
    assert {entry["verify"] for entry in students.values()} == {"passed"}
    for folder, entry in students.items():
        method, name = folder.split("-")
        assert accuracy(entry) == pytest.approx(first[method, f"{name[1]}/{name[3]}"], abs=0.02)


def accuracy(entry: dict[str, Any]) -> float:
    return float(entry["metric"]["pixel_accuracy"] if entry["metric"] else entry["top1"]["value"])


def interrupted(student: object) -> None:
    raise KeyboardInterrupt


def test_another_study_needs_another_folder(small: Path) -> None:
    (small / "taken").mkdir()
    (small / "taken" / "study.json").write_text("{}")
    outcome = studied(small, "mobilenet", "--out", small / "taken")
    assert outcome.code == 2 and "holds a study with other options" in outcome.stderr


@pytest.mark.parametrize(("network", "shape"), [("mobilenet", (2, 10)), ("segmenter", (2, 10, 32, 32))])
def test_the_networks_are_captured(network: str, shape: tuple[int, ...]) -> None:
    example = torch.zeros(2, 3, 64, 64)
    assert capture(getattr(foreign_networks, network)(), example)(example).shape == shape


# Scenes -------------------------------------------------------------------------------------------------------------


def test_a_target_is_the_class_of_the_photograph_that_lies_there(tmp_path: Path) -> None:
    labels = np.arange(42) % 10
    grey = np.arange(42, dtype=np.uint8) * 5
    photos = np.broadcast_to(grey[:, None, None, None], (42, 32, 32, 3))
    scenes.write_scenes(photos, labels, tmp_path / "scenes.npz")
    with np.load(tmp_path / "scenes.npz") as file:
        images, targets = file["images"], file["targets"]
    assert images.shape == (10, 64, 64, 3) and targets.shape == (10, 32, 32)
    for step in (slice(0, None, 2), slice(1, None, 2)):
        assert np.array_equal(labels[images[:, step, step, 0] // 5], targets)
    shown = [set(np.unique(image)) for image in images]
    assert [len(each) for each in shown] == [4] * 10 and len(set.union(*shown)) == 40
    order = np.random.default_rng(0).permutation(10)
    assert np.array_equal(scenes.targets_of(images[order], tmp_path / "scenes.npz"), targets[order])
    with pytest.raises(UserError, match="1 of 2 scenes are not in it"):
        scenes.targets_of(np.stack([images[0], images[0] // 2]), tmp_path / "scenes.npz")


def test_the_metric_of_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (3, 64, 64, 3), np.uint8)
    targets = generator.integers(0, 3, (3, 32, 32), np.uint8)
    np.savez(tmp_path / "scenes.npz", images=images, targets=targets)
    metric = load_metric(foreign.METRIC).function
    wanted = np.eye(10, dtype=np.float32)[targets].transpose(0, 3, 1, 2)
    monkeypatch.delenv("FAQD_SCENES", raising=False)
    with pytest.raises(UserError, match="FAQD_SCENES is not set"):
        metric({"logits": wanted}, {"images": images})
    monkeypatch.setenv("FAQD_SCENES", str(tmp_path / "scenes.npz"))
    assert metric({"logits": wanted}, {"images": images}) == {"pixel_accuracy": 1.0, "mean_iou": 1.0}
    # Class 0 everywhere: its intersection is its share of the pixels, its union all; the other two have none.
    share = float((targets == 0).mean())
    found = metric({"logits": np.eye(10)[np.zeros_like(targets)].transpose(0, 3, 1, 2)}, {"images": images})
    assert found == pytest.approx({"pixel_accuracy": share, "mean_iou": share / 3})


# Intervals ----------------------------------------------------------------------------------------------------------


def test_intervals_of_a_share_are_those_of_the_binomial() -> None:
    right = (np.arange(1000) % 4 > 0).astype(np.int64)[:, None]
    worse = right * (np.arange(1000) % 10 > 0)[:, None]
    judged = [Judged("float", "32/32", 0, right)]
    judged += [Judged("ptq", "4/4", seed, worse) for seed in (0, 1)]
    judged += [Judged("distilled", "4/4", 0, right), Judged("distilled", "4/4", 1, worse)]
    teacher, ptq, distilled = (row["top1"] for row in rows(judged, {"top1": lambda sums: sums[..., 0] / 1000}))
    low, high = Share(750, 1000).interval
    assert (teacher["low"], teacher["high"]) == pytest.approx((low, high), abs=3e-3)
    assert "to_teacher" not in teacher and teacher["std"] is None
    lost = float((right - worse).mean())
    half = 1.96 * float((right - worse).std()) / 1000**0.5
    assert ptq["to_teacher"]["mean"] == pytest.approx(-lost)
    assert (ptq["to_teacher"]["low"], ptq["to_teacher"]["high"]) == pytest.approx(
        (-lost - half, -lost + half), abs=3e-3
    )
    assert ptq["std"] == 0 and distilled["by_seed"] == pytest.approx([0.75, 0.75 - lost])
    # Half of the seeds gain what PTQ lost: half the difference, and half its interval.
    gain = distilled["to_ptq"]
    assert (gain["mean"], gain["low"], gain["high"]) == pytest.approx(
        (lost / 2, (lost - half) / 2, (lost + half) / 2), abs=3e-3
    )
    assert gain["over_seeds"]["mean"] == pytest.approx(lost / 2)
