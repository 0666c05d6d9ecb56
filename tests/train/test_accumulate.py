"""A batch in parts: the step of the whole, which parts of it are not, and what cannot be cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from faqd.errors import UserError
from faqd.quantize.calibrate import calibrate
from faqd.quantize.capture.capture import capture
from faqd.quantize.config import QuantConfig
from faqd.quantize.prepare import insert_quantizers
from faqd.train.data.datasets import Augmentation
from faqd.train.loop.accumulate import backward
from faqd.train.loop.batches import Batch, Batches, Images, refuse_uneven
from faqd.train.loop.distributed import CPU, ProcessGroup
from faqd.train.loop.teacher_forward import target_of
from faqd.train.loop.trainer import Trainer
from faqd.train.losses.heads import heads_of
from faqd.train.losses.objective import distill_job
from faqd.train.losses.taps import tap_pairs
from faqd.train.networks.source import NetworkSource
from faqd.train.recipes import DistillRecipe, OptimizerName, Training
from faqd.train.run.plan import Plan
from tests.fixtures.networks import lively
from tests.fixtures.toy_runs import User, everything_in, faqd_train, new_user, succeeds

EXAMPLE = torch.zeros(2, 3, 8, 8)
BOUND = 1e-5
"""Of the length of the gradient: float32 sums have another order, which is 2e-7 here."""
LINE = ("--batch-size", 16, "--steps", 9, "--lr", 0.01, "--weight-bits", 4, "--act-bits", 4)


def stepped(run: Path, parts: int, optimizer: OptimizerName = "relative", **options: Any) -> tuple[Tensor, Trainer]:
    """The gradient of one batch of 16 in so many parts, and who made the step: a ResNet-8 of another at 4/4."""
    torch.manual_seed(0)
    source = NetworkSource(3, (8, 8), 10, architecture="resnet8")
    traced = capture(lively(source.build(), 1), EXAMPLE)
    student = insert_quantizers(capture(lively(source.build(), 2), EXAMPLE), QuantConfig(4, 4), EXAMPLE)
    pixels = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    seen = Images(pixels, None, torch.tensor(1 / 64), torch.tensor(-2.0), Augmentation(1, True))
    calibrate(student, [seen.normalised(pixels)], "mse")
    frozen = options.pop("frozen_norm", 1.0)
    training = Training(1, 16, 0.01, optimizer=optimizer, frozen_norm=frozen, accumulate=parts)
    recipe = DistillRecipe("", training, weight_bits=4, act_bits=4, logit="relative", **options)
    pairs = tap_pairs(traced, student, None)
    target = target_of(traced, [theirs for theirs, _ in pairs], CPU)
    heads = heads_of(traced, lambda x: target(x).outputs, [seen.normalised(pixels)])
    job = distill_job(Plan(recipe, run, source, {}), student, pairs, heads)
    trainer = Trainer(job, ProcessGroup())
    trainer.step(Batches(seen, seen, 16, 0, target, ProcessGroup(), parts).at(0), 4)
    gradients = [p.grad.flatten() for p in job.network.parameters() if p.grad is not None]
    return torch.cat(gradients), trainer


def moved(run: Path, parts: int, **options: Any) -> float:
    """How far the gradient of parts is from that of the whole."""
    whole, ours = (stepped(run, number, **options)[0] for number in (1, parts))
    return float((ours - whole).norm() / whole.norm())


@pytest.mark.parametrize("parts", [2, 4, 16])
@pytest.mark.parametrize("affinity", ["l1", "l2", "l2_squared"])
@pytest.mark.parametrize("optimizer", ["relative", "sgd"])
def test_a_step_in_parts_is_that_of_the_whole(
    parts: int, affinity: str, optimizer: OptimizerName, tmp_path: Path
) -> None:
    assert moved(tmp_path, parts, affinity=affinity, optimizer=optimizer) < BOUND


@pytest.mark.parametrize("options", [{"affinity": "l2_batch"}, {"affinity": "fast"}, {"frozen_norm": 0.0}])
def test_what_is_of_a_batch_and_not_of_a_sample_is_another_step(options: dict[str, Any], tmp_path: Path) -> None:
    assert moved(tmp_path, 4, **options) > 10 * BOUND


def test_the_losses_are_those_of_the_whole_and_weights_are_projected_once(tmp_path: Path) -> None:
    (_, whole), (_, ours) = (stepped(tmp_path, parts) for parts in (1, 4))
    assert ours._unseen[1].keys() == whole._unseen[1].keys() == {"logit", "affinity"}
    for name, value in whole._unseen[1].items():
        assert float(ours._unseen[1][name]) == pytest.approx(float(value), rel=BOUND)
    scales = [
        {name: each for name, each in trainer.job.network.state_dict().items() if name.endswith("0.scale")}
        for trainer in (whole, ours)
    ]
    assert len(scales[0]) > 5 and all(scales[1][name].equal(each) for name, each in scales[0].items())


def test_terms_are_shares_of_what_they_are_in_all_parts() -> None:
    """By hand: the mean of x over parts is 3, of which one term is the square and one the value."""
    network = nn.ParameterList([torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)])

    def losses_of(part: Batch) -> dict[str, Tensor]:
        x = network[0][part.x.long()]
        return {"logit": x.square().mean(), "affinity": x.mean(), "label": x.mean()}

    batch = Batch(torch.arange(4), None, None)
    for parts in (1, 2, 4):
        network.zero_grad()
        found = backward(
            batch.parts(parts), losses_of, network, {"logit": 1.0, "affinity": 2.0}, lambda x: x, ProcessGroup()
        )
        assert [float(each) for each in found.values()] == pytest.approx([12.5, 3, 3])
        wanted = [2 * x / 4 / 12.5 + 2 / 4 / 3 + 1 / 4 for x in (1, 2, 3, 6)]
        assert network[0].grad is not None and network[0].grad.tolist() == pytest.approx(wanted, rel=1e-12)


CASES = [
    (16, 3, 100, 1, "--accumulate 3: 16 images do not make so many equal parts; give --batch-size 15."),
    (16, 4, 15, 1, "--accumulate 4: 15 images do not make so many equal parts; give --batch-size 12."),
    (16, 4, 100, 3, "in each of 3 processes that share a batch; give --batch-size 12."),
    (4, 8, 100, 1, "--accumulate 8: 4 images do not make so many equal parts; give fewer of them."),
    (9, 1, 100, 2, "--batch-size 9: not a multiple of the 2 processes that share a batch; give --batch-size 8."),
]


@pytest.mark.parametrize(("size", "parts", "images", "processes", "said"), CASES)
def test_what_does_not_divide_is_refused(size: int, parts: int, images: int, processes: int, said: str) -> None:
    with pytest.raises(UserError) as error:
        refuse_uneven(Training(1, size, accumulate=parts), images, ProcessGroup(0, processes))
    assert str(error.value).endswith(said)
    refuse_uneven(Training(1, 24, accumulate=4), 100, ProcessGroup(0, 2))


# --- whole runs ---


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


def test_a_run_in_parts_is_recorded_and_resumes_to_the_same_bits(user: User, tmp_path: Path) -> None:
    said = succeeds(user.distill(tmp_path / "whole", *LINE, "--accumulate", 4)).stderr
    assert "training: 9 iterations of 16 images in 4 parts" in said
    run = tmp_path / "run"
    while not (run / "weights.safetensors").is_file():
        succeeds(user.distill(run, *LINE, "--accumulate", 4, "--time-limit", 0.001, "--resume"))
    files = [everything_in(each) for each in (run, tmp_path / "whole")]
    assert all(files[0][name] == files[1][name] for name in ("weights.safetensors", "run.json"))
    assert json.loads(files[0]["run.json"])["recipe"]["training"]["accumulate"] == 4
    outcome = user.distill(run, *LINE, "--accumulate", 2, "--resume")
    assert outcome.code == 2 and "recipe.training.accumulate: 4 there, 2 now" in outcome.stderr


def test_what_does_not_divide_is_refused_before_anything_is_written(user: User, tmp_path: Path) -> None:
    outcome = user.distill(tmp_path / "run", *LINE, "--accumulate", 3)
    assert outcome.code == 2 and "--accumulate 3: 16 images" in outcome.stderr
    teacher = ("teacher", "--arch", "resnet8", "--batch-size", 16, "--steps", 2, "--accumulate", 3)
    outcome = faqd_train(*teacher, "--out", tmp_path / "run")
    assert outcome.code == 2 and "--accumulate 3: 16 images" in outcome.stderr
    assert not (tmp_path / "run").exists()
    succeeds(faqd_train(*teacher[:-1], 4, "--out", tmp_path / "run"))
