"""Adam with steps that are shares of what is learned, for fine-tuning weights of any size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

BETAS = 0.9, 0.999
TINY = 1e-30
"""Added to the root of the second moment, where a gradient was zero in every iteration."""


class RelativeAdam(torch.optim.Optimizer):
    """Adam (arXiv 1412.6980) whose rate is a share of the root mean square of what it moves, as that was at the start:
    of a weight's input channel, of a bias, of a scale.

    Trained weights differ in size from channel to channel by orders of magnitude, most where a network was equalized or
    its batch norm folded: one absolute rate destroys the small ones, or leaves the large ones as they are. A tensor of
    zeros has no size of its own, and counts as one of ones.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; what had no gradient stays."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group["lr"])

    def _move(self, parameter: Tensor, gradient: Tensor, rate: float) -> None:
        state = self.state[parameter]
        if not state:
            # On the device, so that the host need not wait for it.
            state["count"], state["size"] = torch.zeros((), device=parameter.device), _size(parameter)
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["count"] += 1
        state["mean"].lerp_(gradient, 1 - BETAS[0])
        state["square"].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        unbiased = (1 - BETAS[1] ** state["count"]).sqrt() / (1 - BETAS[0] ** state["count"])
        step = (state["mean"] / state["square"].sqrt().add_(TINY)).mul_(unbiased)
        parameter.addcmul_(step, state["size"], value=-rate)


def _size(parameter: Tensor) -> Tensor:
    """Root mean square of `parameter` by input channel, its axis 1; by output channel where each has one input, as in a
    depthwise convolution; of a whole vector or number."""
    axes = list(range(parameter.dim()))
    if parameter.dim() > 1:
        del axes[1 if parameter.shape[1] > 1 else 0]
    size = torch.linalg.vector_norm(parameter, dim=axes, keepdim=True) if axes else parameter.abs()
    size = size / math.sqrt(max(1, parameter.numel() // size.numel()))
    return size if size.any() else torch.ones_like(size)
