"""How far a network's outputs are from the float network's, on unlabelled images."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from faqd.fidelity import distances
from faqd.quantize.branches import branches_of
from faqd.quantize.outputs import run_batches

BATCH = 16


class OutputDistance:
    """The `distances` of other networks to `network`, a captured float one, on `images` (N, C, H, W), network input."""

    @torch.no_grad()
    def __init__(self, network: fx.GraphModule, images: Tensor) -> None:
        self.images = images
        self._branches = branches_of(network)
        self._wanted = {name: values.numpy() for name, values in run_batches(network, images, BATCH).items()}

    def of(self, network: nn.Module) -> float:
        """That of the worst output; `network` in evaluation mode."""
        found = {name: values.numpy() for name, values in run_batches(network, self.images, BATCH).items()}
        return max(distances(found, self._wanted, self._branches).values())
