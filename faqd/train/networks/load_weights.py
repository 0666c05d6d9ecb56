"""A user's weights into a user's network: whatever wraps them in the file, and nothing that only looks like weights."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from faqd.errors import UserError
from faqd.train.networks.weights_file import read_weights_file

AVERAGED = ("state_dict_ema", "model_ema", "ema_model", "params_ema", "ema")
WRAPPINGS = (
    *(*AVERAGED, "state_dict", "model_state_dict", "model_state"),
    *("model", "module", "network", "net", "params", "weights"),
)
"""Keys under which training scripts commonly store a state dict, in the order in which they are tried: the averaged
weights, by which such scripts judge, first. Other keys come after these."""
WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Parts of keys that DataParallel and averaged models, torch.compile and sharding put in front of what they wrap."""
BATCHES = "num_batches_tracked"
COUNTERS = ("n_averaged", "steps", BATCHES)
"""Entries of averaged models and batch norms that are no weights."""
DEPTH = 4
"""How far wrappings are looked through."""
LISTED = 16
"""Networks that one file lists at most; longer lists are of other things, an optimizer's for one."""


def load_weights(network: nn.Module, path: Path, say: Callable[[str], None] = lambda _: None) -> None:
    """Fill `network` from a safetensors file, or from a file of torch.save that holds tensors only.

    Wrappings are looked through; `say` tells which of several state dicts was taken, and what beside it was left out.
    UserError for a damaged file, pickled classes, another network's weights, and values that are no weights: not
    finite, of another kind than floats, a negative variance, or different ones for what the network has as one tensor.
    """
    wanted = {key: value for key, value in network.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    loaded = read_weights_file(path)
    found = [_Fit(where, state, wanted) for where, state in _state_dicts(loaded)]
    if not found:
        raise UserError(f"{path}: holds no state dict; found the keys {', '.join(map(str, list(loaded)[:8]))}.")
    fitting = [fit for fit in found if not fit.problems]
    if not fitting:
        nearest = min(found, key=lambda fit: fit.distance)
        raise UserError(
            f"{path}: these are not weights of {type(network).__name__}: {', '.join(nearest.problems)}. "
            f"{_what_to_give(path, nearest)}"
        )
    taken, *others = fitting
    if others:
        names = ", ".join(repr(fit.where) for fit in others)
        say(f"{path}: takes the weights under '{taken.where}'; the file also holds {names}.")
    halves = [fit for fit in found if fit.problems and fit.state and fit.where.split(".")[0] in AVERAGED]
    if halves:
        say(f"{path}: leaves out what lies under '{halves[0].where}', which has not all weights of the network.")
    if own := [key for key, value in network.state_dict().items() if not isinstance(value, Tensor)]:
        say(f"{path}: {_listed(own)} is a module's own state and no tensor; it stays as the network was built.")
    if taken.left_out:
        takes = f"takes the weights under '{taken.prefix}' and " if taken.prefix else ""
        say(f"{path}: {takes}leaves out {_listed(taken.left_out)}.")
    state = OrderedDict((key, _as_weight(path, key, value, wanted[key])) for key, value in taken.state.items())
    _refuse_two_values(path, state, wanted)
    # Modules that read several versions of their own weights ask for it, and not every file keeps it.
    state._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
    network.load_state_dict(state, strict=False)


def _what_to_give(path: Path, nearest: _Fit) -> str:
    if re.search(r"-\d+-of-\d+", path.name):
        return "The file is one of several; load all of them where the network was trained, and save its state dict."
    if any(re.search(r"parametrizations\.|_[gv]$|_orig$|_mask$", key) for key in nearest.foreign):
        return (
            "The file is of before a weight norm, a parametrization or a pruning was removed: load it where that still "
            "is, remove it, and save the state dict."
        )
    return "Give the weights that were trained with this very network."


# Which tensors ----------------------------------------------------------------------------------------------------


class _Fit:
    """One state dict of the file held against the network.

    where: its keys in the file. state: its tensors by the network's keys. problems: why it is not the network's, in
    words; distance: how many keys say so. left_out: keys that are none of the network's own, which lie under `prefix`;
    how many batches a norm has seen is not worth a word.
    """

    def __init__(self, where: str, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
        self.where = where
        bare, needed = _without_wrappers(found), _without_wrappers(wanted)
        self.prefix = prefix = _prefix(bare, needed, _aliases(wanted))
        under = {key.removeprefix(prefix): full for key, full in bare.items() if key.startswith(prefix)}
        own = {prefix + key for key in needed}
        beside = {key: full for key, full in bare.items() if key not in own and not key.endswith(BATCHES)}
        self.left_out = list(beside.values())
        self.state = {key: found[under[short]] for short, key in needed.items() if short in under}
        for one, same in _aliases(wanted).items():
            if one not in self.state and any(other in self.state for other in same):
                self.state[one] = next(self.state[other] for other in same if other in self.state)
        missing = sorted(key for key in wanted if key not in self.state and not _counts(key, wanted[key]))
        # One number at the root is an epoch, a loss or a temperature that the training kept there.
        noted = {full for key, full in beside.items() if "." not in key and found[full].numel() == 1}
        foreign = sorted(
            full for key, full in under.items() if key not in needed and not _is_counter(key) and full not in noted
        )
        # A nested tensor has no shape.
        plain = {key: value for key, value in self.state.items() if not value.is_nested}
        reshaped = sorted(key for key, value in plain.items() if value.shape != wanted[key].shape)
        self.foreign = foreign
        complaints = (("missing", missing), ("unknown", foreign), ("of another shape", reshaped))
        self.problems = [f"{len(names)} {what} (first: {names[0]})" for what, names in complaints if names]
        self.distance = len(missing) + len(foreign) + len(reshaped)


def _state_dicts(loaded: Any, where: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every mapping in the file that holds tensors, by the keys that lead to it, in the order in which to try them."""
    if isinstance(loaded, (list, tuple)) and len(loaded) <= LISTED:
        loaded = {place: value for place, value in enumerate(loaded) if isinstance(value, Mapping)}
    if not isinstance(loaded, Mapping) or depth > DEPTH:
        return
    tensors = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if tensors:
        yield where, tensors
    known = [key for key in WRAPPINGS if key in loaded]
    for key in [*known, *(key for key in loaded if key not in known)]:
        yield from _state_dicts(loaded[key], f"{where}.{key}" if where else str(key), depth + 1)


def _without_wrappers(state: Mapping[str, Any]) -> dict[str, str]:
    """The keys without the parts of wrappers -> as they are; all as they are where two would become one."""
    bare = {".".join(part for part in key.split(".") if part not in WRAPPERS): key for key in state}
    return bare if len(bare) == len(state) else {key: key for key in state}


def _prefix(found: dict[str, str], needed: dict[str, str], aliases: dict[str, list[str]]) -> str:
    """What stands in front of all keys of the network, such as `model.`; nothing where no prefix has them all."""
    short = {full: key for key, full in needed.items()}
    weights = {key: [short[same] for same in aliases.get(full, [])] for key, full in needed.items()}
    weights = {key: same for key, same in weights.items() if not _is_counter(key)}
    first = next(iter(weights), "")
    ends = [key[: -len(end)] for end in (first, *weights.get(first, [])) for key in found if key.endswith(f".{end}")]
    for prefix in ("", *ends):
        if all(any(prefix + name in found for name in (key, *same)) for key, same in weights.items()):
            return prefix
    return next((prefix for prefix in ends if all(key.startswith(prefix) for key in found)), "")


def _aliases(wanted: dict[str, Tensor]) -> dict[str, list[str]]:
    """The keys that name one tensor with another key -> those other keys."""
    same: dict[Any, list[str]] = {}
    for key, value in wanted.items():
        same.setdefault(_memory(value), []).append(key)
    return {key: [other for other in keys if other != key] for keys in same.values() if len(keys) > 1 for key in keys}


def _memory(value: Tensor) -> Any:
    """What two tensors have in common that are one."""
    if is_lazy(value) or not value.numel() or value.layout != torch.strided:
        return id(value)
    return value.data_ptr(), value.dtype, value.shape, value.stride()


def _counts(key: str, value: Tensor) -> bool:
    """Whether an entry of a network is no weight, so that a file may lack it."""
    return _is_counter(key) and not (is_lazy(value) or value.is_floating_point())


def _is_counter(key: str) -> bool:
    return key.rpartition(".")[2] in COUNTERS


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")


# Which values -----------------------------------------------------------------------------------------------------


def _as_weight(path: Path, key: str, value: Tensor, wanted: Tensor) -> Tensor:
    """`value` in the type of `wanted`; UserError where that would change what it means."""
    kind = _foreign_kind(value, wanted)
    if kind:
        raise UserError(
            f"{path}: {key} is {kind}, and the network has {_word(wanted.dtype)} there. Give the float weights of "
            "before that conversion."
        )
    converted = value.to(wanted.dtype)
    if not converted.isfinite().all():
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


def _refuse_two_values(path: Path, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for key, same in _aliases(wanted).items():
        for other in same:
            if key in state and other in state and not torch.equal(state[key], state[other]):
                raise UserError(
                    f"{path}: {key} and {other} hold different values, and are one tensor in the network that was "
                    "built. Build it with two, or give the weights of a network in which they are tied."
                )
