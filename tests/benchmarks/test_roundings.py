"""The study that tells weights from activations by a user's metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from faqd.benchmarks.studies.roundings import figures
from faqd.quantize.capture.capture import capture


def nearness(outputs: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    ((ours,), (theirs,)) = (list(each.values()) for each in (outputs, found["teacher"]))
    return float(100 - 100 * abs(ours - theirs).mean() / abs(theirs).mean())


def test_a_tensor_of_unlike_channels_loses_by_its_activations() -> None:
    torch.manual_seed(0)
    wide, narrow = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
    with torch.no_grad():
        wide.weight[0] *= 1e4
        narrow.weight[:, 0] *= 1e-4
    x = torch.rand(24, 3, 8, 8)
    network = capture(nn.Sequential(wide, nn.ReLU(), narrow).eval(), x[:2])
    with torch.no_grad():
        found = figures(network, x[:12], x[12:], nearness)
    assert found["weights"] > 95 > 80 > found["activations"] and found["all"] < 80
