"""Random weights with which a deep network is calm, and pictures to settle it on.

Trained weights are not at hand for most. Random ones make deep networks chaotic: rounding to 8 bits then drowns what is
asked, whoever does it. So batch norms get the statistics of real activations and biases around 1, which keeps most
activations on the straight part of their curve, and nothing keeps the zeros and ones that a training starts with.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

NEARLY_ZERO = 0.05
"""Weights whose products with unit inputs stay below this are a start, and no trained layer's."""


def pictures(side: int, count: int, seed: int) -> NDArray[np.uint8]:
    """(N, H, W, 3): colours that change slowly (a spectrum of 1/f), blocks with edges, and grain."""
    draw = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    made = np.empty((count, side, side, 3), np.uint8)
    for index in range(count):
        spectrum = np.fft.rfft2(draw.normal(size=(3, side, side))) / frequency
        picture = np.moveaxis(np.fft.irfft2(spectrum, (side, side)), 0, 2)
        picture /= picture.std()
        for _ in range(draw.integers(2, 6)):
            (top, low), (left, right) = np.sort(draw.integers(0, side + 1, (2, 2)), axis=1)
            picture[top:low, left:right] += draw.normal(size=3)
        picture += 0.1 * draw.normal(size=picture.shape)
        made[index] = np.clip(draw.uniform(90, 160) + draw.uniform(30, 60) * picture, 0, 255).round()
    return made


def enliven(network: nn.Module) -> None:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            for name, value in module.named_parameters(recurse=False):
                if isinstance(module, nn.PReLU) or not value.is_floating_point():
                    continue
                if name == "bias":
                    centre, spread = (1.0, 0.2) if _has_statistics(module) else (0.0, 0.05)
                    value.normal_(centre, spread, generator=draw)
                elif value.dim() == 1 or (name.startswith(("gamma", "layer_scale", "ls")) and value.dim() < 5):
                    value.uniform_(0.6, 1.4, generator=draw)
                elif value.dim() > 1 and value.std(correction=0) * value[0].numel() ** 0.5 < NEARLY_ZERO:
                    value.normal_(0, value[0].numel() ** -0.5, generator=draw)


def settle(network: nn.Module, images: Tensor) -> None:
    """Each batch norm takes the statistics of what reaches it first, a little off, so that none does nothing."""
    draw = torch.Generator().manual_seed(1)

    def fit(norm: Any, given: tuple[Tensor, ...]) -> None:
        hooks.pop(norm).remove()
        axes = [axis for axis in range(given[0].dim()) if axis != 1]
        variance, mean = torch.var_mean(given[0], axes, correction=0)
        # A channel that is dead on these images may live on others.
        variance = variance.clamp_min(0.2 * float(variance.mean()) + 1e-6)
        norm.running_mean.copy_(mean + 0.1 * variance.sqrt() * torch.randn(mean.shape, generator=draw))
        norm.running_var.copy_(variance * (0.8 + 0.4 * torch.rand(mean.shape, generator=draw)))

    norms = [module for module in network.modules() if _has_statistics(module)]
    hooks = {norm: norm.register_forward_pre_hook(fit) for norm in norms}
    with torch.no_grad():
        network(images)
    for hook in hooks.values():
        hook.remove()


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(getattr(module, "running_mean", None), Tensor)
