"""Batches of pictures that are decoded by other processes, ahead of the iteration that needs them."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import count
from multiprocessing import forkserver

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from faqd.errors import UserError, first_line
from faqd.train.data.pictures import Pictures, Read

LONG_WAIT = 0.2
"""Of the time: with more than this spent waiting there is something to gain."""

Loaded = tuple[NDArray[np.uint8], list[Read]]
"""Pixels (B, C, H, W), and of the pictures those that were not read at once, without theirs. An array, because tensors
go through shared memory, of which a container has little."""


class DecodedPixels:
    """Pictures as pixels (N, C, H, W), a tensor of those that are asked for."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures
        number, height, width, channels = pictures.shape
        self.shape = (number, channels, height, width)
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: slice) -> Tensor:
        return torch.from_numpy(_channels_first(self.pictures[index]))


class Feed:
    """The batch of every iteration by its number, in any order; fast where they are asked for one after another.

    positions: of an iteration's images. workers: processes that decode, 0 for none beside this one. A batch is the same
    whoever decodes it, and whenever.
    """

    def __init__(
        self, pictures: Pictures, positions: Callable[[int], list[int]], workers: int, device: torch.device
    ) -> None:
        self._pictures, self._positions, self._workers = pictures, positions, workers
        self._pins = device.type == "cuda"
        self._next: int | None = None
        self._loaded: Iterator[Loaded] = iter(())
        self._waited, self._began, self._ended = 0.0, time.monotonic(), math.inf
        if workers:
            # Its first start takes seconds, which calibration can fill.
            _context().set_forkserver_preload([__name__])
            forkserver.ensure_running()

    def at(self, iteration: int) -> Tensor:
        """Pixels (B, C, H, W). UserError where a file changed, or a process died."""
        starts = iteration != self._next
        if starts:
            self._loaded = self._started(iteration)
        asked = time.monotonic()
        try:
            pixels, troubles = next(self._loaded)
        except RuntimeError as error:
            raise UserError(
                f"a process that decodes images ended ({first_line(error)}). Where memory ran out, go on with --resume "
                "and fewer --workers; 0 decodes in the process that trains.",
                exit_code=1,
            ) from error
        self._next = iteration + 1
        if starts:
            self._waited, self._began, self._ended = 0.0, time.monotonic(), math.inf
        else:
            self._waited += time.monotonic() - asked
        for read in troubles:
            self._pictures.see(read)
        batch = torch.from_numpy(pixels)
        return batch.pin_memory() if self._pins else batch

    def _started(self, iteration: int) -> Iterator[Loaded]:
        with warnings.catch_warnings():
            # Whoever asks for more processes than cores may know why: files can be slow to come.
            warnings.filterwarnings("ignore", "This DataLoader will create")
            return iter(
                DataLoader(
                    self._pictures.files,  # type: ignore[arg-type]  # a dataset by its methods
                    batch_sampler=map(self._positions, count(iteration)),
                    num_workers=self._workers,
                    collate_fn=_batch,
                    # Its own: it would draw a number from everybody's.
                    generator=torch.Generator(),
                    multiprocessing_context=_context() if self._workers else None,
                    worker_init_fn=_prepare,
                )
            )

    def close(self) -> None:
        """End the processes, and the time that counts; `at` starts others."""
        self._next, self._loaded, self._ended = None, iter(()), time.monotonic()

    @property
    def waited(self) -> float:
        """The share of the time since the first batch came in which an iteration waited for its images."""
        return self._waited / max(1e-9, min(self._ended, time.monotonic()) - self._began)

    def in_words(self) -> str:
        share = f"training waited for images {100 * self.waited:.0f} % of the time"
        if self.waited <= LONG_WAIT:
            return f"{share}."
        return (
            f"{share}, with --workers {self._workers}. More of them help where cores are idle; where none is, files "
            "that have the --image-size already are decoded in a fraction of the time, and JPEG files far beyond it in "
            "less with --decode reduced."
        )


def _context() -> multiprocessing.context.ForkServerContext:
    """A process that trains has threads, which a fork would cut off; a fork server has none, and loads torch once."""
    return multiprocessing.get_context("forkserver")


def _prepare(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal, and the one that trains ends the others. Where it was killed they end
    by themselves: torch's own watch sees the fork server, which lives as long as its children do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_with_the_trainer() -> None:
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    trainer.join()
    os._exit(1)


def _batch(reads: list[Read]) -> Loaded:
    troubles = [read.without_pixels() for read in reads if read.broken or read.pixels is None]
    pixels = [read.pixels for read in reads if read.pixels is not None]
    return _channels_first(np.stack(pixels)) if len(pixels) == len(reads) else np.empty(0, np.uint8), troubles


def _channels_first(images_NHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2))
