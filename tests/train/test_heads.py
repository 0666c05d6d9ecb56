"""The distance of outputs in units of the teacher: what a branch is, what counts, and how much."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from faqd.fidelity import Branch, fidelity
from faqd.quantize.capture.capture import capture
from faqd.quantize.outputs import named_outputs
from faqd.train.losses.heads import Head, certainties, distance, heads_of

EXAMPLE = torch.zeros(2, 3, 6, 6)
BOXES, GATE, CLASSES = slice(0, 4), slice(4, 5), slice(5, 8)


class Detector(nn.Module):
    """Boxes, objectness and classes of very different sizes in one output, and scores in another."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes, self.gate, self.classes = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 1, 1), nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = torch.cat((100 * self.boxes(x), torch.cat((self.gate(x).sigmoid(), self.classes(x).sigmoid()), 1)), 1)
        return {"maps": maps, "scores": self.head(x.mean((2, 3)))}


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any, dict[str, Head], Tensor]:
    torch.manual_seed(0)
    traced = capture(Detector().eval(), EXAMPLE)
    x = torch.randn(40, 3, 6, 6)
    with torch.no_grad():
        outputs = named_outputs(traced(x))
    return traced, outputs, heads_of(traced, lambda part: named_outputs(traced(part)), x.split(7)), x


def test_branches_and_their_figures(made: tuple[Any, Any, dict[str, Head], Tensor]) -> None:
    _, outputs, heads, _ = made
    maps = heads["maps"]
    spans = [(branch.start, branch.end, branch.probability, branch.gate) for branch in maps.branches]
    assert spans == [(0, 4, False, False), (4, 5, True, True), (5, 8, True, False)]
    variance = outputs["maps"].double().var((0, 2, 3), unbiased=False)
    boxes = variance[BOXES]
    assert maps.branches[0].variance == pytest.approx(boxes.clamp_min(0.1 * boxes.mean()).tolist(), rel=1e-6)
    assert maps.branches[2].variance == pytest.approx([float(variance[CLASSES].mean())], rel=1e-6)
    sure = (outputs["maps"][:, GATE] * outputs["maps"][:, CLASSES].amax(1, keepdim=True)).double().sqrt()
    assert maps.certainty == pytest.approx(float(sure.mean()), rel=1e-6)
    assert [head.certainty for head in heads.values()] == [maps.certainty, None]
    assert Head.from_json(maps.to_json()) == maps


def test_a_distance_is_the_mean_over_branches_weighted_by_certainty(
    made: tuple[Any, Any, dict[str, Head], Tensor],
) -> None:
    _, outputs, heads, _ = made
    student = {name: value + 0.1 * torch.randn_like(value) for name, value in outputs.items()}
    found = distance(student, outputs, heads)
    ours, theirs = student["maps"].double(), outputs["maps"].double()
    square = (ours - theirs).square()
    maps = heads["maps"]
    assert maps.certainty is not None
    sure = (theirs[:, GATE] * theirs[:, CLASSES].amax(1, keepdim=True)).sqrt() / maps.certainty
    boxes = square[:, BOXES] / torch.tensor(maps.branches[0].variance, dtype=torch.float64).view(1, -1, 1, 1) * sure
    gate = square[:, GATE] / maps.branches[1].variance[0]
    classes = square[:, CLASSES] / maps.branches[2].variance[0] * sure
    wanted = (boxes.mean() + gate.mean() + classes.mean()) / 3
    assert float(found["maps"]) == pytest.approx(float(wanted), rel=1e-5)


def test_a_constant_student_has_a_distance_of_about_one(made: tuple[Any, Any, dict[str, Head], Tensor]) -> None:
    _, outputs, heads, _ = made
    constant = {name: value.mean((0, *range(2, value.dim())), keepdim=True) for name, value in outputs.items()}
    constant = {name: value.expand_as(outputs[name]) for name, value in constant.items()}
    found = distance(constant, outputs, {name: Head(head.branches) for name, head in heads.items()})
    assert all(float(value) == pytest.approx(1, abs=0.2) for value in found.values())
    assert all(float(value) == 0 for value in distance(outputs, outputs, heads).values())


def test_an_output_that_never_moves_has_a_distance_all_the_same() -> None:
    torch.manual_seed(0)
    network = Detector().eval()
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    traced = capture(network, EXAMPLE)
    heads = heads_of(traced, lambda part: named_outputs(traced(part)), [torch.randn(5, 3, 6, 6)])
    assert heads["scores"].branches == (Branch(0, 2, False, (1.0, 1.0)),)
    outputs = named_outputs(traced(EXAMPLE))
    moved = {name: value + 1 for name, value in outputs.items()}
    assert all(torch.isfinite(value) for value in distance(moved, outputs, heads).values())


def test_places_are_shared_by_outputs_of_one_size() -> None:
    heads = {"heat": Head((Branch(0, 2, True, (1.0,)),), 0.5), "size": Head((Branch(0, 2, False, (1.0, 1.0)),), 0.5)}
    heat = torch.zeros(1, 2, 1, 2)
    heat[0, 1, 0, 0] = 0.5
    outputs = {"heat": heat, "size": torch.zeros(1, 2, 1, 2)}
    assert certainties(outputs, heads)[torch.Size((1, 2))].flatten().tolist() == pytest.approx([0.5, 0])
    wrong = torch.zeros(1, 2, 1, 2)
    wrong[..., 1] = 9  # where nothing is
    assert float(distance({**outputs, "size": wrong}, outputs, heads)["size"]) == pytest.approx(0)


def test_the_fidelity_of_files_is_the_distance_of_training(made: tuple[Any, Any, dict[str, Head], Tensor]) -> None:
    _, outputs, heads, _ = made
    axes = {name: [0, *range(2, value.dim())] for name, value in outputs.items()}
    noise = {
        name: 0.1 * torch.randn_like(value) * value.std(axes[name], keepdim=True) for name, value in outputs.items()
    }
    found = {name: value + noise[name] for name, value in outputs.items()}
    wanted = {name: 1 - float(value) for name, value in distance(found, outputs, heads).items()}
    arrays = [{name: value.numpy() for name, value in named.items()} for named in (found, outputs)]
    kept = fidelity(arrays[0], arrays[1], {name: head.branches for name, head in heads.items()})
    assert kept == pytest.approx(wanted, abs=1e-5) and all(0.5 < value < 0.999 for value in kept.values())
    assert fidelity(arrays[0], arrays[1], {})["maps"] != pytest.approx(wanted["maps"], abs=1e-3), "branches count"
