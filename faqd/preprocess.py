"""The one preprocessing record, and its one implementation.

A checkpoint and a bundle carry the record; training, export, calibration and the bench all apply it here, so
that no tool can see other pixels than another.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from faqd.errors import UserError

Resize = Literal["stretch", "crop", "letterbox"]
Channels = Literal["rgb", "bgr", "grey"]
LETTERBOX_GREY = 114
"""Pixel value of letterbox borders: what detection users' own pipelines pad with."""


@dataclass(frozen=True)
class Preprocess:
    """From an upright RGB uint8 image of any size to the network's input.

    height, width: pixels. resize: how another size is brought to them: stretched; scaled to cover and cropped
    at the centre; or scaled to fit inside grey borders. channels: order at the network's input.
    mean, std: per channel, in units of a pixel range 0..1: input = (pixel / 255 - mean) / std.
    """

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize = "stretch"
    channels: Channels = "rgb"

    def __post_init__(self) -> None:
        wanted = 1 if self.channels == "grey" else 3
        if len(self.mean) != wanted or len(self.std) != wanted:
            raise UserError(
                f"--mean and --std need {wanted} value(s) for {self.channels} input, "
                f"found {len(self.mean)} and {len(self.std)}."
            )
        if min(self.std) <= 0:
            raise UserError(f"--std {self.std}: every value must be above 0.")

    def scaled_size(self, height: int, width: int) -> tuple[int, int]:
        """What an image of this size is scaled to, before borders are cut off or added."""
        if self.resize == "stretch":
            return self.height, self.width
        ratio = (max if self.resize == "crop" else min)(self.height / height, self.width / width)
        return max(1, round(height * ratio)), max(1, round(width * ratio))

    def fit(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """One upright RGB image (H, W, 3) uint8 -> (height, width, channels) uint8."""
        return _to_channels(self._resized(image_HWC), self.channels)

    def _resized(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if image.shape[:2] == (self.height, self.width):
            return image
        scaled = _scaled(image, *self.scaled_size(*image.shape[:2]))
        if self.resize == "stretch":
            return scaled
        h, w = scaled.shape[:2]
        if self.resize == "crop":
            top, left = max(0, h - self.height) // 2, max(0, w - self.width) // 2
            return scaled[top : top + self.height, left : left + self.width]
        framed = np.full((self.height, self.width, image.shape[2]), LETTERBOX_GREY, np.uint8)
        top, left = (self.height - h) // 2, (self.width - w) // 2
        framed[top : top + h, left : left + w] = scaled
        return framed

    def normalise(self, images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Fitted images (N, height, width, channels) uint8 -> network input (N, channels, height, width) float32."""
        scale, offset = self.affine()
        return np.ascontiguousarray((images_NHWC.astype(np.float32) * scale + offset).transpose(0, 3, 1, 2))

    def pixels(self, inputs_NCHW: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Network input (N, channels, height, width) -> the nearest fitted images (N, height, width, channels) uint8.

        UserError where some of it lies outside of what this normalisation makes of pixels.
        """
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        found = np.rint((inputs_NCHW.transpose(0, 2, 3, 1) * std + mean) * 255)
        if not (found.min() >= 0 and found.max() <= 255):
            raise UserError(
                f"images from {inputs_NCHW.min():.3g} to {inputs_NCHW.max():.3g} are not what mean {self.mean} and std "
                f"{self.std} make of pixels; give those that they were normalised with, in units of 0..1."
            )
        pixels: NDArray[np.uint8] = found.astype(np.uint8)
        return pixels

    def affine(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The normalisation as input = pixel * scale + offset, per channel, float32."""
        mean, std = np.asarray(self.mean), np.asarray(self.std)
        return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)

    def in_words(self) -> str:
        """As a person checks it, in units of a pixel range 0..1."""
        mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (self.mean, self.std))
        return (
            f"{self.height} x {self.width} pixels (other sizes: {self.resize}), {self.channels}, "
            f"(pixel / 255 - mean) / std with mean {mean} and std {std}"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Preprocess:
        return cls(**{**record, "mean": tuple(record["mean"]), "std": tuple(record["std"])})


def _scaled(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Separable triangle-filter resize, widened when shrinking so that nothing aliases.

    Elementwise float32 operations in a fixed order: a matrix product would round differently on every machine.
    """
    rows = _filtered(image.astype(np.float32), height)
    scaled_WHC = _filtered(np.ascontiguousarray(rows.swapaxes(0, 1)), width)
    pixels_HWC: NDArray[np.uint8] = np.clip(np.rint(scaled_WHC), 0, 255).astype(np.uint8).swapaxes(0, 1)
    return pixels_HWC


def _filtered(image: NDArray[np.float32], target: int) -> NDArray[np.float32]:
    """Resize the first axis to `target`."""
    total = np.zeros((target, *image.shape[1:]), np.float32)
    for index, weights in zip(*_triangle_taps(len(image), target), strict=True):
        total += image[index] * weights[:, None, None]
    return total


def _triangle_taps(source: int, target: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Source indices and weights, (taps, target) each; weights sum to one; pixel centres at half-integers."""
    reach = max(1.0, source / target)
    centres = (np.arange(target) + 0.5) * source / target
    first = np.ceil(centres - reach - 0.5).astype(np.int64)
    index = first + np.arange(int(2 * reach) + 1)[:, None]
    weights = np.maximum(0.0, 1.0 - np.abs(index + 0.5 - centres) / reach)
    weights[(index < 0) | (index >= source)] = 0.0
    return index.clip(0, source - 1), (weights / weights.sum(0)).astype(np.float32)


def _to_channels(image_HWC: NDArray[np.uint8], channels: Channels) -> NDArray[np.uint8]:
    if channels == "rgb":
        return image_HWC
    if channels == "bgr":
        return image_HWC[..., ::-1]
    # ITU-R BT.601 luma, the grey of every common image library.
    grey = image_HWC.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.rint(grey).astype(np.uint8)[..., None]
