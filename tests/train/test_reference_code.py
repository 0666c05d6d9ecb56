"""The recipe that follows the released code: it trains, its adaptors stay behind, and it is exported exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from faqd.bundle import VERIFY
from faqd.quantize import nodes
from faqd.quantize.capture.capture import capture
from faqd.quantize.config import QuantConfig
from faqd.quantize.prepare import insert_quantizers
from faqd.quantize.student import student_table
from faqd.train.loop.trainer import Job
from faqd.train.losses.adaptors import Adapted
from faqd.train.losses.objective import decay_groups
from faqd.train.networks.tensor_files import read_tensors
from faqd.train.networks.zoo import reference_resnet
from faqd.train.recipes import Training, distill_recipe
from faqd.train.run.folder import WEIGHTS
from faqd.train.run.student import recipe_bits
from tests.fixtures.networks import Residual, calibrated, images, lively
from tests.fixtures.toy_runs import faqd_deploy, new_user, succeeds


def test_it_trains_and_is_exported(tmp_path: Path) -> None:
    user, out = new_user(tmp_path / "user"), tmp_path / "run"
    succeeds(user.distill(out, "--recipe", "reference-code", "--steps", 3))
    record = json.loads((out / "run.json").read_text())
    for name in ("weight_bits", "act_bits", "scales", "rounding", "scale_gradient", "affinity", "adaptors"):
        assert record["recipe"][name] == getattr(distill_recipe("reference-code"), name)
    assert len(record["taps"]) == 2 and record["select"]["affinity"] > 0
    kept = read_tensors(out / WEIGHTS)
    assert kept and not any("adaptor" in name for name in kept)
    outcome = succeeds(faqd_deploy("export", out, "--out", tmp_path / "bundle"))
    assert "rounded up" in outcome.stderr
    verified = json.loads((tmp_path / "bundle" / VERIFY).read_text())
    assert verified["passed"] and verified["rounding"] == "ceil"
    assert min(verified["as_trained"]["equal_codes_per_layer"].values()) > 0.99


def test_adaptors_start_as_the_identity_and_learn() -> None:
    student = calibrated(lively(Residual(), 1), QuantConfig(4, 4))
    maps = [n.name for n in student.network.graph.nodes if n.name.endswith("relu_quant") and nodes.is_tensor(n)]
    tapped = nodes.with_taps(student.network, maps)
    shapes = {n.name: nodes.shape(n) for n in student.network.graph.nodes}
    adapted = Adapted(tapped, [shapes[name][1] for name in maps], torch.device("cpu"))
    (output, found), (wanted, plain) = adapted(images(1, 4)), tapped(images(1, 4))
    assert torch.equal(output, wanted) and len(found) == len(maps) > 0
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.stack([each.square().mean() for each in found]).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.adaptors.parameters())


def test_the_float_weights_decay_and_nothing_else() -> None:
    student = calibrated(lively(Residual(), 1), QuantConfig(4, 4))
    network = Adapted(nodes.with_taps(student.network, []), [8], torch.device("cpu"))
    decayed, free = decay_groups(network)
    names = {id(p): name for name, p in network.named_parameters()}
    assert sorted(names) == sorted(id(p) for p in [*decayed, *free])
    layers = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert {names[id(p)] for p in decayed} == {
        f"{name}.weight" if "adaptors" in name else f"{name}.parametrizations.weight.original" for name in layers
    }
    assert {"scale", "bias"} <= {names[id(p)].rpartition(".")[2] for p in free}


@pytest.mark.parametrize("change", ["one is missing", "one is there twice"])
def test_a_parameter_outside_of_one_group_is_our_mistake(tmp_path: Path, change: str) -> None:
    network = nn.Linear(2, 2)
    weight, bias = network.parameters()
    free = [] if change == "one is missing" else [bias, bias]
    with pytest.raises(AssertionError, match="one group"):
        Job("", tmp_path, network, [weight], free, lambda *_: {}, lambda: None, Training(1, 2))


def test_the_reference_student_has_a_bare_stem() -> None:
    network = reference_resnet(20, 3, 10).eval()
    assert [type(m) for m in network.stem] == [nn.Conv2d]
    student = calibrated(network, QuantConfig(4, 4, per_channel=False, rounding="ceil"), shape=(3, 16, 16))
    quantizers = student.quantizers()
    assert quantizers["stem.0"].quant.signed and quantizers["stages.3.1"].shift > 0
    assert student.network(images(1, 2, (3, 16, 16))).shape == (2, 10)


def test_all_but_what_is_excluded_has_the_bits_that_are_asked_for() -> None:
    recipe, example = distill_recipe("reference-code"), torch.zeros(2, 3, 32, 32)
    student = insert_quantizers(capture(reference_resnet(20, 3, 10), example), recipe_bits(recipe), example)
    grids = {row["name"]: (row["weights"], row["inputs"]) for row in student_table(student)}
    floats = {name for name, grid in grids.items() if grid == ("float", "float")}
    assert floats == {"stem.0", "stages.1.0.shortcut.0", "stages.2.0.shortcut.0", "classifier"}
    # What the bare stem gives has both signs.
    assert grids.pop("stages.0.0.conv1") == ("4 (±7)", "8 (-128..127)")
    assert {grids[name] for name in grids.keys() - floats} == {("4 (±7)", "4")}
