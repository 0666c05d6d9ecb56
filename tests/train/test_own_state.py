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

from faqd.errors import UserError
from faqd.train.networks.load_weights import load_weights
from faqd.train.networks.own_tensors import copy_of, own_tensors, put_tensors, with_own_memory


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
    for other in ({"seen": 4}, torch.tensor([1.0]), 5):
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
