"""Saving and resuming exactly: weights, buffers, optimizer state and position, as safetensors and JSON.

Order and augmentation are drawn from (data seed, position), so a position is all that randomness needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from faqd.errors import UserError
from faqd.files import read_json, remove, write_json, written_beside
from faqd.train.network import read_tensors

PREFIX = "checkpoint-"


def save_checkpoint(run: Path, network: nn.Module, optimizer: torch.optim.Optimizer, iteration: int) -> None:
    """Write checkpoint-ITERATION whole, then drop older ones: a kill at any moment leaves one to resume from."""
    folder = run / f"{PREFIX}{iteration:08d}"
    with written_beside(folder) as temporary:
        temporary.mkdir()
        tensors = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
        save_file(tensors, temporary / "network.safetensors")
        save_file(_optimizer_tensors(optimizer), temporary / "optimizer.safetensors")
        write_json(temporary / "position.json", {"iteration": iteration, "threads": torch.get_num_threads()})
    for older in checkpoints(run)[:-1]:
        remove(older)


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(run.glob(f"{PREFIX}*"))


def drop_checkpoints(run: Path) -> None:
    """Remove all checkpoints of a finished run, and what a kill left half-written."""
    for path in [*checkpoints(run), *run.glob(".*.partial"), *run.glob(".*.old")]:
        remove(path)


def load_checkpoint(folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore network and optimizer; returns the position. UserError if the files are damaged."""
    position: dict[str, Any] = read_json(folder / "position.json")
    try:
        network.load_state_dict(read_tensors(folder / "network.safetensors"))
        saved = read_tensors(folder / "optimizer.safetensors")
        for index, parameter in enumerate(_parameters(optimizer)):
            prefix = f"{index}."
            state = {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
            if state:
                optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{folder}: the checkpoint does not fit this run; remove the folder to start over.") from error
    return position


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{key}": value.detach().cpu().contiguous()
        for index, parameter in enumerate(_parameters(optimizer))
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
