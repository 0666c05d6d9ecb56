"""The gradient of a batch that one pass has no memory for: of its parts, one after another, as if they were one.

Terms that are means over samples are means over equal parts of them. What they are divided by, their size in the whole
batch, is known with the last part only: until then the gradients of each word are summed by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from faqd.quantize.quantizers.weight import WeightQuantizer
from faqd.train.loop.batches import Batch
from faqd.train.loop.distributed import ProcessGroup

Losses = dict[str, Tensor]
"""Weighted loss terms by name, whose first word is what they are of."""


def backward(
    parts: Sequence[Batch],
    losses_of: Callable[[Batch], Losses],
    network: nn.Module,
    balanced: Mapping[str, float],
    scale: Callable[[Tensor], Tensor],
    processes: ProcessGroup,
) -> Losses:
    """Leave the gradient of the whole batch in the parameters of `network`, and return its terms in all processes.

    losses_of: the forward pass and the terms. balanced: weights by word; such terms are minimised as shares of what
    they are in all parts and processes together. scale: multiplies a loss by the scale of float16.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    starts = [(each, each.scale.clone()) for each in network.modules() if isinstance(each, WeightQuantizer)]
    values, held = [], dict[str, list[Tensor | None]]()
    for part in parts[:-1]:
        with _alone(network):
            losses = losses_of(part)
        values.append(torch.stack(list(losses.values())).detach())
        words = _by_word(losses, balanced)
        for number, (word, value) in enumerate(words.items(), 1):
            gradients = torch.autograd.grad(
                scale(value), parameters, retain_graph=number < len(words), allow_unused=True
            )
            held[word] = _summed(held.get(word), gradients)
        # A step projects weights once; each part sees the same codes.
        for quantizer, start in starts:
            quantizer.scale.copy_(start)
    losses = losses_of(parts[-1])
    values.append(torch.stack(list(losses.values())).detach())
    mean = values[0] if len(parts) == 1 else torch.stack(values).mean(0)
    sizes = processes.mean(torch.stack(list(_by_word(dict(zip(losses, mean, strict=True)), balanced).values())).clone())
    words = _by_word(losses, balanced)
    divisors = dict(zip(words, sizes.clamp_min(torch.finfo(sizes.dtype).tiny), strict=True))
    for word, summed in held.items():
        factor = balanced[word] / divisors[word] if word in balanced else 1.0
        for parameter, gradient in zip(parameters, summed, strict=True):
            if gradient is not None:
                # In the parameter's layout, which autograd asks of what it adds to.
                share = torch.empty_like(parameter).copy_(gradient).mul_(factor / len(parts))
                parameter.grad = share if parameter.grad is None else parameter.grad.add_(share)
    terms = [balanced[word] * value / divisors[word] if word in balanced else value for word, value in words.items()]
    objective = torch.stack(terms).sum()
    scale(objective if len(parts) == 1 else objective / len(parts)).backward()
    return dict(zip(losses, processes.mean(mean).unbind(), strict=True))


def _by_word(losses: Losses, balanced: Mapping[str, float]) -> Losses:
    """The sums of the terms of each balanced word; what is added as it is has one name."""
    whole: Losses = {}
    for name, value in losses.items():
        word = name.partition(" ")[0]
        word = word if word in balanced else ""
        whole[word] = whole[word] + value if word in whole else value
    return whole


def _summed(before: list[Tensor | None] | None, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    if before is None:
        return list(gradients)
    return [b if a is None else a if b is None else a.add_(b) for a, b in zip(before, gradients, strict=True)]


def _alone(network: nn.Module) -> AbstractContextManager[None]:
    """Without a word to the other processes, which get the gradients with those of the last part."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()
