"""The teacher as a source of targets, its dtype, and autocast of the student: what may be rounded and what may not."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from faqd.quantize import nodes
from faqd.quantize.calibrate import calibrate
from faqd.quantize.capture.capture import capture
from faqd.quantize.capture.fuse_batch_norm import fused, in_place
from faqd.quantize.config import QuantConfig
from faqd.quantize.prepare import insert_quantizers
from faqd.quantize.quantizers.activation import ActivationQuantizer
from faqd.quantize.quantizers.weight import WeightQuantizer
from faqd.train.data.datasets import Augmentation
from faqd.train.loop.batches import Batches, Images
from faqd.train.loop.distributed import CPU, ProcessGroup
from faqd.train.loop.teacher_forward import dtype_effect, target_of
from faqd.train.loop.trainer import Trainer
from faqd.train.losses.objective import AUTOCAST, distill_job
from faqd.train.losses.taps import tap_pairs
from faqd.train.networks.source import NetworkSource
from faqd.train.networks.zoo import build_architecture
from faqd.train.recipes import Autocast, DistillRecipe, TeacherDtype, Training
from faqd.train.run.plan import Plan
from tests.fixtures.networks import NETWORKS, captured, images, lively
from tests.fixtures.toy_runs import User, everything_in, new_user, succeeds

EXAMPLE = torch.zeros(2, 3, 8, 8)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


def trainer_of(run: Path, autocast: Autocast = "none", teacher: TeacherDtype = "fp32") -> tuple[Trainer, Batches]:
    """A ResNet-8 student of a ResNet-8 teacher at 4W4A on random 8-pixel images, with exact L1 affinity."""
    torch.manual_seed(0)
    source = NetworkSource(3, (8, 8), 10, architecture="resnet8")
    traced = capture(lively(source.build(), 1), EXAMPLE)
    student = insert_quantizers(capture(source.build(), EXAMPLE), QuantConfig(4, 4), EXAMPLE)
    pixels = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    seen = Images(pixels, None, torch.tensor(1 / 64), torch.tensor(-2.0), Augmentation(1, True))
    calibrate(student, [seen.normalised(pixels)], "mse", batch_statistics=True)
    training = Training(1, 16, 0.01, clip_norm=20.0)
    recipe = DistillRecipe("", training, weight_bits=4, act_bits=4, affinity="l1", autocast=autocast)
    pairs = tap_pairs(traced, student, None)
    target = target_of(traced, [theirs for theirs, _ in pairs], CPU, teacher)
    job = distill_job(Plan(recipe, run, source, {}), student, pairs)
    return Trainer(job, ProcessGroup()), Batches(seen, seen, 16, 0, target, ProcessGroup())


# The teacher ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_the_teacher_in_place_computes_the_same(name: str) -> None:
    traced = captured(lively(NETWORKS[name](), 1))
    names = [node.name for node in traced.graph.nodes if nodes.is_tensor(node) and len(nodes.shape(node)) == 4]
    x = images(2, 8)
    before = x.clone()
    for tapped in (names, names[:1], []):
        wanted, maps = nodes.with_taps(traced, tapped).eval()(x)
        target = target_of(traced, tapped, CPU)(x)
        torch.testing.assert_close(target.outputs["logits"], wanted, rtol=1e-4, atol=1e-5)
        assert list(target.maps) == tapped and torch.equal(x, before)
        for key, value in zip(tapped, maps, strict=True):
            torch.testing.assert_close(target.maps[key], value, rtol=1e-4, atol=1e-5)


def test_most_of_a_teacher_runs_in_place_without_batch_norm() -> None:
    traced = capture(build_architecture("resnet20", 3, 10, 8), EXAMPLE)
    small = in_place(fused(nodes.with_taps(traced, [])))
    targets = [node.target for node in small.graph.nodes]
    assert targets.count(torch.relu_) == 19 and targets.count(Tensor.add_) == 9
    assert not any(isinstance(module, nn.BatchNorm2d | nn.ReLU) for module in small.modules())


def test_targets_can_be_learned_from_and_have_no_gradient() -> None:
    traced = captured(lively(NETWORKS["residual"](), 1))
    target = target_of(traced, [], CPU)(images(2, 4))
    assert not target.outputs["logits"].requires_grad
    outputs = torch.zeros_like(target.outputs["logits"], requires_grad=True)
    nn.functional.mse_loss(outputs, target.outputs["logits"]).backward()  # saves its target
    assert outputs.grad is not None and outputs.grad.abs().sum() > 0


def test_the_effect_of_bfloat16_is_what_it_does() -> None:
    traced = captured(lively(NETWORKS["residual"](), 1))
    node = next(node.name for node in traced.graph.nodes if nodes.role(traced, node) == "rectify")
    x = images(3, 64)
    effect = dtype_effect(traced, {node: "first"}, [x[:24], x[24:]], CPU, "bf16")
    rounded: fx.GraphModule = copy.deepcopy(fused(nodes.with_taps(traced, [node]))).bfloat16()
    with torch.no_grad():
        outputs, (first,) = rounded(x.bfloat16())
        wanted, (its_first,) = nodes.with_taps(traced, [node]).eval()(x)
    assert effect.images == 64 and 1e-4 < effect.outputs < 0.05
    assert effect.outputs == pytest.approx(float((outputs.float() - wanted).norm() / wanted.norm()), rel=0.05)
    assert effect.maps == {
        "first": pytest.approx(float((first.float() - its_first).norm() / its_first.norm()), rel=0.05)
    }
    assert effect.agreement == pytest.approx(float((outputs.argmax(1) == wanted.argmax(1)).float().mean()), abs=1 / 32)
    assert dtype_effect(traced, {}, [x], CPU, "fp32").outputs == 0


def test_a_bf16_teacher_is_reported_and_recorded(user: User, tmp_path: Path) -> None:
    outcome = succeeds(user.distill(tmp_path / "run", "--teacher-dtype", "bf16", "--steps", 2))
    assert "teacher in bf16: outputs move by" in outcome.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    effect = record["teacher_dtype"]
    assert record["recipe"]["teacher_dtype"] == "bf16" and set(effect["maps"]) == set(record["taps"])
    assert 0 < effect["outputs"] < 0.1 and effect["agreement"] > 0.5 and effect["images"] > 50
    plain = succeeds(user.distill(tmp_path / "plain", "--steps", 2))
    assert "teacher in" not in plain.stderr
    assert "teacher_dtype" not in json.loads((tmp_path / "plain" / "run.json").read_text())


# The student ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", ["none", "bf16", "fp16"])
def test_quantizers_and_losses_stay_float32_under_autocast(autocast: Autocast, tmp_path: Path) -> None:
    trainer, batches = trainer_of(tmp_path, autocast, "bf16")
    convolved: set[torch.dtype] = set()
    quantized: set[torch.dtype] = set()
    inner: set[torch.dtype] = set()

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        (quantized if isinstance(module, ActivationQuantizer | WeightQuantizer) else convolved).add(output.dtype)
        node = output.grad_fn
        if isinstance(module, ActivationQuantizer) and node is not None:
            inner.update(saved.dtype for saved in node.saved_tensors)

    for module in trainer.job.network.modules():
        if isinstance(module, ActivationQuantizer | WeightQuantizer | nn.Conv2d):
            module.register_forward_hook(watch)
    trainer.step(batches.at(0), 10)
    assert quantized == inner == {torch.float32}
    assert convolved == {AUTOCAST[autocast] or torch.float32}
    assert {value.dtype for value in trainer.sums.values()} == {torch.float32}
    parameters = [*trainer.job.decayed, *trainer.job.free]
    assert {p.dtype for p in parameters} == {torch.float32}
    gradients = [p.grad for p in parameters if p.grad is not None]
    assert {g.dtype for g in gradients} == {torch.float32} and all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_term_is_float32_for_outputs_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    trainer, batches = trainer_of(tmp_path)
    recipe = DistillRecipe("", trainer.job.training, affinity="none", label_weight=1.0)
    source = NetworkSource(3, (8, 8), 10, architecture="resnet8")
    student = insert_quantizers(capture(source.build(), EXAMPLE), QuantConfig(8, 8), EXAMPLE)
    labels = torch.arange(16) % 10
    batch = replace(batches.at(0), labels=labels)
    outputs = (20 * torch.randn(16, 10)).to(dtype)
    terms = distill_job(Plan(recipe, tmp_path, source, {}), student, []).losses((outputs, []), batch, torch.Generator())
    assert {name: term.dtype for name, term in terms.items()} == {"logit": torch.float32, "label": torch.float32}
    assert terms["label"] == nn.functional.cross_entropy(outputs.float(), labels)


@pytest.mark.parametrize("autocast", ["bf16", "fp16"])
def test_autocast_changes_a_gradient_by_its_rounding_only(autocast: Autocast, tmp_path: Path) -> None:
    gradients = []
    for how in ("none", autocast):
        trainer, batches = trainer_of(tmp_path, how)
        trainer.step(batches.at(0), 10)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.job.decayed if p.grad is not None]))
    cosine = nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0)
    assert not torch.equal(*gradients) and cosine > 0.9


def test_a_float16_run_resumes_exactly(user: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ("--autocast", "fp16", "--teacher-dtype", "bf16", "--lr", 0.02, "--weight-bits", 4, "--act-bits", 4)
    succeeds(user.distill(tmp_path / "whole", *line))
    monkeypatch.setattr("faqd.train.loop.fit.CHECKPOINT_EVERY_S", 0.0)
    plain = Trainer.step

    def stops(trainer: Trainer, *arguments: Any) -> None:
        if trainer.iteration == 5:
            raise KeyboardInterrupt
        plain(trainer, *arguments)

    monkeypatch.setattr(Trainer, "step", stops)
    assert user.distill(tmp_path / "run", *line).code == 130
    position = json.loads((tmp_path / "run" / "checkpoint-00000005" / "position.json").read_text())
    assert position["loss_scale"]["scale"] > 1
    monkeypatch.setattr(Trainer, "step", plain)
    succeeds(user.distill(tmp_path / "run", *line, "--resume"))
    name = "weights.safetensors"
    assert everything_in(tmp_path / "run")[name] == everything_in(tmp_path / "whole")[name]


def test_a_violent_iteration_moves_no_scale_far(tmp_path: Path) -> None:
    trainer, batches = trainer_of(tmp_path)
    scales = [q.scale for q in trainer.job.network.modules() if isinstance(q, ActivationQuantizer)]
    before = [scale.item() for scale in scales]
    for parameter in trainer.job.free:
        parameter.register_hook(lambda gradient: 1e6 * gradient.sign())
    trainer.step(batches.at(0), 10)
    for scale, was in zip(scales, before, strict=True):
        assert abs(scale.item() / was - 1) == pytest.approx(0.02, rel=1e-3)


# What a GPU would wait for -------------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for values on the device."""

    WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero", "aten.equal")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if str(function).startswith(self.WAITING):
            self.found.append(str(function))
        return function(*arguments, **(options or {}))


def test_an_iteration_reads_nothing_back_to_the_host(tmp_path: Path) -> None:
    trainer, batches = trainer_of(tmp_path)
    with Reads() as reads:
        for iteration in range(2):
            trainer.step(batches.at(iteration), 10)
    assert reads.found == []
    with reads:
        trainer.look()
    assert reads.found  # the losses are read here, so they would have been noticed above


def test_the_order_is_drawn_once_per_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, batches = trainer_of(tmp_path)
    plain, drawn = torch.randperm, []

    def counted(count: int, **options: Any) -> Tensor:
        drawn.append(count)
        return plain(count, **options)

    monkeypatch.setattr(torch, "randperm", counted)
    first = [batches.at(iteration).x for iteration in range(9)]
    assert drawn == [64] * 3  # four iterations per epoch
    assert torch.equal(batches.at(1).x, first[1]) and not torch.equal(first[1], first[5])
