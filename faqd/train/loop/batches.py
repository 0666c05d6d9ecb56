"""What an iteration shows to every student: a batch of augmented images and what the teacher makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from faqd.errors import UserError
from faqd.preprocess import Preprocess
from faqd.train.data.augment import augment
from faqd.train.data.datasets import Augmentation, Dataset
from faqd.train.loop.distributed import ProcessGroup
from faqd.train.recipes import Training

SELECT_IMAGES = 512
SHARE_OF_FREE = 0.4
"""Of a GPU's free memory: what the pixels of a split may take at most."""

ORDER, AUGMENTATION, SELECTION, NORMS, PROJECTION, FORWARD = range(1, 7)
"""What a stream of random numbers is for."""


@dataclass(frozen=True)
class Images:
    """uint8 pixels (N, C, H, W), labels (N,) or None, and how they become input.

    All on the training device; pixels in the host's memory where they would take too much of a GPU's.
    """

    pixels: Tensor
    labels: Tensor | None
    scale: Tensor
    offset: Tensor
    augmentation: Augmentation

    def normalised(self, pixels: Tensor) -> Tensor:
        """Network input on the training device."""
        x = pixels.to(self.scale.device, non_blocking=True).float() * self.scale + self.offset
        return x.contiguous(memory_format=torch.channels_last)


def images_on(
    device: torch.device, images_NHWC: object, labels: object, preprocess: Preprocess, augmentation: Augmentation
) -> Images:
    """Put a split on the device whole, as uint8, where that leaves room for the training."""
    pixels = torch.as_tensor(images_NHWC).permute(0, 3, 1, 2).contiguous()
    pixels = pixels.to(device) if _fits(pixels, device) else pixels.pin_memory()
    scale, offset = (torch.from_numpy(v).to(device).view(1, -1, 1, 1) for v in preprocess.affine())
    targets = None if labels is None else torch.as_tensor(labels).to(device)
    return Images(pixels, targets, scale, offset, augmentation)


def _fits(pixels: Tensor, device: torch.device) -> bool:
    return device.type != "cuda" or pixels.nbytes <= torch.cuda.mem_get_info(device)[0] * SHARE_OF_FREE


def splits_on(device: torch.device, dataset: Dataset) -> tuple[Images, Images]:
    """The train and select splits on the device."""
    made = [
        images_on(device, split.images, split.labels, dataset.preprocess, dataset.augmentation)
        for split in (dataset.train, dataset.select)
    ]
    return made[0], made[1]


@dataclass(frozen=True)
class Target:
    """The teacher's outputs for a batch by name, and its feature maps (B, C, H, W) by node name."""

    outputs: dict[str, Tensor]
    maps: dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """x: network input (B, C, H, W). labels: (B,), None where there are none. target: None without a teacher."""

    x: Tensor
    labels: Tensor | None
    target: Target | None


@dataclass(frozen=True)
class Batches:
    """The batch of every iteration, a function of (data seed, iteration) alone; one pass of the teacher for each.

    size: images in all processes together. teacher: network input to target, without gradient.
    """

    train: Images
    select: Images
    size: int
    data_seed: int
    teacher: Callable[[Tensor], Target] | None
    processes: ProcessGroup
    _orders: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The order of the current epoch, drawn once."""

    def __post_init__(self) -> None:
        if self.size % self.processes.size:
            raise UserError(
                f"--batch-size {self.size}: not a multiple of the {self.processes.size} processes that share a batch."
            )

    @property
    def per_epoch(self) -> int:
        return max(1, len(self.train.pixels) // self.size)

    def iterations(self, training: Training) -> int:
        """How many a schedule has on these images."""
        return training.steps or training.epochs * self.per_epoch

    def at(self, iteration: int) -> Batch:
        """This process's share of the batch."""
        epoch, position = divmod(iteration, self.per_epoch)
        index = self._order(epoch)[position * self.size : (position + 1) * self.size]
        # The whole batch in every process: an image is augmented as it would be in a single one.
        generator = stream(self.data_seed, AUGMENTATION, iteration)
        pixels = self.train.pixels[index].to(self.train.scale.device, non_blocking=True)
        pixels = augment(pixels, self.train.augmentation, generator)
        labels = None if self.train.labels is None else self.processes.shard(self.train.labels[index])
        return self._batch(self.train.normalised(self.processes.shard(pixels)), labels)

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            self._orders.clear()
            drawn = torch.randperm(len(self.train.pixels), generator=stream(self.data_seed, ORDER, epoch))
            self._orders[epoch] = drawn.to(self.train.pixels.device)
        return self._orders[epoch]

    def selection(self) -> Iterator[Batch]:
        """Unaugmented images of the select split, what model selection may look at, in parts of one batch's size."""
        for start in range(0, min(SELECT_IMAGES, len(self.select.pixels)), self.size):
            part = slice(start, min(start + self.size, SELECT_IMAGES))
            labels = None if self.select.labels is None else self.select.labels[part]
            yield self._batch(self.select.normalised(self.select.pixels[part]), labels)

    def _batch(self, x: Tensor, labels: Tensor | None) -> Batch:
        return Batch(x, labels, None if self.teacher is None else self.teacher(x))


def stream(seed: int, use: int, *position: int) -> torch.Generator:
    """An independent stream for each (seed, use, position)."""
    # torch's generator on the CPU looks at the low 32 bits of a seed only, so that all are hashed into those.
    hashed = np.random.SeedSequence(seed, spawn_key=(use, *position)).generate_state(1)
    return torch.Generator().manual_seed(int(hashed[0]))
