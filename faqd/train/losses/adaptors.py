"""The paper's adaptors: between a student's feature maps and the affinity while it trains, and no longer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn


class Adapted(nn.Module):
    """A student that returns (output, maps), each map (B, C, H, W) behind a 1x1 convolution and a ReLU of its own.

    The convolutions start as the identity, so that training starts from the affinity without them. `tapped` is the
    student itself, which is all that a finished run keeps. A ReLU suits maps that are never negative on both sides; the
    maps with a number in `signed`, such as tokens, have none.
    """

    def __init__(
        self, tapped: nn.Module, channels: list[int], device: torch.device, signed: Collection[int] = ()
    ) -> None:
        super().__init__()
        self.tapped = tapped
        self.adaptors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, c, 1, device=device), *([] if place in signed else [nn.ReLU()]))
            for place, c in enumerate(channels)
        )
        for module in self.adaptors.modules():
            if isinstance(module, nn.Conv2d):
                assert module.bias is not None
                nn.init.dirac_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> tuple[Any, list[Tensor]]:
        output, maps = self.tapped(x)
        return output, [adaptor(each) for adaptor, each in zip(self.adaptors, maps, strict=True)]
