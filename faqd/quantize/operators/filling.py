"""Channels of zeros among those that a network was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Filling:
    """Channels of zeros among those that a network was trained with.

    at_end: how many follow the others. behind_each: whether one more stands behind each of them all.
    """

    at_end: int = 0
    behind_each: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """x: channels on the second axis."""
        if self.at_end:
            x = F.pad(x, [0, 0] * (x.dim() - 2) + [0, self.at_end])
        return torch.stack([x, torch.zeros_like(x)], 2).flatten(1, 2) if self.behind_each else x

    def channels(self, trained: int) -> int:
        """How many there are with the zeros."""
        return (trained + self.at_end) * (2 if self.behind_each else 1)

    def without(self, x: Any) -> Any:
        """The channels that were trained, of a filled tensor or array."""
        trained = x[:, ::2] if self.behind_each else x
        return trained[:, : trained.shape[1] - self.at_end]


UNFILLED = Filling()
