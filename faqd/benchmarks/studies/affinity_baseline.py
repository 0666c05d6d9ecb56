"""The feature-affinity loss in its direct form: the baseline of `affinity`. Frozen: every ratio there is against it."""

from __future__ import annotations

from torch import Tensor


def direct_affinity(student: Tensor, teacher: Tensor, form: str) -> Tensor:
    """The straightforward loss: both (N, N) similarities, their difference, autograd. Frozen: the baseline.

    Equal to affinity_loss but for rounding; maps (B, C, H, W) of one size.
    """
    similarities: list[Tensor] = []
    for features in (student.flatten(2), teacher.flatten(2)):
        unit = features / (features.norm(dim=1, keepdim=True) + 1e-5)
        similarities.append(unit.transpose(1, 2) @ unit)
    difference: Tensor = similarities[0] - similarities[1]
    pixels = difference.shape[1]
    if form == "l1":
        values = difference.abs().sum((1, 2)) / pixels**2
    elif form == "l2":
        values = difference.square().sum((1, 2)).sqrt() / pixels
    else:
        values = difference.square().sum((1, 2)) / pixels**2
    return values.mean()
