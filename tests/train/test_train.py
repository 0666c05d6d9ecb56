"""The whole way from a float teacher to a student and what it is worth, on toy networks."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from faqd.quantize.calibrate import calibrate
from faqd.quantize.capture.capture import capture
from faqd.quantize.capture.fuse_batch_norm import fused
from faqd.train.data.augment import augment
from faqd.train.data.datasets import Augmentation
from faqd.train.data.decode import read_picture
from faqd.train.loop.batches import NORMS, Batch, Batches, Images, splits_on, stream
from faqd.train.loop.distributed import ProcessGroup
from faqd.train.loop.fit import fit
from faqd.train.loop.teacher_forward import target_of
from faqd.train.loop.trainer import Job
from faqd.train.losses.objective import distill_job
from faqd.train.losses.taps import tap_pairs
from faqd.train.networks.load_weights import load_weights
from faqd.train.networks.tensor_files import read_tensors, write_tensors
from faqd.train.recipes import DistillRecipe, Training
from faqd.train.run.folder import load_teacher
from faqd.train.run.lesson import Lesson, lesson_from
from faqd.train.run.plan import Plan
from faqd.train.run.student import load_student, new_student, student_source
from tests.fixtures.toy_runs import NET, PLAIN, User, faqd_train, new_user, succeeds, write_images, write_net


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run: ResNet-8 on the digits."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    succeeds(faqd_train("teacher", "--arch", "resnet8", "--steps", 60, "--out", run))
    return run


def record_of(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "run.json").read_text())
    return record


def json_of(*arguments: object) -> Any:
    return json.loads(succeeds(faqd_train(*arguments, "--json", "-")).stdout)


# The way a user goes ------------------------------------------------------------------------------------------------


def test_a_teacher_learns_the_digits(teacher: Path) -> None:
    record = record_of(teacher)
    assert record["select"]["accuracy"] > 0.8
    assert record["recipe"]["arch"] == "resnet8" and record["recipe"]["training"]["steps"] == 60
    assert json_of("eval", teacher)["teacher_accuracy"] > 0.8
    lines = [json.loads(line) for line in (teacher / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [18, 36, 54, 60]
    assert {path.name for path in teacher.iterdir()} == {"run.json", "metrics.jsonl", "weights.safetensors"}


@pytest.mark.parametrize(("bits", "agreement"), [(8, 0.9), (4, 0.7)])
def test_a_student_of_the_digits_agrees_with_its_teacher(
    teacher: Path, bits: int, agreement: float, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    line = ("distill", "--teacher", teacher, "--weight-bits", bits, "--act-bits", bits)
    record = json_of(*line, "--steps", 40, "--lr", 0.02, "--out", run)
    assert record == record_of(run)
    assert record["recipe"]["weight_bits"] == record["recipe"]["act_bits"] == bits
    assert record["recipe"]["data"] == "digits" and record["recipe"]["init"] == "teacher"
    assert record["preprocess"] == record_of(teacher)["preprocess"]
    assert record["taps"] == ["stages.0.0.relu2", "stages.1.0.relu2", "stages.2.0.relu2"]
    result = json_of("eval", run)
    assert result["images"] == 500 and result["agreement"] > agreement and result["student_accuracy"] > agreement - 0.2
    assert f"agreement: {result['agreement']}" in faqd_train("eval", run).stdout


def test_the_losses_without_training_are_told(teacher: Path, tmp_path: Path) -> None:
    line = ("distill", "--teacher", teacher, "--weight-bits", 4, "--act-bits", 4)
    still = json_of(*line, "--steps", 1, "--lr", 1e-12, "--out", tmp_path / "still")
    trained = json_of(*line, "--steps", 60, "--out", tmp_path / "trained")
    assert still["select"] == pytest.approx(still["select_untrained"], rel=1e-5)
    assert trained["select_untrained"] == still["select_untrained"]
    assert trained["select"]["logit"] < 0.9 * trained["select_untrained"]["logit"]
    told = faqd_train(*line, "--steps", 60, "--out", tmp_path / "trained", "--resume").stderr
    assert f"(untrained {trained['select_untrained']['logit']:.4g})" in told


@pytest.mark.parametrize("logit", ["mse", "kl"])
@pytest.mark.parametrize("affinity", ["l1", "l2", "l2_squared", "fast", "none"])
def test_every_form_of_the_loss_trains(user: User, logit: str, affinity: str, tmp_path: Path) -> None:
    record = json.loads(
        succeeds(user.distill(tmp_path / "run", "--logit", logit, "--affinity", affinity, "--json", "-")).stdout
    )
    assert set(record["select"]) == ({"logit"} if affinity == "none" else {"logit", "affinity"})
    assert record["taps"] == ([] if affinity == "none" else ["features.2", "features.5"])


def test_a_student_of_another_network_starts_from_scratch(user: User, tmp_path: Path) -> None:
    succeeds(user.distill(tmp_path / "run", "--arch", "resnet8", "--steps", 3))
    record = record_of(tmp_path / "run")
    assert record["recipe"]["init"] == "scratch" and record["network"]["classes"] == 10
    assert record["taps"] == ["features.2=stages.0.0.relu2", "features.5=stages.1.0.relu2"]
    assert json_of("eval", tmp_path / "run")["images"] == 11
    assert "different networks" in user.distill(tmp_path / "no", "--arch", "resnet8", "--init", "teacher").stderr


def test_teacher_and_student_are_networks_of_the_user(tmp_path: Path) -> None:
    net = write_net(tmp_path, NET.replace("channels=3", "channels=1"))
    (tmp_path / "small.py").write_text(net.read_text().replace("8,", "4,").replace("BatchNorm2d(8)", "BatchNorm2d(4)"))
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    succeeds(faqd_train("teacher", "--arch", f"{net}:build", "--steps", 200, "--out", teacher))
    assert record_of(teacher)["network"]["file"] == str(net) and record_of(teacher)["recipe"]["arch"] == f"{net}:build"
    assert json_of("eval", teacher)["teacher_accuracy"] > 0.5
    line = ("--teacher", teacher, "--steps", 3, "--weight-bits", 4)
    succeeds(faqd_train("distill", *line, "--arch", f"{tmp_path / 'small.py'}:build", "--out", student))
    record = record_of(student)
    assert record["recipe"]["init"] == "scratch" and record["network"]["file"] == str(tmp_path / "small.py")
    assert record["teacher"]["file"] == str(net) and load_student(student).config.label == "4/8"
    # The same network by its name is the teacher's own: the student starts from its weights.
    succeeds(faqd_train("distill", *line, "--arch", f"{net}:build", "--out", tmp_path / "own"))
    assert record_of(tmp_path / "own")["recipe"]["init"] == "teacher"


def test_networks_without_a_map_of_one_size_are_told_so(user: User, tmp_path: Path) -> None:
    # Maps of 6 and 3 pixels; those of ResNet-8 have 8, 4 and 2.
    net = write_net(tmp_path / "user", NET.replace("3, padding=1, bias", "3, bias"))
    line = ("--teacher", f"{net}:build", "--teacher-weights", net.parent / "best.pth", *user.data, "--arch", "resnet8")
    outcome = succeeds(faqd_train("distill", *line, "--batch-size", 16, "--steps", 1, "--out", tmp_path / "run"))
    assert "no affinity" in outcome.stderr and set(record_of(tmp_path / "run")["select"]) == {"logit"}


@pytest.mark.parametrize("first", [("8", "8"), ("8", "32"), ("1", "2")])
def test_a_student_starts_from_a_run_of_any_bits(user: User, first: tuple[str, str], tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    succeeds(user.distill(before, "--weight-bits", first[0], "--act-bits", first[1], "--steps", 20, "--lr", 0.1))
    line = ("--init", before, "--weight-bits", 4, "--act-bits", 4)
    succeeds(user.distill(after, *line, "--steps", 1, "--lr", 1e-9))
    latent = "features.3.parametrizations.weight.original"
    torch.testing.assert_close(
        read_tensors(after / "weights.safetensors")[latent], read_tensors(before / "weights.safetensors")[latent]
    )
    assert load_student(after).config.label == "4/4"


def test_lists_train_the_cross_product(user: User, tmp_path: Path) -> None:
    records = json.loads(
        succeeds(
            user.distill(tmp_path / "all", "--weight-bits", "1,4,4", "--act-bits", "4", "--seeds", 2, "--json", "-")
        ).stdout
    )
    names = ["w1a4-s0", "w1a4-s1", "w4a4-s0", "w4a4-s1"]
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == names
    assert [record["recipe"]["weight_bits"] for record in records] == [1, 1, 4, 4]
    assert records[0]["select"] != records[1]["select"]
    assert succeeds(user.distill(tmp_path / "all", "--weight-bits", "1,4", "--seeds", 2, "--act-bits", 4, "--resume"))


def test_seeds_count_on_from_the_one_that_is_given(user: User, tmp_path: Path) -> None:
    succeeds(user.distill(tmp_path / "all", "--seeds", 2, "--seed", 5, "--steps", 1))
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"w8a8-s5", "w8a8-s6"}


def test_recipes_are_listed() -> None:
    listed = succeeds(faqd_train("recipes")).stdout
    assert set(json_of("recipes")) == {line.split()[0] for line in listed.splitlines()}


def test_inspect_names_layers_and_taps_as_the_options_take_them(user: User, teacher: Path, tmp_path: Path) -> None:
    table = json_of("inspect", "--teacher", f"{user.folder / 'net.py'}:build", "--image-size", 8, "--weight-bits", 2)
    assert [row["weights"] for row in table["layers"]] == ["8 (±127)", "2 (ternary)", "8 (±127)"]
    assert table["taps"] == ["features.2", "features.5"]
    succeeds(
        user.distill(tmp_path / "run", "--feature-layer", table["taps"][1], "--feature-layer", "features.4=features.5")
    )
    assert record_of(tmp_path / "run")["taps"] == ["features.5", "features.4=features.5"]
    assert json_of("inspect", "--teacher", teacher)["network"] == "resnet8"
    student = json_of("inspect", "--teacher", teacher, "--arch", "resnet20", "--scales", "tensor", "--act-bits", 4)
    assert (student["network"], student["weight_scales"], len(student["layers"])) == ("resnet20", "tensor", 22)
    assert len(student["taps"]) == 3


# The user's own files -----------------------------------------------------------------------------------------------


def test_a_users_images_are_read_once(user: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def counted(path: Path, scaled: Any) -> Any:
        read.append(path)
        return read_picture(path, scaled)

    monkeypatch.setattr("faqd.train.data.decode.read_picture", counted)
    succeeds(user.distill(tmp_path / "all", "--weight-bits", "4,8", "--steps", 1))
    assert set(Counter(read).values()) == {1}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3},
        lambda state: {"model": state, "loss": torch.ones(())},
        lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}},
        lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
        lambda state: {"n_averaged": torch.ones(()), **{f"module.{key}": value for key, value in state.items()}},
        lambda state: {key: value.half() for key, value in state.items()},
    ],
    ids=["DataParallel", "loss beside", "Lightning", "compiled", "averaged", "half"],
)
def test_common_wrappings_of_weights_are_looked_through(user: User, wrap: Any, tmp_path: Path) -> None:
    weights = tmp_path / "wrapped.pth"
    torch.save(wrap(torch.load(user.folder / "best.pth", weights_only=True)), weights)
    succeeds(user.distill(tmp_path / "run", "--teacher-weights", weights, "--steps", 1))


class Versioned(nn.Linear):
    """Reads its weights by the version that they were written with, and refuses those without."""

    _version = 2

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if local_metadata.get("version") != 2:
            raise ValueError("written by another version")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_modules_that_ask_for_the_version_of_their_weights_get_it(name: str, tmp_path: Path) -> None:
    wanted, found = Versioned(3, 2), Versioned(3, 2)
    if name.endswith("safetensors"):
        write_tensors(tmp_path / name, wanted.state_dict())
    else:
        torch.save(dict(wanted.state_dict()), tmp_path / name)
    load_weights(found, tmp_path / name)
    assert torch.equal(found.weight, wanted.weight)


def test_a_map_is_flattened_by_view(user: User, tmp_path: Path) -> None:
    """As it is in older networks; a student is trained in memory where that is no view."""
    code = NET.replace("self.features(x).mean((2, 3))", "self.features(x).view(x.size(0), -1)")
    net = write_net(tmp_path / "net", code.replace("Linear(16,", "Linear(256,"))
    line = ("--teacher", f"{net}:build", "--teacher-weights", net.parent / "best.pth", *user.data, "--batch-size", 16)
    succeeds(faqd_train("distill", *line, "--steps", 1, "--out", tmp_path / "run"))


def test_which_of_several_weights_was_taken_is_said(user: User, tmp_path: Path) -> None:
    state = torch.load(user.folder / "best.pth", weights_only=True)
    worse = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save({"model": worse, "model_ema": state}, tmp_path / "both.pth")
    told = user.distill(tmp_path / "run", "--teacher-weights", tmp_path / "both.pth", "--steps", 1)
    assert "takes the weights under 'model_ema'; the file also holds 'model'." in succeeds(told).stderr
    assert all(torch.equal(value, state[key]) for key, value in load_teacher(tmp_path / "run")[0].state_dict().items())


def test_a_users_file_may_import_its_neighbours_and_use_dataclasses(user: User, tmp_path: Path) -> None:
    (tmp_path / "toy_blocks.py").write_text("WIDTH = 10\n")
    code = "from __future__ import annotations\nfrom dataclasses import dataclass\n" + NET.replace(
        "return Net()",
        "from toy_blocks import WIDTH\n    return Net(classes=WIDTH)\n\n@dataclass\nclass C:\n    a: int",
    )
    (tmp_path / "net.py").write_text(code)
    spec = f"{tmp_path / 'net.py'}:build"
    succeeds(
        faqd_train("distill", "--teacher", spec, *user.teacher[2:], *user.data, "--steps", 1, "--out", tmp_path / "r")
    )


@pytest.mark.parametrize("package", [False, True])
def test_neighbours_of_one_name_beside_teacher_and_student(user: User, package: bool, tmp_path: Path) -> None:
    code = NET.replace("from torch import nn", "from torch import nn\nfrom toy_parts.width import WIDTH")
    code = code if package else code.replace("toy_parts.width", "toy_parts")
    for folder, width in (("teacher", 8), ("student", 4)):
        parts = tmp_path / folder / ("toy_parts/width.py" if package else "toy_parts.py")
        parts.parent.mkdir(parents=True)
        parts.write_text(f"WIDTH = {width}\n")
        (tmp_path / folder / "net.py").write_text(code.replace("8,", "WIDTH,").replace("2d(8)", "2d(WIDTH)"))
    teacher, student = (f"{tmp_path / folder / 'net.py'}:build" for folder in ("teacher", "student"))
    line = ("--teacher", teacher, *user.teacher[2:], *user.data, "--arch", student, "--steps", 1)
    succeeds(faqd_train("distill", *line, "--out", tmp_path / "run"))
    convolution = next(
        layer for layer in load_student(tmp_path / "run").network.modules() if hasattr(layer, "kernel_size")
    )
    assert convolution.out_channels == 4


def test_one_module_in_two_places_can_be_saved(user: User, tmp_path: Path) -> None:
    twice = NET.replace("self.head = ", "self.again = self.features[3]\n        self.head = ")
    net = write_net(tmp_path / "user", twice)
    line = ("--teacher", f"{net}:build", "--teacher-weights", net.parent / "best.pth", *user.data)
    succeeds(faqd_train("distill", *line, "--steps", 1, "--out", tmp_path / "run"))


def test_a_student_sees_what_the_teacher_of_a_run_saw(teacher: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", pixels=12)
    succeeds(
        faqd_train("distill", "--teacher", teacher, "--data", f"folder:{images}", "--steps", 1, "--out", tmp_path / "r")
    )
    assert record_of(tmp_path / "r")["preprocess"] == record_of(teacher)["preprocess"]


def test_a_trained_student_is_better_than_an_untrained_one(teacher: Path, tmp_path: Path) -> None:
    def select_loss(name: str, *more: object) -> float:
        line = ("distill", "--teacher", teacher, "--weight-bits", 2, "--act-bits", 2, "--out", tmp_path / name)
        return float(sum(json_of(*line, *more)["select"].values()))

    assert select_loss("trained", "--steps", 40) < select_loss("untrained", "--steps", 1, "--lr", 1e-12)


# What training does -------------------------------------------------------------------------------------------------


def job_of(user: User, run: Path) -> tuple[Job, Any, Batches]:
    """A distillation of the user's network, ready to train, its student and its batches."""
    options: dict[str, Any] = dict.fromkeys(("root", "image_size", "resize", "channels", "limit"))
    options |= {"source": user.data[1], "mean": "none", "std": "none", "labels": False, "download": False}
    lesson: Lesson = lesson_from(str(user.teacher[1]), Path(str(user.teacher[3])), options)
    recipe = DistillRecipe("", Training(1, 16, 0.05, steps=10), weight_bits=4, act_bits=4, init="teacher")
    train, select = splits_on(torch.device("cpu"), lesson.dataset)
    example = train.normalised(train.pixels[:2])
    plan = Plan(recipe, run, student_source(recipe.arch, lesson.teacher), {})
    student = new_student(recipe, plan.source, lesson.teacher, example)
    calibrate(student, [example], "mse")
    traced = capture(lesson.teacher.network, example)
    pairs = tap_pairs(traced, student, None)
    target = target_of(traced, [theirs for theirs, _ in pairs], torch.device("cpu"))
    return distill_job(plan, student, pairs), student, Batches(train, select, 16, 0, target, ProcessGroup())


def test_every_parameter_is_in_exactly_one_group(user: User, tmp_path: Path) -> None:
    job, student, _ = job_of(user, tmp_path)
    grouped = Counter(id(parameter) for parameter in [*job.decayed, *job.free])
    assert grouped == {id(parameter): 1 for parameter in student.network.parameters()}
    names = {id(parameter): name for name, parameter in student.network.named_parameters()}
    assert {names[id(p)] for p in job.decayed} == {
        f"{layer}.parametrizations.weight.original" for layer in ("features.0", "features.3", "head")
    }


def test_every_activation_scale_gets_a_gradient_and_moves(user: User, tmp_path: Path) -> None:
    job, student, batches = job_of(user, tmp_path)
    scales = {name: module.scale for name, module in student.quantizers().items()}
    before = {name: scale.item() for name, scale in scales.items()}
    fit([job], batches)
    assert len(scales) == 4
    for name, scale in scales.items():
        assert scale.grad is not None and scale.grad.item() != 0, name
        assert scale.item() != before[name] and scale.item() > 0, name


def test_batch_norm_stands_still_at_the_end_and_is_estimated_again(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    means: list[Tensor] = []

    def losses(answer: Tensor, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        if network.training:
            means.append(network[1].running_mean.clone())  # type: ignore[operator]
        return {"square": answer.square().mean()}

    pixels = torch.randint(0, 256, (40, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images = Images(pixels, None, torch.tensor(1 / 255.0), torch.tensor(0.0), Augmentation(pad=1, flip=True))
    training = Training(1, 10, 0.1, steps=20)
    job = Job("toy", tmp_path, network, list(network.parameters()), [], losses, lambda: None, training)
    fit([job], Batches(images, images, 10, 0, None, ProcessGroup()))
    moves = [not torch.equal(a, b) for a, b in itertools.pairwise(means)]
    assert len(means) == 20 and all(moves[:17]) and not any(moves[17:])
    generator = stream(0, NORMS, 0)
    batches = [augment(part, images.augmentation, generator) for part in pixels.split(10)]
    expected = network[0](images.normalised(torch.cat(batches))).mean((0, 2, 3))
    torch.testing.assert_close(network[1].running_mean, expected)
    assert not network.training


def test_a_student_from_its_teacher_keeps_the_batch_norm_statistics(teacher: Path, tmp_path: Path) -> None:
    succeeds(faqd_train("distill", "--teacher", teacher, "--steps", 3, "--out", tmp_path / "run"))
    theirs, ours = (read_tensors(run / "weights.safetensors") for run in (teacher, tmp_path / "run"))
    names = [name for name in theirs if name.endswith(("running_mean", "running_var"))]
    assert names and all(torch.equal(theirs[name], ours[name]) for name in names)


def test_streams_differ_in_seed_use_and_position() -> None:
    drawn = {
        (seed, use, position): stream(seed, use, position).initial_seed()
        for seed in (0, 1, 2**33)
        for use in (1, 2, 3)
        for position in (0, 1, 2**20)
    }
    assert len(set(drawn.values())) == len(drawn)
    # A CPU generator forgets the upper half of its seed.
    assert max(drawn.values()) < 2**32


def test_a_fused_network_computes_the_same(user: User) -> None:
    names: dict[str, Any] = {}
    exec(NET, names)
    network = names["build"]().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smaller = fused(capture(network, x))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in smaller.modules())
    torch.testing.assert_close(smaller(x), network(x))


def test_an_npz_teacher_and_its_classes(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * 255 / 16).astype(np.uint8)[:300, ..., None]
    np.savez(tmp_path / "d.npz", images=images, labels=bunch.target[:300])
    line = ("--data", f"npz:{tmp_path / 'd.npz'}", *PLAIN, "--arch", "resnet8", "--steps", 2, "--batch-size", 16)
    succeeds(faqd_train("teacher", *line, "--out", tmp_path / "t"))
    succeeds(faqd_train("distill", "--teacher", tmp_path / "t", "--steps", 1, "--out", tmp_path / "s"))
    assert set(json_of("eval", tmp_path / "s")) == {
        "images",
        "student_accuracy",
        "teacher_accuracy",
        "agreement",
        "snr_db",
    }
