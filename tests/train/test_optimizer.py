"""Steps are shares of what is learned, whatever its size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from faqd.train.loop.optimizer import RelativeAdam


def moved(weight: Tensor, gradients: list[Tensor], lr: float = 0.01) -> Tensor:
    parameter = nn.Parameter(weight.clone())
    optimizer = RelativeAdam([parameter], lr)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return (parameter - weight).detach()


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((4, 3, 3, 3), (1, 3, 1, 1)),
        ((4, 3), (1, 3)),
        ((6, 1, 3, 3), (6, 1, 1, 1)),
        ((5,), (1,)),
        ((), ()),
    ],
)
def test_a_first_step_is_the_rate_times_the_size_of_an_input_channel(
    shape: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-3, 3, max(1, torch.Size(sizes).numel())).reshape(sizes)
    axes = [axis for axis, size in enumerate(sizes) if size == 1] if shape else []
    size = weight.square().mean(axes, keepdim=True).sqrt() if axes else weight.abs()
    step = moved(weight, [torch.randn(shape)])
    torch.testing.assert_close(step.abs() / size, torch.full(shape, 0.01), rtol=1e-3, atol=0)


def test_a_network_rescaled_between_two_layers_learns_the_same() -> None:
    torch.manual_seed(0)
    factor = torch.tensor([0.01, 1.0, 64.0])
    weight, gradients = torch.randn(4, 3), [torch.randn(4, 3) for _ in range(5)]
    plain = moved(weight, gradients)
    rescaled = moved(weight * factor, [gradient / factor for gradient in gradients])
    torch.testing.assert_close(rescaled, plain * factor, rtol=1e-4, atol=0)


def test_zeros_learn_where_a_whole_tensor_is_zero() -> None:
    assert moved(torch.zeros(3), [torch.ones(3)]).tolist() == pytest.approx([-0.01] * 3, rel=1e-4)
    dead = torch.ones(2, 2)
    dead[:, 1] = 0
    assert moved(dead, [torch.ones(2, 2)])[:, 1].tolist() == [0, 0]
    assert moved(torch.ones(2), [torch.zeros(2)]).tolist() == [0, 0]
