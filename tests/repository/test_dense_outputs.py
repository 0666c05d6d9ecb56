"""A network of several dense outputs from distillation to the bench, through the commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from faqd.bundle import load_bundle
from faqd.files import read_json
from tests.fixtures.toy_runs import User, faqd_deploy, faqd_train, succeeds, write_images, write_net

SEGMENTATION = """
import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU6())
        self.classes, self.edges = nn.Conv2d(16, 3, 1), nn.Conv2d(8, 1, 1)

    def forward(self, x):
        one = self.down(x)
        two = self.deep(one)
        up = F.interpolate(two, size=one.shape[2:], mode="bilinear")
        return {"classes": self.classes(torch.cat([one, up], 1)), "edges": self.edges(two)}


def build():
    return Net()
"""


def test_from_distillation_to_the_bundle(tmp_path: Path) -> None:
    write_net(tmp_path, SEGMENTATION)
    user = User(tmp_path)
    write_images(tmp_path / "images")
    run, out = tmp_path / "run", tmp_path / "bundle"
    succeeds(user.distill(run, "--exclude", "^edges$", "--affinity-weight", 0.1))
    record = read_json(run / "run.json")
    assert {"logit classes", "logit edges", "affinity"} <= set(record["select"])
    assert record["recipe"]["exclude"] == ["^edges$"] and record["taps"]
    succeeds(faqd_deploy("export", run, "--out", out))
    bundle = load_bundle(out)
    assert [entry["name"] for entry in bundle.manifest["outputs"]] == ["classes", "edges"]
    assert {row["name"]: row["runs_int8"] for row in bundle.manifest["layers"]}["edges"] is False
    stored = bundle.evaluation().teacher
    assert stored["classes"].shape[1:] == (3, 8, 8) and stored["edges"].shape[1:] == (1, 4, 4)
    verification = read_json(out / "verify.json")
    assert verification["passed"] and set(verification["between_flavours"]["snr_db"]) == {"classes", "edges"}
    assert all(np.isfinite(value) for value in verification["as_trained"]["snr_db"].values() if value is not None)
    evaluated = succeeds(faqd_train("eval", run))
    assert "snr_db" in evaluated.stdout
