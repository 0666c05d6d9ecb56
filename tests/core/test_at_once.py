"""Whole networks take fewer images at once the larger these are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from faqd.at_once import images_at_once
from faqd.quantize.outputs import run_batches


@pytest.mark.parametrize(("size", "most", "wanted"), [((8, 8), 250, 250), ((416, 416), 64, 6), ((4096, 4096), 64, 1)])
def test_at_most_so_many_pixels_and_at_least_one_image(size: tuple[int, int], most: int, wanted: int) -> None:
    assert images_at_once(size, most) == wanted


def test_a_network_that_is_run_for_many_images_sees_a_few_at_once() -> None:
    seen: list[int] = []

    def network(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x.mean((2, 3))

    inputs = torch.rand(7, 1, 600, 600)
    assert torch.equal(run_batches(network, inputs, 64)["logits"], inputs.mean((2, 3))) and seen == [2, 2, 2, 1]
