"""A user's weights into a user's network: whatever wraps them in the file, and nothing that only looks like weights."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from faqd.errors import UserError, first_line
from faqd.train.networks.own_tensors import copy_of, own_tensors, put_tensors
from faqd.train.networks.state_dicts import AVERAGED, Fit, is_extra, joined, state_dicts
from faqd.train.networks.weight_values import as_weight, refuse_other_state, refuse_two_values, refuse_views_of_two
from faqd.train.networks.weights_file import read_weights_file


def load_weights(network: nn.Module, path: Path, say: Callable[[str], None] = lambda _: None) -> None:
    """Fill `network` from a safetensors file, or from a file of torch.save that holds tensors only.

    Wrappings are looked through; `say` tells which of several state dicts was taken, and what beside it was left out.
    UserError for a damaged file, pickled classes, another network's weights, and values that are no weights: not
    finite, of another kind than floats, a negative variance, or different ones for what the network has as one tensor;
    and for state beside tensors that is not what the network was built with.
    """
    try:
        own = network.state_dict(keep_vars=True)
    except Exception as error:  # modules make their state with code of their own
        raise UserError(f"{type(network).__name__}: its state_dict() fails ({first_line(error)}).") from error
    wanted = {key: value for key, value in own.items() if isinstance(value, Tensor) and not is_extra(key)}
    loaded = read_weights_file(path)
    found = [Fit(*candidate, wanted) for candidate in state_dicts(loaded)]
    if all(fit.problems for fit in found) and (whole := joined(loaded)):
        found.append(Fit("", whole, wanted))
    if not found:
        raise UserError(f"{path}: holds no state dict; found the keys {', '.join(map(str, list(loaded)[:8]))}.")
    fitting = [fit for fit in found if not fit.problems]
    if not fitting and any(_loads_as_it_is(network, candidate) for _, candidate in state_dicts(loaded)):
        return
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
    if bare := [key for key in loaded if key in AVERAGED and not any(f.where.split(".")[0] == key for f in found)]:
        say(f"{path}: leaves out what lies under '{bare[0]}', which is no state dict: its tensors have no names.")
    if taken.left_out:
        takes = f"takes the weights under '{taken.prefix}' and " if taken.prefix else ""
        say(f"{path}: {takes}leaves out {_listed(taken.left_out)}.")
    state = OrderedDict((key, as_weight(path, key, value, wanted[key])) for key, value in taken.state.items())
    refuse_two_values(path, state, wanted)
    refuse_other_state(path, taken, own)
    state._metadata = taken.versions(network.state_dict()._metadata)  # type: ignore[attr-defined]
    try:
        network.load_state_dict(state, strict=False)
    except Exception as error:  # modules read their state with code of their own
        raise UserError(
            f"{path}: {type(network).__name__} does not load these weights ({type(error).__name__}: "
            f"{first_line(error)}). Is it quantized or packed already? Give the float network, and its weights."
        ) from error
    refuse_views_of_two(path, network, state)


def _loads_as_it_is(network: nn.Module, state: Mapping[Any, Any]) -> bool:
    """Whether the network itself takes all of a state dict: it may have hooks that know other names of its weights."""
    tensors = OrderedDict((key, value) for key, value in state.items() if isinstance(value, Tensor))
    if not all(value.is_floating_point() or value.dtype == torch.int64 for value in tensors.values()):
        return False  # no weights, or counts of them
    tensors._metadata = getattr(state, "_metadata", None)  # type: ignore[attr-defined]
    tried = copy_of(network)
    try:
        tried.load_state_dict(tensors)
    except Exception:  # of its own code; then it does not
        return False
    values = own_tensors(tried)
    if not all(bool(value.isfinite().all()) for value in values.values()):
        return False
    put_tensors(network, values)
    return True


def _what_to_give(path: Path, nearest: Fit) -> str:
    if re.search(r"-\d+-of-\d+", path.name):
        return "The file is one of several; load all of them where the network was trained, and save its state dict."
    if any(re.search(r"parametrizations\.|_[gv]$|_orig$|_mask$", key) for key in nearest.foreign):
        return (
            "The file is of before a weight norm, a parametrization or a pruning was removed: load it where that still "
            "is, remove it, and save the state dict."
        )
    return "Give the weights that were trained with this very network."


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")
