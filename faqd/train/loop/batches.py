"""What an iteration shows to every student: a batch of augmented images and what the teacher makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from faqd.errors import UserError
from faqd.preprocess import Preprocess
from faqd.train.data.augment import augment, shifted, views
from faqd.train.data.datasets import Augmentation, Dataset
from faqd.train.data.pictures import Pictures
from faqd.train.loop.distributed import ProcessGroup
from faqd.train.loop.feed import DecodedPixels, Feed
from faqd.train.recipes import Decode, Training

SELECT_IMAGES = 512
SHARE_OF_FREE = 0.4
"""Of a GPU's free memory: what the pixels of a split may take at most."""

ORDER, AUGMENTATION, SELECTION, NORMS, PROJECTION, FORWARD = range(1, 7)
"""What a stream of random numbers is for."""


@dataclass(frozen=True)
class Images:
    """uint8 pixels (N, C, H, W), labels (N,) or None, and how they become input.

    views: (V, 3), those of `faqd.train.data.augment.views` where an image is shown in no others.

    All on the training device; pixels in the host's memory where they would take too much of a GPU's, and nowhere yet
    where they are decoded when they are asked for.
    """

    pixels: Tensor | DecodedPixels
    labels: Tensor | None
    scale: Tensor
    offset: Tensor
    augmentation: Augmentation
    views: Tensor | None = None

    def augmented(
        self, pixels: Tensor, generator: torch.Generator, share: slice = slice(None), whole: int | None = None
    ) -> Tensor:
        """Pixels as `augment` makes them, or in the views that are drawn."""
        if self.views is None:
            return augment(pixels, self.augmentation, generator, share, whole)
        drawn = self.drawn_views(generator, len(pixels) if whole is None else whole)[share]
        return shifted(pixels, self.augmentation, self.views[drawn])

    def drawn_views(self, generator: torch.Generator, count: int) -> Tensor:
        """Numbers (count,) of views; of an image that has one, 0."""
        return torch.randint(1 if self.views is None else len(self.views), (count,), generator=generator)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Network input on the training device."""
        x = pixels.to(self.scale.device, non_blocking=True).float() * self.scale + self.offset
        return x.contiguous(memory_format=torch.channels_last)

    def parts(self, size: int, most: int) -> Iterator[Tensor]:
        """The pixels of the first images, `most` of them, so many at a time."""
        for start in range(0, min(most, len(self.pixels)), size):
            yield self.pixels[start : min(start + size, most)]


def images_on(
    device: torch.device, images_NHWC: object, labels: object, preprocess: Preprocess, augmentation: Augmentation
) -> Images:
    """Put a split on the device whole, as uint8, where that leaves room for the training; pictures stay files."""
    pixels: Tensor | DecodedPixels
    if isinstance(images_NHWC, Pictures):
        pixels = DecodedPixels(images_NHWC)
    else:
        pixels = torch.as_tensor(images_NHWC).permute(0, 3, 1, 2).contiguous()
        pixels = pixels.to(device) if _fits(pixels, device) else pixels.pin_memory()
    scale, offset = (torch.from_numpy(v).to(device).view(1, -1, 1, 1) for v in preprocess.affine())
    targets = None if labels is None else torch.as_tensor(labels).to(device)
    return Images(pixels, targets, scale, offset, augmentation)


def _fits(pixels: Tensor, device: torch.device) -> bool:
    return device.type != "cuda" or pixels.nbytes <= torch.cuda.mem_get_info(device)[0] * SHARE_OF_FREE


def splits_on(device: torch.device, dataset: Dataset, count: int | None = None) -> tuple[Images, Images]:
    """The train and validation splits on the device. count: of views, None for any augmentation."""
    made = [
        images_on(device, split.pixels, split.labels, dataset.preprocess, dataset.augmentation)
        for split in (dataset.train, dataset.select)
    ]
    fixed = None if count is None else views(dataset.augmentation, count)
    return replace(made[0], views=fixed), made[1]


@dataclass(frozen=True)
class Target:
    """The teacher's outputs for a batch by name, and its feature maps (B, C, H, W) by node name."""

    outputs: dict[str, Tensor]
    maps: dict[str, Tensor]

    def at(self, part: slice) -> Target:
        """That of some of the images."""
        return Target(*({name: value[part] for name, value in each.items()} for each in (self.outputs, self.maps)))

    @classmethod
    def joined(cls, parts: Sequence[Target]) -> Target:
        """That of all images of several parts."""
        outputs, maps = (
            {name: torch.cat([getattr(part, kind)[name] for part in parts]) for name in getattr(parts[0], kind)}
            for kind in ("outputs", "maps")
        )
        return cls(outputs, maps)


@dataclass(frozen=True)
class Batch:
    """x: network input (B, C, H, W). labels: (B,), None where there are none. target: None without a teacher."""

    x: Tensor
    labels: Tensor | None
    target: Target | None

    def parts(self, count: int) -> list[Batch]:
        """Cut into so many of equal size."""
        if count == 1:
            return [self]
        size = len(self.x) // count
        return [self._at(slice(start, start + size)) for start in range(0, len(self.x), size)]

    def _at(self, part: slice) -> Batch:
        target = None if self.target is None else self.target.at(part)
        return Batch(self.x[part], None if self.labels is None else self.labels[part], target)


@dataclass(frozen=True)
class Batches:
    """The batch of every iteration, a function of (data seed, iteration) alone; one pass of the teacher for each.

    size: images in all processes together. teacher: network input to target, without gradient. accumulate: parts of a
    process's share that a network sees one after another. decode: as Training has it. cache: positions and views of
    training images to target.
    """

    train: Images
    select: Images
    size: int
    data_seed: int
    teacher: Callable[[Tensor], Target] | None
    processes: ProcessGroup
    accumulate: int = 1
    decode: Decode = "full"
    cache: Callable[[Tensor, Tensor], Target] | None = None
    _orders: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The orders of the current epochs, drawn once."""

    def __post_init__(self) -> None:
        if self.decode == "reduced" and isinstance(self.train.pixels, Tensor):
            raise UserError(
                "--decode reduced: the images stay in memory, for which each is decoded once; leave it out."
            )
        _ = self.feed  # whose processes take seconds to start, while other work is done

    @property
    def per_epoch(self) -> int:
        return max(1, len(self.train.pixels) // self.size)

    def iterations(self, training: Training) -> int:
        """How many a schedule has on these images."""
        return training.steps or training.epochs * self.per_epoch

    def at(self, iteration: int) -> Batch:
        """This process's share of the batch, which is all that it decodes."""
        pixels = self._pixels(iteration).to(self.train.scale.device, non_blocking=True)
        generator = stream(self.data_seed, AUGMENTATION, iteration)
        whole = len(self._index(iteration))
        pixels = self.train.augmented(pixels, generator, self.processes.share, whole)
        labels = None if self.train.labels is None else self.train.labels[self._own(iteration)]
        if self.cache is not None:
            drawn = self.train.drawn_views(stream(self.data_seed, AUGMENTATION, iteration), whole)
            target = self.cache(self._own(iteration).cpu(), drawn[self.processes.share])
            return Batch(self.train.normalised(pixels), labels, target)
        return self._batch(self.train.normalised(pixels), labels, self.accumulate)

    @property
    def part_size(self) -> int:
        """How many images a network may be given at once."""
        return max(1, self.size // self.accumulate)

    @cached_property
    def feed(self) -> Feed | None:
        """What decodes training images ahead of their iteration; None where they are in memory."""
        if isinstance(self.train.pixels, Tensor):
            return None
        pictures, processes = self.train.pixels.pictures, self.processes
        if self.decode == "reduced":
            pictures = pictures.reduced()
        return Feed(pictures, lambda i: self._own(i).tolist(), processes.workers, processes.device)

    @property
    def broken(self) -> dict[str, str]:
        """Training files that were passed over so far, and what is wrong with each."""
        return {} if isinstance(self.train.pixels, Tensor) else self.train.pixels.pictures.findings.broken

    def share_findings(self) -> None:
        """Tell every process which files the others passed over, for each reads others."""
        if self.feed is not None:
            self.broken.update(self.processes.union(self.broken))

    def in_words(self) -> list[str]:
        """How the images came, of those that are decoded in training."""
        passed_over = [
            images.pixels.pictures.in_words()
            for images in (self.train, self.select)
            if isinstance(images.pixels, DecodedPixels)
        ]
        waited = [] if self.feed is None else [self.feed.in_words()]
        return [*filter(None, passed_over), *waited]

    def _pixels(self, iteration: int) -> Tensor:
        if self.feed is not None:
            return self.feed.at(iteration)
        assert isinstance(self.train.pixels, Tensor)
        return self.train.pixels[self._own(iteration)]

    def _own(self, iteration: int) -> Tensor:
        return self._index(iteration)[self.processes.share]

    def _index(self, iteration: int) -> Tensor:
        epoch, position = divmod(iteration, self.per_epoch)
        if epoch not in self._orders:
            # The feed is ahead, by an epoch at most where epochs are long.
            for old in [known for known in self._orders if known < epoch - 1]:
                del self._orders[old]
            drawn = torch.randperm(len(self.train.pixels), generator=stream(self.data_seed, ORDER, epoch))
            self._orders[epoch] = drawn.to(self.train.pixels.device)
        return self._orders[epoch][position * self.size : (position + 1) * self.size]

    def selection(self) -> Iterator[Batch]:
        """Unaugmented images of the validation split, what model selection may look at, in parts that fit."""
        start = 0
        for pixels in self.select.parts(self.part_size, SELECT_IMAGES):
            part = slice(start, start + len(pixels))
            labels = None if self.select.labels is None else self.select.labels[part]
            yield self._batch(self.select.normalised(pixels), labels)
            start += len(pixels)

    def _batch(self, x: Tensor, labels: Tensor | None, parts: int = 1) -> Batch:
        if self.teacher is None:
            return Batch(x, labels, None)
        targets = [self.teacher(part.x) for part in Batch(x, None, None).parts(parts)]
        return Batch(x, labels, targets[0] if parts == 1 else Target.joined(targets))


def refuse_uneven(training: Training, images: int, processes: ProcessGroup) -> None:
    """UserError where the batch cannot be cut into equal parts, of which gradients are a plain mean. images: to train
    on."""
    taken, parts = min(training.batch_size, images), processes.size * training.accumulate
    if taken % parts == 0:
        return
    sharing = f"{processes.size} processes that share a batch"
    if training.accumulate == 1:
        what = f"--batch-size {taken}: not a multiple of the {sharing}"
    else:
        among = f" in each of {sharing}" if processes.size > 1 else ""
        what = f"--accumulate {training.accumulate}: {taken} images do not make so many equal parts{among}"
    cure = f"--batch-size {taken // parts * parts}" if taken >= parts else "fewer of them"
    raise UserError(f"{what}; give {cure}.")


def stream(seed: int, use: int, *position: int) -> torch.Generator:
    """An independent stream for each (seed, use, position)."""
    # torch's generator on the CPU looks at the low 32 bits of a seed only, so that all are hashed into those.
    hashed = np.random.SeedSequence(seed, spawn_key=(use, *position)).generate_state(1)
    return torch.Generator().manual_seed(int(hashed[0]))
