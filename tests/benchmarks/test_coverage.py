"""The study of public networks: what it writes down of one that goes all the way, and of those that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from faqd.benchmarks.studies import coverage, coverage_network
from faqd.benchmarks.studies.calm_weights import pictures
from faqd.benchmarks.studies.coverage_network import tried
from faqd.benchmarks.studies.public_networks import Public, build, public_networks
from faqd.files import read_json
from faqd.quantize.capture.capture import capture
from tests.fixtures.toy_runs import Outcome, outcome_of


def plain() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1)),
        *(nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


class MixesImages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x - x.mean(0, keepdim=True)


def public(make: Any) -> Public:
    return Public("test/net", "cnn", 16, make)


def test_a_network_that_goes_all_the_way() -> None:
    found = tried(public(plain), engine=False)
    assert found["reached"] == "bundle" and "sentence" not in found
    assert found["layers"] == 3 and found["islands"] == 0 and found["int8_share"] == 1.0
    assert found["snr_db"] > 20 and abs(found["snr_db"] - found["plain_db"]) < 10
    assert found["proved"] == {"tensorrt": True, "onnxruntime": True}
    assert found["seconds"].keys() == found["peak_mib"].keys() == {"capture", "prepare", "calibrate", "bundle"}


def test_a_network_that_is_refused_has_its_sentence_and_no_traceback() -> None:
    found = tried(public(MixesImages), engine=False)
    assert found["reached"] == "capture" and "mixes images" in found["sentence"] and "traceback" not in found


def test_an_error_that_nobody_thought_of_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage_network, "capture", lambda network, example: 1 // 0)
    found = tried(public(plain), engine=False)
    assert found["reached"] == "" and found["sentence"].startswith("ZeroDivisionError") and found["traceback"]


def test_plain_rounding_rounds_weights_and_inputs() -> None:
    x = torch.rand(2, 3, 4, 4)
    layer = nn.Conv2d(3, 4, 1)
    network = capture(nn.Sequential(layer, nn.ReLU()), x)
    rounding = coverage_network._PlainRounding(network)
    rounding.measure(x)
    step = x.max() / 127
    weight = layer.weight.detach()
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    wanted = nn.functional.conv2d((x / step).round() * step, (weight / scale).round() * scale, layer.bias).relu()
    assert torch.allclose(rounding.run(x), wanted, atol=1e-6) and torch.equal(layer.weight, weight)


def test_networks_are_calm_and_tell_images_apart() -> None:
    images = torch.from_numpy(pictures(16, 8, seed=0)).permute(0, 3, 1, 2) / 255.0
    scores = build(public(plain), images)(images)
    assert scores.std() > 0.05 and (scores[0] - scores[1]).abs().max() > 1e-3
    norms = [module for module in build(public(plain), images).modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.get_buffer("running_var").std() > 0 and 0.7 < norm.bias.mean() < 1.3 for norm in norms)


def ran(folder: Path, *more: str) -> Outcome:
    line = ("--out", folder / "work", "--json", folder / "all.json", "--no-engine", *more)
    return outcome_of(coverage.command, line)


def test_what_was_tried_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def apart(network: Public, *_: Any) -> dict[str, Any]:
        asked.append(network.name)
        return {"kind": network.kind, "side": network.side, "reached": "bundle"}

    monkeypatch.setattr(coverage, "_tried_apart", apart)
    some = ("--only", "^timm/(resnet18|resnet50)$")
    assert ran(tmp_path, *some).code == 0 and asked == ["timm/resnet18", "timm/resnet50"]
    assert ran(tmp_path, *some, "--again", "50").code == 0 and asked[2:] == ["timm/resnet50"]
    assert read_json(tmp_path / "all.json")["networks"].keys() == {"timm/resnet18", "timm/resnet50"}


def test_the_list_has_every_kind_once_by_name() -> None:
    networks = public_networks()
    assert len(networks) > 180
    assert {network.kind for network in networks.values()} == {
        *("cnn", "mobile", "hybrid", "transformer"),
        *("segmentation", "detector", "face", "yolo"),
    }
