"""Which tensors of a file are a network's: whatever wraps them, under whatever prefix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

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
EXTRA = "_extra_state"
"""The last part of keys under which modules keep what is no tensor of theirs."""
LISTED = 16
"""Networks that one file lists at most; longer lists are of other things, an optimizer's for one."""


class Fit:
    """One state dict of the file held against the network.

    where: its keys in the file. state: its tensors by the network's keys. problems: why it is not the network's, in
    words; distance: how many keys say so. left_out: keys that are none of the network's own, which lie under `prefix`;
    how many batches a norm has seen is not worth a word.
    """

    def __init__(self, where: str, mapping: Mapping[Any, Any], wanted: dict[str, Tensor]) -> None:
        self.where, self._versions = where, getattr(mapping, "_metadata", None) or {}
        self._values = {str(key): value for key, value in mapping.items()}
        found = {key: v for key, v in self._values.items() if isinstance(v, Tensor) and not is_extra(key)}
        bare, needed = _without_wrappers(found), _without_wrappers(wanted)
        self.prefix = prefix = _prefix(bare, needed, aliases(wanted))
        under = {key.removeprefix(prefix): full for key, full in bare.items() if key.startswith(prefix)}
        own = {prefix + key for key in needed}
        beside = {key: full for key, full in bare.items() if key not in own and not key.endswith(BATCHES)}
        self.left_out = list(beside.values())
        self.state = {key: found[under[short]] for short, key in needed.items() if short in under}
        for one, same in aliases(wanted).items():
            if one not in self.state and any(other in self.state for other in same):
                self.state[one] = next(self.state[other] for other in same if other in self.state)
        missing = sorted(
            key
            for key in wanted
            if key not in self.state
            and not _counts(key, wanted[key])
            and not any(covers(wanted[other], wanted[key]) for other in self.state)
        )
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

    def versions(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """What the file says of the versions of its modules, by the network's places; what the network says, where the
        file says nothing: modules that can read several versions of their weights ask."""
        place = self.prefix.removesuffix(".")
        found = {without_wrapper_parts(key): value for key, value in self._versions.items()}
        under = {key: ".".join(part for part in (place, without_wrapper_parts(key)) if part) for key in own}
        return {key: found.get(under[key], value) for key, value in own.items()}

    def extra_state(self) -> dict[str, Any]:
        """What modules keep beside tensors, by the network's keys without wrappers."""
        extra = {without_wrapper_parts(key): value for key, value in self._values.items() if is_extra(key)}
        return {key.removeprefix(self.prefix): v for key, v in extra.items() if key.startswith(self.prefix)}


def state_dicts(loaded: Any, where: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Every mapping in the file that holds tensors, by the keys that lead to it, in the order in which to try them."""
    if isinstance(loaded, (list, tuple)) and len(loaded) <= LISTED:
        loaded = {place: value for place, value in enumerate(loaded) if isinstance(value, Mapping)}
    if not isinstance(loaded, Mapping) or depth > DEPTH:
        return
    if any(isinstance(value, Tensor) for value in loaded.values()):
        yield where, loaded
    known = [key for key in WRAPPINGS if key in loaded]
    for key in [*known, *(key for key in loaded if key not in known)]:
        yield from state_dicts(loaded[key], f"{where}.{key}" if where else str(key), depth + 1)


def joined(loaded: Mapping[Any, Any]) -> dict[str, Any]:
    """The state dicts that a file holds side by side as those of a network's parts."""
    parts = {key: value for key, value in loaded.items() if isinstance(value, Mapping)}
    return {f"{part}.{key}": value for part, state in parts.items() for key, value in state.items()}


def _without_wrappers(state: Mapping[str, Any]) -> dict[str, str]:
    """The keys without the parts of wrappers -> as they are; all as they are where two would become one."""
    bare = {without_wrapper_parts(key): key for key in state}
    return bare if len(bare) == len(state) else {key: key for key in state}


def without_wrapper_parts(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def _prefix(found: dict[str, str], needed: dict[str, str], aliases: dict[str, list[str]]) -> str:
    """What stands in front of all keys of the network, such as `model.`; nothing where no prefix has them all."""
    short = {full: key for key, full in needed.items()}
    weights = {key: [short[same] for same in aliases.get(full, [])] for key, full in needed.items()}
    weights = {key: same for key, same in weights.items() if not _is_counter(key)}
    first = next(iter(weights), "")
    ends = [key[: -len(end)] for end in (first, *weights.get(first, [])) for key in found if key.endswith(f".{end}")]
    ends.sort(key=lambda prefix: not any(part in AVERAGED for part in prefix.split(".")))
    for prefix in ("", *ends):
        if all(any(prefix + name in found for name in (key, *same)) for key, same in weights.items()):
            return prefix
    return next((prefix for prefix in ends if all(key.startswith(prefix) for key in found)), "")


def aliases(wanted: dict[str, Tensor]) -> dict[str, list[str]]:
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


def covers(value: Tensor, view: Tensor) -> bool:
    """Whether all that `view` shows is memory of `value`, as the transposed weights of an encoder in its decoder."""
    if value is view or any(is_lazy(t) or t.layout != torch.strided or not t.numel() for t in (value, view)):
        return False
    if value.untyped_storage().data_ptr() != view.untyped_storage().data_ptr() or value.dtype != view.dtype:
        return False
    (low, high), (first, last) = _extent(value), _extent(view)
    return high - low == value.numel() and low <= first and last <= high


def _extent(value: Tensor) -> tuple[int, int]:
    """The first element of its storage that a tensor shows, and one behind the last."""
    first = value.storage_offset()
    steps = zip(value.shape, value.stride(), strict=True)
    return int(first), int(first) + 1 + sum((int(size) - 1) * int(step) for size, step in steps)


def is_extra(key: str) -> bool:
    return key.rpartition(".")[2] == EXTRA


def _counts(key: str, value: Tensor) -> bool:
    """Whether an entry of a network is no weight, so that a file may lack it."""
    return _is_counter(key) and not (is_lazy(value) or value.is_floating_point())


def _is_counter(key: str) -> bool:
    return key.rpartition(".")[2] in COUNTERS
