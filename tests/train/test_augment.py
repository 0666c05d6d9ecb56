"""The batch augmentation against a plain loop over the samples."""

import pytest
import torch
from torch import Tensor

from faqd.train.data.augment import augment
from faqd.train.data.datasets import Augmentation


def images(count: int = 64, dtype: torch.dtype = torch.uint8) -> Tensor:
    # From 1, so that a 0 can only come from the frame.
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 256, (count, 3, 6, 5), generator=generator).to(dtype)


def reference(image: Tensor, pad: int, top: int, left: int, mirrored: bool) -> Tensor:
    """One sample: framed, cropped at (top, left), mirrored."""
    channels, height, width = image.shape
    framed = torch.zeros((channels, height + 2 * pad, width + 2 * pad), dtype=image.dtype)
    framed[:, pad : pad + height, pad : pad + width] = image
    cropped = framed[:, top : top + height, left : left + width]
    return cropped.flip(2) if mirrored else cropped


@pytest.mark.parametrize("pad", [0, 1, 3])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_equals_a_loop_over_samples(pad: int, flip: bool, dtype: torch.dtype) -> None:
    batch = images(dtype=dtype)
    out = augment(batch, Augmentation(pad, flip), torch.Generator().manual_seed(3))
    assert out.dtype == dtype and out.shape == batch.shape

    generator = torch.Generator().manual_seed(3)
    mirrored = torch.randint(2, (64, 1), generator=generator) if flip else torch.zeros(64, 1)
    offsets = torch.randint(2 * pad + 1, (2, 64, 1), generator=generator) if pad else torch.zeros(2, 64, 1)
    for i in range(64):
        top, left = int(offsets[0, i]), int(offsets[1, i])
        turn = bool(mirrored[i])
        assert torch.equal(out[i], reference(batch[i], pad, top, left, turn)), (i, top, left, turn)


def test_every_shift_and_both_directions_occur() -> None:
    batch = images(count=1).expand(600, -1, -1, -1)
    out = augment(batch, Augmentation(1, True), torch.Generator().manual_seed(0))
    possible = [
        reference(batch[0], 1, top, left, turn) for top in range(3) for left in range(3) for turn in (False, True)
    ]
    counts = [int((out == candidate).flatten(1).all(1).sum()) for candidate in possible]
    assert sum(counts) == 600
    assert min(counts) > 10


def test_the_same_generator_state_gives_the_same_batch() -> None:
    how = Augmentation(2, True)
    first = augment(images(), how, torch.Generator().manual_seed(5))
    assert torch.equal(first, augment(images(), how, torch.Generator().manual_seed(5)))
    assert not torch.equal(first, augment(images(), how, torch.Generator().manual_seed(6)))


def test_no_augmentation_changes_nothing_and_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert torch.equal(augment(images(), Augmentation(), generator), images())
    assert torch.equal(generator.get_state(), before)


def test_the_input_is_left_as_it_was() -> None:
    batch = images()
    augment(batch, Augmentation(2, True), torch.Generator().manual_seed(0))
    assert torch.equal(batch, images())
