"""A network's tensors by key, past its own saving and loading.

Hooks on a state dict, versions of it and extra state are for the user's file, which is read once. What a run keeps are
the tensors that came of it: put back through hooks that rescale, they would be others.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def own_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by the keys that a state dict has for them, also those that it leaves out; what is one
    comes under all its names."""
    return {
        f"{place}.{name}" if place else name: value
        for place, module in network.named_modules(remove_duplicate=False)
        for name, value in (*module._parameters.items(), *module._buffers.items())
        if value is not None
    }


@torch.no_grad()
def put_tensors(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Fill `network` with what `own_tensors` gave of one like it. RuntimeError where keys or shapes are others."""
    own = own_tensors(network)
    if own.keys() != tensors.keys():
        raise RuntimeError(f"other keys: {', '.join(sorted(own.keys() ^ tensors.keys())[:3])}")
    for key, value in own.items():
        if value.shape != tensors[key].shape:
            raise RuntimeError(f"{key}: {tuple(tensors[key].shape)} for {tuple(value.shape)}")
        value.copy_(tensors[key])


def copy_of(network: nn.Module) -> nn.Module:
    """A copy in which tensors share their memory as they do in `network`; copied alone, each parameter gets its own."""
    copied = copy.deepcopy(network)
    old, new = _all_tensors(network), _all_tensors(copied)
    shared = Counter(value.untyped_storage().data_ptr() for value in old.values() if value.numel())
    memory: dict[int, torch.UntypedStorage] = {}
    for key in old.keys() & new.keys():
        value, storage = old[key], old[key].untyped_storage()
        if shared[storage.data_ptr()] > 1:
            own = memory.setdefault(storage.data_ptr(), storage.clone())
            view = torch.empty(0, dtype=value.dtype, device=value.device)
            new[key].data = view.set_(own, value.storage_offset(), value.shape, value.stride())
    return copied


def _all_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The plain ones of a network, and those that modules keep as attributes alone."""
    found = own_tensors(network)
    for place, module in network.named_modules(remove_duplicate=False):
        found |= {f"{place}.{name}": value for name, value in vars(module).items() if isinstance(value, Tensor)}
    return {key: value for key, value in found.items() if not is_lazy(value) and value.layout == torch.strided}


def with_own_memory(network: nn.Module) -> nn.Module:
    """`network`, whose expanded buffers and parameters have memory for each value: what shares it cannot be filled."""
    for module in network.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and _is_expanded(buffer):
                module._buffers[name] = buffer.contiguous()
        for parameter in module._parameters.values():
            if parameter is not None and _is_expanded(parameter):
                parameter.data = parameter.data.contiguous()
    return network


def _is_expanded(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or is_lazy(tensor):
        return False
    return any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
