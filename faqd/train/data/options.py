"""What the command line says about data, and the preprocessing that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from faqd.errors import UserError
from faqd.preprocess import Channels, Preprocess, Resize


@dataclass(frozen=True)
class DataOptions:
    """What the command line says about data; None stands for what is usual for the source.

    source: digits, cifar10, cifar100, tiny-imagenet, or KIND:PATH of docs/sources.md. root: where published sets lie.
    mean, std: 'none' for mean 0 and std 1. labels: subfolder names are the classes (folder only).
    limit: use that many training images only; they are a random choice, the same in every run. evaluation: another
    KIND:PATH, images that are evaluated on in place of a part of the source; `labels` are of these then, too.
    """

    source: str
    root: Path | None = None
    image_size: tuple[int, int] | None = None
    resize: Resize | None = None
    channels: Channels | None = None
    mean: tuple[float, ...] | Literal["none"] | None = None
    std: tuple[float, ...] | Literal["none"] | None = None
    labels: bool = False
    download: bool = False
    limit: int | None = None
    evaluation: str | None = None


def preprocess_of(
    options: DataOptions,
    size: Sequence[int],
    native: Channels,
    usual: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> Preprocess:
    """The record for a source of this size and these channels; `usual` is its mean and std where they are known."""
    if usual is None and (options.mean is None or options.std is None):
        raise UserError(
            f"--data {options.source} needs --mean and --std, in units of a pixel range 0..1, as the teacher was "
            "trained with: a silent wrong normalisation is the likeliest mistake here. For a teacher trained on "
            "ImageNet: --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225. For pixels 0..1 as they are: "
            "--mean none --std none."
        )
    channels = options.channels or native
    mean, std = (
        _per_channel(given, neutral, channels, native, None if usual is None else usual[index])
        for index, (given, neutral) in enumerate(((options.mean, 0.0), (options.std, 1.0)))
    )
    for name, values in (("mean", mean), ("std", std)):
        if any(abs(value) > 1 for value in values):
            raise UserError(f"--{name} {values}: expected units of a pixel range 0..1; divide --mean and --std by 255.")
    height, width = options.image_size or size
    return Preprocess(height, width, mean, std, options.resize or "stretch", channels)


def fitted(preprocess: Preprocess, images_NHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images of one size, grey or RGB, as the network will see them."""
    if images_NHWC.shape[1:] == (preprocess.height, preprocess.width, 3) and preprocess.channels == "rgb":
        return images_NHWC
    rgb_NHWC = np.broadcast_to(images_NHWC, (*images_NHWC.shape[:3], 3))
    # In C order, as the bytes of an image decide which split it goes to: np.stack keeps the order of a resized one.
    return np.ascontiguousarray(np.stack([preprocess.fit(image) for image in rgb_NHWC]))


def _per_channel(
    given: tuple[float, ...] | Literal["none"] | None,
    neutral: float,
    channels: Channels,
    native: Channels,
    usual: tuple[float, ...] | None,
) -> tuple[float, ...]:
    if given == "none":
        return (neutral,) * (1 if channels == "grey" else 3)
    if given is not None:
        return given
    assert usual is not None
    if native == "grey" and channels != "grey":
        return usual * 3
    return usual[::-1] if channels == "bgr" else usual
