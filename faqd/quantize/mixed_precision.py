"""Mixed precision: the few layers and operators that stay float so that a student without training keeps its outputs.

What is best without training depends on what is float, and what is best float on scales and equalization. So both are
searched together: each place that is kept float is followed by the whole search of `without_training`, and by another
look at which place costs most now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from faqd.quantize.config import QuantConfig
from faqd.quantize.int8_share import int8_share
from faqd.quantize.sensitivity import Places, Sensitivity, Trial, expression
from faqd.quantize.without_training import Untrained

RANKED_IMAGES = 8
"""On which single roundings are compared; whole students are on all that there are."""
SHORTLIST = 8
"""Of the most expensive by themselves, so many are left out of the student as it is by then."""
SECOND_CHOICES = 2
"""Of these, so many are tried until one gains."""


def mixed_precision(
    best_of: Callable[[QuantConfig], Untrained],
    bits: QuantConfig,
    batches: Sequence[Tensor],
    images: Tensor,
    most: int,
    enough: float,
    tried: Callable[[Trial], None] = lambda trial: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Untrained:
    """The student nearest to its teacher on `images` with at most `most` places float beside those that `bits` exclude;
    where a fidelity is `enough`, the one that reaches it with the fewest that were tried.

    best_of: the search of `without_training`. batches: its network input for scales. images: (N, C, H, W) network input
    that no scale is chosen on. progress: of the ranking of all roundings, done and in all.
    """

    def made(floats: Places) -> Untrained:
        config = replace(bits, exclude=(*bits.exclude, expression(floats))) if floats else bits
        untrained = best_of(config)
        tried(Trial(expression(floats), len(floats), int8_share(untrained.student), untrained.fidelity))
        return untrained

    best, floats = made(()), Places()
    ranked: list[Places] = []
    ranked_for = None
    while best.fidelity < enough:
        asked = Sensitivity(best.student, images[:RANKED_IMAGES], batches, best.method)
        if ranked_for != (passes := (best.method, best.equalized is None)):
            ranked, ranked_for = _ranked(asked, progress), passes
        unions = list(dict.fromkeys(tuple(dict.fromkeys((*floats, *places))) for places in ranked))
        fitting = [union for union in unions if len(floats) < len(union) <= most][:SHORTLIST]
        for union in sorted(fitting, key=asked.without)[:SECOND_CHOICES]:
            one = made(union)
            if one.distance < best.distance:
                best, floats = one, union
                break
        else:
            return best
    for place in floats[:-1]:  # the last one was needed by those before it
        fewer = tuple(each for each in floats if each != place)
        one = made(fewer)
        if one.fidelity >= enough:
            best, floats = one, fewer
    return best


def _ranked(asked: Sensitivity, progress: Callable[[int, int], None]) -> list[Places]:
    """What has to be float together for a rounding to go, by what all that go with it cost alone."""
    cost: dict[Places, float] = {}
    for part in asked.parts(progress):
        cost[part.readers] = cost.get(part.readers, 0.0) + part.distance
    return sorted(filter(None, cost), key=lambda places: -cost[places])
