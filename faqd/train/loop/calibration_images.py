"""The training images that scales are chosen on."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from faqd.train.loop.batches import Images

CALIBRATION_IMAGES = 512


def calibration_batches(images: Images, size: int = 128) -> Iterator[Tensor]:
    """Network inputs, so many at a time."""
    for pixels in images.parts(size, CALIBRATION_IMAGES):
        yield images.normalised(pixels)
