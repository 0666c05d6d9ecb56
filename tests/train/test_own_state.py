"""Networks with a state of their own: tied memory, hooks, versions, extra state.

What a file says is read once, and what came of it is what a run keeps and a bundle holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

import faqd
from faqd.errors import UserError
from faqd.train.distill import refuse_what_no_run_keeps
from faqd.train.networks.load_weights import load_weights
from faqd.train.networks.own_tensors import copy_of, own_tensors, put_tensors, with_own_memory
from faqd.train.networks.source import user_source
from faqd.train.run.lesson import Teacher


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight


class Transposed(nn.Module):
    """A decoder that has its encoder's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)
        self.decoder.weight = nn.Parameter(self.encoder.weight.data.T)


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.rand(6, 2))
        self.q = nn.Parameter(self.qkv.data[:2])


class Rescaled(nn.Module):
    """Its files are of a time when the scale was half as large."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self._register_load_state_dict_pre_hook(self._double)  # type: ignore[no-untyped-call]

    @staticmethod
    def _double(state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        state[prefix + "scale"] = 2 * state[prefix + "scale"]


class Versioned(nn.Module):
    """Before version 3 its variance held the eps as well."""

    _version = 3

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("variance", torch.ones(2))

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        version = metadata.get("version")
        if version is not None and version < 3:
            state[prefix + "variance"] = state[prefix + "variance"] - 0.25
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class Knows(nn.Linear):
    def __init__(self, seen: Any) -> None:
        super().__init__(2, 2)
        self.seen = seen

    def get_extra_state(self) -> Any:
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        self.seen = state


def test_parameters_that_share_their_memory_are_tied(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[1].weight = nn.Parameter(network.get_parameter("0.weight").data)
    torch.save({**network.state_dict(), "1.weight": torch.full((2, 2), 5.0)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"1\.weight hold different values"):
        load_weights(network, tmp_path / "w.pth")


def test_a_tied_tensor_is_read_from_any_of_its_names_but_not_from_two_values(tmp_path: Path) -> None:
    tied = Tied()
    with torch.no_grad():
        tied.first.weight.copy_(torch.eye(4))
    save_model(tied, str(tmp_path / "one.safetensors"))  # keeps one name of each tensor
    torch.save(tied.state_dict(), tmp_path / "both.pth")
    torch.save({key: v + (key == "second.weight") for key, v in tied.state_dict().items()}, tmp_path / "differ.pth")
    for name in ("one.safetensors", "both.pth"):
        network = Tied()
        load_weights(network, tmp_path / name)
        assert torch.equal(network.second.weight, torch.eye(4))
    with pytest.raises(UserError, match=r"first\.weight and second\.weight hold different values"):
        load_weights(Tied(), tmp_path / "differ.pth")


@pytest.mark.parametrize("kind", [Transposed, Sliced])
def test_views_of_one_memory_are_tied(kind: type[nn.Module], tmp_path: Path) -> None:
    made = kind()
    state = dict(made.state_dict())
    torch.save(state, tmp_path / "both.pth")
    torch.save(dict([next(iter(state.items()))]), tmp_path / "one.pth")
    torch.save({key: value.clone() + place for place, (key, value) in enumerate(state.items())}, tmp_path / "two.pth")
    for name in ("both.pth", "one.pth"):
        network = copy_of(kind())
        load_weights(network, tmp_path / name)
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    with pytest.raises(UserError, match="hold different values, and share their memory"):
        load_weights(copy_of(kind()), tmp_path / "two.pth")


def test_hooks_act_when_a_file_is_read_and_never_again(tmp_path: Path) -> None:
    torch.save(Rescaled().state_dict(), tmp_path / "w.pth")
    network, again = Rescaled(), Rescaled()
    load_weights(network, tmp_path / "w.pth")
    put_tensors(again, own_tensors(network))
    assert network.get_buffer("scale").item() == again.get_buffer("scale").item() == 2.0


@pytest.mark.parametrize(
    ("prefix", "version", "variance"), [("", 2, 0.75), ("module.", 2, 0.75), ("", 3, 1.0), ("", None, 1.0)]
)
def test_versions_are_those_of_the_file(prefix: str, version: int | None, variance: float, tmp_path: Path) -> None:
    state: Any = nn.Sequential(Versioned()).state_dict(prefix=prefix)
    if version is None:
        del state._metadata
    else:
        state._metadata[f"{prefix}0"]["version"] = version
    torch.save(state, tmp_path / "w.pth")
    network = nn.Sequential(Versioned())
    load_weights(network, tmp_path / "w.pth")
    assert network.get_buffer("0.variance").tolist() == [variance] * 2


@pytest.mark.parametrize("built", [{"seen": 3}, torch.tensor([3.0]), [3, "b"], 3])
def test_state_beside_tensors_is_that_of_the_build_or_refused(built: Any, tmp_path: Path) -> None:
    torch.save(nn.Sequential(Knows(built)).state_dict(), tmp_path / "w.pth")
    said: list[str] = []
    load_weights(nn.Sequential(Knows(built)), tmp_path / "w.pth", said.append)
    assert said == []
    packed = torch.ones(1).to_sparse()
    for other in ({"seen": 4}, torch.tensor([1.0]), packed, 5):
        with pytest.raises(UserError, match=r"0\._extra_state is what a module keeps beside its tensors"):
            load_weights(nn.Sequential(Knows(other)), tmp_path / "w.pth")
    assert own_tensors(Knows(built)).keys() == {"weight", "bias"}


def test_a_network_that_cannot_load_is_a_sentence(tmp_path: Path) -> None:
    class Packed(nn.Linear):
        def _load_from_state_dict(self, *_: Any) -> None:
            raise KeyError("_packed_params.dtype")

    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"Packed does not load these weights \(KeyError.*Is it quantized"):
        load_weights(Packed(2, 2), tmp_path / "w.pth")


def test_expanded_buffers_can_be_filled(tmp_path: Path) -> None:
    class Coordinates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("row", torch.linspace(-1, 1, 4).expand(3, 4))

    torch.save({"row": torch.rand(3, 4)}, tmp_path / "w.pth")
    network = with_own_memory(Coordinates())
    load_weights(network, tmp_path / "w.pth")
    assert torch.equal(network.get_buffer("row"), torch.load(tmp_path / "w.pth")["row"])


def test_names_that_a_hook_knows_are_taken(tmp_path: Path) -> None:
    class Renamed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self._register_load_state_dict_pre_hook(self._rename)  # type: ignore[no-untyped-call]

        @staticmethod
        def _rename(state: dict[str, Tensor], prefix: str, *_: Any) -> None:
            if f"{prefix}old" in state:
                state[f"{prefix}weight"] = state.pop(f"{prefix}old")

    torch.save({"old": torch.eye(2), "bias": torch.ones(2)}, tmp_path / "w.pth")
    network = Renamed()
    load_weights(network, tmp_path / "w.pth")
    assert torch.equal(network.weight, torch.eye(2)) and torch.equal(network.bias, torch.ones(2))
    torch.save({"old": torch.eye(2).to(torch.int8), "bias": torch.ones(2)}, tmp_path / "int8.pth")
    with pytest.raises(UserError, match="these are not weights of Renamed: 1 missing"):
        load_weights(Renamed(), tmp_path / "int8.pth")
    torch.save({"older": torch.eye(2), "bias": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="these are not weights of Renamed: 1 missing"):
        load_weights(Renamed(), tmp_path / "other.pth")


def test_a_mask_that_is_built_with_infinities_is_no_broken_weight(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))

    torch.save(Masked().state_dict(), tmp_path / "w.pth")
    load_weights(Masked(), tmp_path / "w.pth")
    torch.save({"mask": torch.full((3, 3), torch.inf)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="mask holds NaN or infinite values"):
        load_weights(Masked(), tmp_path / "w.pth")


class Derived(nn.Module):
    """Its loading makes a table of a weight: a buffer that no file has, or an attribute."""

    def __init__(self, attribute: bool) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)
        self.attribute, self.factor = attribute, 1.0
        self.register_buffer("inverse", torch.ones(()), persistent=False)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if self.attribute:
            self.factor = 7.0
        else:
            self.inverse = torch.tensor(7.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean((2, 3)) * self.factor * self.inverse  # type: ignore[no-any-return]


def buffer() -> nn.Module:
    return Derived(False)


def attribute() -> nn.Module:
    return Derived(True)


class Silent(Derived):
    """One of its outputs is zero everywhere, another is no number."""

    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x)
        return {"scores": scores, "zero": 0 * scores, "sure": scores > 0}


def silent() -> nn.Module:
    return Silent(False)


def teacher_of(kind: str, folder: Path) -> Teacher:
    torch.save(Derived(False).state_dict(), folder / "w.pth")
    source = user_source(f"{Path(__file__)}:{kind}", 3, (8, 8))
    network = source.build()
    load_weights(network, folder / "w.pth")
    return Teacher(network.eval(), source, "")


def test_buffers_that_no_file_has_are_kept_and_what_is_no_tensor_is_refused(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 8, 8)
    refuse_what_no_run_keeps(teacher_of("buffer", tmp_path), images)
    refuse_what_no_run_keeps(teacher_of("silent", tmp_path), images)
    with pytest.raises(UserError, match="built again and given its tensors it computes something else"):
        refuse_what_no_run_keeps(teacher_of("attribute", tmp_path), images)


class Frozen(nn.Module):
    """As people write it who keep a norm in evaluation mode: without a result, which eval() hands on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x)).mean((2, 3))  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        self.norm.eval()


def frozen() -> nn.Module:
    return Frozen()


def test_a_train_that_returns_nothing_is_taken(tmp_path: Path) -> None:
    network = user_source(f"{Path(__file__)}:frozen", 3, (8, 8)).build()
    images = torch.randint(0, 256, (8, 3, 8, 8)) / 255
    student = faqd.prepare(network, images[:2])
    faqd.calibrate(student, images)
    faqd.export(student, tmp_path / "bundle", images, teacher=network)
