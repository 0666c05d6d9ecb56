"""Values that are weights, and those that only look so: another kind, other values for one tensor, other state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from faqd.errors import UserError
from faqd.train.networks.state_dicts import Fit, aliases, covers, is_extra, without_wrapper_parts


def as_weight(path: Path, key: str, value: Tensor, wanted: Tensor) -> Tensor:
    """`value` in the type of `wanted`; UserError where that would change what it means."""
    kind = _foreign_kind(value, wanted)
    if kind:
        raise UserError(
            f"{path}: {key} is {kind}, and the network has {_word(wanted.dtype)} there. Give the float weights of "
            "before that conversion."
        )
    converted = value.to(wanted.dtype)
    beyond = ~converted.isfinite()
    if beyond.any() and not torch.equal(converted[beyond], wanted.detach()[beyond]):  # a mask may be built so
        raise UserError(f"{path}: {key} holds NaN or infinite values; give weights from before they broke down.")
    if key.endswith("running_var") and bool((converted < 0).any()):
        raise UserError(f"{path}: {key} holds negative values, and is a variance; these are not trained weights.")
    return converted


def _foreign_kind(value: Tensor, wanted: Tensor) -> str | None:
    """What makes a tensor no plain one of the kind that is wanted, in words."""
    if value.is_meta:
        return "a tensor on the meta device, which has a shape and no values"
    if value.is_quantized:
        return f"quantized ({_word(value.dtype)})"
    if value.layout != torch.strided or value.is_nested:
        return f"a {_word(value.layout).replace('_', ' ')} tensor" if not value.is_nested else "a nested tensor"
    counted = _category(wanted) == "whole" and value.is_floating_point() and bool((value == value.round()).all())
    if _category(value) != _category(wanted) and not counted:
        return _word(value.dtype)
    return None


def _category(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        # Two numbers share an element of these.
        return "packed" if "_x2" in str(tensor.dtype) else "float"
    return "complex" if tensor.is_complex() else "whole"


def _word(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def refuse_two_values(path: Path, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for key, same in aliases(wanted).items():
        for other in same:
            if key in state and other in state and not torch.equal(state[key], state[other]):
                raise UserError(
                    f"{path}: {key} and {other} hold different values, and are one tensor in the network that was "
                    "built. Build it with two, or give the weights of a network in which they are tied."
                )


def refuse_views_of_two(path: Path, network: nn.Module, state: dict[str, Tensor]) -> None:
    """UserError where two weights share memory as views, and the file has other values for the one that was filled
    first."""
    own = {key: value for key, value in network.state_dict().items() if key in state}
    for key, value in own.items():
        others = [other for other in own if other != key and (covers(own[other], value) or covers(value, own[other]))]
        if others and not torch.equal(value, state[key]):
            raise UserError(
                f"{path}: {key} and {others[0]} hold different values, and share their memory in the network that was "
                "built. Build it with two, or give the weights of a network in which they are tied."
            )


def refuse_other_state(path: Path, taken: Fit, own: Mapping[str, Any]) -> None:
    """UserError where a module kept something beside its tensors that is not what it was built with: a run, which
    builds the network again, keeps tensors."""
    built = {without_wrapper_parts(key): value for key, value in own.items() if is_extra(key)}
    for key, value in taken.extra_state().items():
        if key in built and not _is_surely_same(value, built[key]):
            raise UserError(
                f"{path}: {key} is what a module keeps beside its tensors, and is not what the network is built with. "
                "Only tensors are kept here: let build() make the network with that state."
            )


def _is_surely_same(a: Any, b: Any) -> bool:
    try:
        return _is_same(a, b)
    except Exception:  # of whatever kinds of values those are
        return False


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (
            a.layout == b.layout == torch.strided
            and a.shape == b.shape
            and torch.allclose(a.cpu().double(), b.cpu().double(), rtol=0, atol=0, equal_nan=True)
        )
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_is_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_is_same, a, b))
    return type(a) is type(b) and bool(a == b)
