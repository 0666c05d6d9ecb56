"""Tensors whose first axis is not that of the images: what is compared of them, and without which probes."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import faqd
from tests.fixtures.networks import lively


class TokensOfAllImages(nn.Module):
    """Its linear layers read the tokens of all images on one axis, as window attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        images, tokens, channels = x.shape
        x = self.second(F.gelu(self.first(self.norm(x).reshape(images * tokens, channels))))
        return x.reshape(images, tokens, 4)


def test_tokens_of_all_images_on_one_axis_are_proved_in_fp16_too(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0)) / 255
    student = faqd.prepare(lively(TokensOfAllImages(), 0), images[:2])
    faqd.calibrate(student, images)
    bundle = faqd.export(student, tmp_path / "bundle", images)
    assert bundle.manifest["float_type"] == "fp16"
