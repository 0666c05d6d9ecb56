"""The processes that train one run together: one where nothing is said, several under `torchrun`."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

# Before any group is there: DistributedDataParallel imports it, and its functions' defaults would keep the group, with
# its threads, until the interpreter is half gone, where one of them that asks for the interpreter ends it by SIGABRT.
import torch.distributed.nn.functional
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from faqd.errors import UserError

T = TypeVar("T")

CPU = torch.device("cpu")
MOST_WORKERS = 8
"""Of those that nobody asked for."""


@dataclass(frozen=True)
class ProcessGroup:
    """This process among all: its number, how many there are, and where it trains. Rank 0 alone writes and speaks.

    is_distributed: whether torch's process group is there, which a single process has under torchrun only.
    workers: processes that decode images for this one, where those do not fit into memory; 0 for none.
    is_restart: whether torchrun started all again because one of them ended.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    is_distributed: bool = False
    workers: int = 1
    is_restart: bool = False

    @property
    def is_rank_0(self) -> bool:
        return self.rank == 0

    @property
    def share(self) -> slice:
        """The rows of a whole batch that are this process's: every size-th from its rank on."""
        return slice(self.rank, None, self.size)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, the same to the last bit in each."""
        if not self.is_distributed:
            return values
        distributed.all_reduce(values)
        return values / self.size

    def from_rank_0(self, function: Callable[[], T]) -> T:
        """What `function` returns in rank 0, which alone calls it. Its UserError is raised in every process."""
        if not self.is_distributed:
            return function()
        box: list[Any] = [None, None]
        if self.is_rank_0:
            try:
                box[0] = function()
            except UserError as error:
                box[1] = (str(error), error.exit_code)
        distributed.broadcast_object_list(box, src=0, device=self.device)
        if box[1] is not None:
            raise UserError(*box[1])
        result: T = box[0]
        return result

    def union(self, found: dict[str, str]) -> dict[str, str]:
        """What any of the processes found."""
        if not self.is_distributed:
            return found
        of_each: list[dict[str, str]] = [{} for _ in range(self.size)]
        distributed.all_gather_object(of_each, found)
        return {name: what for each in of_each for name, what in each.items()}

    def data_parallel(self, network: nn.Module, all_used: bool) -> nn.Module:
        """`network` as its forward pass is to be called, so that gradients are the mean over all processes.

        On GPUs its batch norms are replaced, in place, by those that see the whole batch; parameters and statistics
        stay the tensors they were. all_used: whether every parameter gets a gradient.
        """
        if not self.is_distributed:
            return network
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return DistributedDataParallel(
            network, device_ids=[self.device] if on_gpu else None, find_unused_parameters=not all_used
        )


@contextmanager
def process_group(device: str, workers: int | None = None) -> Iterator[ProcessGroup]:
    """This process alone; under torchrun among all the processes that it started.

    device: auto, cpu or cuda. workers: None for half of the cores that this process has for itself, MOST_WORKERS at
    most: the others train. UserError for cuda where there is none, or fewer than processes on this machine.
    """
    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if device == "cuda" and not gpus:
        raise UserError("--device cuda: torch sees no CUDA GPU here; use --device cpu.")
    if workers is None:
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // (2 * neighbours)))
    if not distributed.is_torchelastic_launched():
        yield ProcessGroup(device=torch.device("cuda" if gpus else "cpu"), workers=workers)
        return
    number = int(os.environ["LOCAL_RANK"])
    if gpus and number >= gpus:
        raise UserError(f"torchrun: more processes than the {gpus} GPUs here; give it --nproc-per-node {gpus}.")
    here = torch.device("cuda", number) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(here)
    rank, size = _join("nccl" if gpus else "gloo")
    # Each machine counts the restarts that it asked for itself.
    restarts = torch.tensor(_restarts(), device=here)
    distributed.all_reduce(restarts, distributed.ReduceOp.MAX)
    try:
        yield ProcessGroup(rank, size, here, True, workers, bool(restarts))
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or "gloo/transport" in str(error):
            raise UserError(
                "another of the processes that train together ended, and said why if it could. Go on with --resume; "
                "torchrun --max-restarts 3 does so by itself.",
                exit_code=1,
            ) from error
        raise
    # Not after an error: the others may be waiting, and torchrun ends them. Its threads end with the last network that
    # was trained in parallel, some of which only the collector finds.
    gc.collect()
    distributed.destroy_process_group()


def _join(backend: str) -> tuple[int, int]:
    """Meet the other processes: (rank, size)."""
    store, rank, size = next(iter(distributed.rendezvous("env://")))  # type: ignore[attr-defined]  # public, and not in __all__
    # torchrun's store outlives the processes, and with it the addresses of those that ended
    # (https://github.com/pytorch/pytorch/issues/135712). Several machines may count restarts differently.
    if size == int(os.environ["LOCAL_WORLD_SIZE"]):
        store = distributed.PrefixStore(f"restart-{_restarts()}", store)  # type: ignore[attr-defined]
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    return rank, size


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
