"""Which roundings cost most, and what has to stay float for them to go."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor, nn

from faqd.fidelity import KEPT, RUINED
from faqd.quantize import nodes
from faqd.quantize.calibrate import calibrate
from faqd.quantize.config import QuantConfig
from faqd.quantize.prepare import insert_quantizers, prepare
from faqd.quantize.sensitivity import KINDS, Sensitivity
from faqd.quantize.student import Student

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SEEN = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class OneBad(nn.Module):
    """One of the tensors has a channel ten thousand times as large as those that the outputs live on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.wide = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)
        self.relu, self.head = nn.ReLU(), nn.Linear(128, 5)
        with torch.no_grad():
            self.wide.weight[0] *= 1e4
            self.narrow = nn.Conv2d(8, 8, 1)
            self.narrow.weight[:, 0] *= 1e-4

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.second(self.relu(self.first(x))))
        scores: Tensor = self.head(self.relu(self.narrow(self.relu(self.wide(x)))).flatten(1))
        return scores


EIGHT = QuantConfig()


def made(network: nn.Module, config: QuantConfig = EIGHT) -> Student:
    student = prepare(network.eval(), X[:2], config)
    student.eval()
    calibrate(student, X)
    return student


@pytest.fixture(scope="module")
def asked() -> Sensitivity:
    torch.manual_seed(0)
    return Sensitivity(made(OneBad()), SEEN, [X], "mse")


def test_the_culprit_stands_first_with_who_reads_it(asked: Sensitivity) -> None:
    parts = asked.parts()
    kinds = {(part.place, part.kind) for part in parts}
    assert len(kinds) == len(parts) and {kind for _, kind in kinds} == {"activations", "weights"}
    assert {place for place, kind in kinds if kind == "weights"} == {"first", "second", "wide", "narrow", "head"}
    assert parts[0].kind == "activations" and parts[0].readers == ("narrow",)
    channels = parts[0].channels
    assert channels and channels.count == 8 and channels.largest > 100 * channels.median and channels.lost == 7
    assert all((part.channels is None) == (part.kind == "weights") for part in parts)
    assert parts[0].distance > 0.3 > 10 * parts[1].distance
    assert [part.distance for part in parts] == sorted((part.distance for part in parts), reverse=True)


def test_a_part_says_what_share_of_integers_its_readers_have(asked: Sensitivity) -> None:
    parts = asked.parts()
    assert sum(part.int8_share for part in parts if part.kind == "weights") == pytest.approx(1)
    best = list(asked.trials(parts))[-1]
    assert parts[0].int8_share == pytest.approx(1 - best.int8_share) and best.exclude == "^narrow$"


def test_weights_and_activations_apart_say_which_kind_is_to_blame(asked: Sensitivity) -> None:
    by_kind = {kind: asked.all_of(kind) for kind in KINDS}
    assert by_kind["activations"] > 0.3 > 10 * by_kind["weights"] > 0


def test_afterwards_the_student_rounds_as_before(asked: Sensitivity) -> None:
    with torch.no_grad():
        before = asked.student.network(SEEN)
        asked.parts()
        asked.all_of("weights")
        assert torch.equal(asked.student.network(SEEN), before)


def test_leaving_the_culprit_float_cures_it_and_the_trial_is_what_exclude_makes(asked: Sensitivity) -> None:
    parts = asked.parts()
    first, *more = asked.trials(parts)
    assert (first.exclude, first.floats, first.int8_share) == ("", 0, 1.0) and first.fidelity < KEPT
    best = more[-1]
    assert best.exclude == "^narrow$" and best.floats == 1 and best.fidelity >= KEPT and 0.5 < best.int8_share < 1
    student = insert_quantizers(asked.student.float_network, QuantConfig(exclude=(best.exclude,)), X[:2])
    assert nodes.places(student.network) and "narrow" not in [
        p.place for p in Sensitivity(student, SEEN, [X], "mse").parts()
    ]


def test_the_search_ends_with_the_fewest_that_were_tried_and_repeats_nothing() -> None:
    torch.manual_seed(1)
    sizes = [3, 8, 8, 8, 8, 8]
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 4))
    asked = Sensitivity(made(net, QuantConfig(2, 2)), SEEN, [X], "mse")
    parts = asked.parts()
    trials = list(asked.trials(parts))
    assert len({trial.exclude for trial in trials}) == len(trials) and trials[0].fidelity < RUINED
    places = {place for part in parts for place in part.readers}
    for trial in trials[1:]:
        named = {place for place in places if re.search(trial.exclude, place)}
        assert len(named) == trial.floats


def test_a_good_student_needs_nothing() -> None:
    torch.manual_seed(0)
    asked = Sensitivity(
        made(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))), SEEN, [X], "mse"
    )
    assert [trial.exclude for trial in asked.trials(asked.parts())] == [""]


def test_excluded_before_stays_excluded(asked: Sensitivity) -> None:
    torch.manual_seed(0)
    student = made(OneBad(), QuantConfig(exclude=("^second$",)))
    again = Sensitivity(student, SEEN, [X], "mse")
    parts = again.parts()
    assert "second" not in {part.place for part in parts if part.kind == "weights"}
    best = list(again.trials(parts))[-1]
    assert best.exclude == "^narrow$" and best.fidelity >= KEPT and best.int8_share < 0.7
