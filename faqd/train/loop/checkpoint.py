"""Saving and resuming exactly: weights, buffers, optimizer state and position, as safetensors and JSON.

Order and augmentation are drawn from (data seed, position), so a position is all that randomness needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from faqd.errors import UserError
from faqd.files import leftovers, read_json, remove, write_json, written_beside
from faqd.train.networks.own_tensors import own_tensors, put_tensors
from faqd.train.networks.tensor_files import read_tensors, write_tensors

PREFIX = "checkpoint-"
BEST = "best.safetensors"


@dataclass(frozen=True)
class Position:
    """How far a run is.

    iteration: how many are done. sums: of each loss since the epoch began. seconds: of training. threads: on the CPU;
    sums of floats depend on their number. loss_scale: state of torch's GradScaler, empty where the loss is not scaled.
    best: what is known of the best weights so far, empty where they are not looked for. broken: files that were passed
    over so far, where images are decoded in training, and what is wrong with each.
    """

    iteration: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    threads: int = field(default_factory=torch.get_num_threads)
    loss_scale: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


def save_checkpoint(
    run: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    position: Position,
    best: Mapping[str, Tensor] | None = None,
) -> None:
    """Write checkpoint-ITERATION whole, then drop older ones: a kill at any moment leaves one to resume from.

    best: the best weights so far.
    """
    folder = run / f"{PREFIX}{position.iteration:08d}"
    with written_beside(folder) as temporary:
        temporary.mkdir()
        write_tensors(temporary / "network.safetensors", own_tensors(network))
        write_tensors(temporary / "optimizer.safetensors", _optimizer_tensors(optimizer))
        if best:
            write_tensors(temporary / BEST, best)
        write_json(temporary / "position.json", asdict(position))
    for older in checkpoints(run)[:-1]:
        remove(older)


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(run.glob(f"{PREFIX}*"))


def iteration_of(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def drop_checkpoints(run: Path) -> None:
    """Remove all checkpoints of a finished run, and what a kill left half-written."""
    for path in [*checkpoints(run), *leftovers(run)]:
        remove(path)


def load_checkpoint(folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> Position:
    """Restore network and optimizer. UserError if the files are damaged."""
    try:
        position = Position(**read_json(folder / "position.json"))
        put_tensors(network, read_tensors(folder / "network.safetensors"))
        saved = read_tensors(folder / "optimizer.safetensors")
        for index, parameter in enumerate(_parameters(optimizer)):
            prefix = f"{index}."
            state = {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
            if state:
                optimizer.state[parameter] = {key: _like(parameter, value) for key, value in state.items()}
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{folder}: the checkpoint does not fit this run; remove it to start over.") from error
    return position


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` where the parameter is, and in its layout where it has its shape: a fused optimizer refuses another."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value.to(parameter.device)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{key}": value
        for index, parameter in enumerate(_parameters(optimizer))
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
