"""Mixed precision: the few layers and operators that stay float so that a student without training keeps its outputs.

Which scales are best depends on what is float, and which place had best be float on the scales. So both are searched
together: for each place that is kept float scales are chosen again, and then there is another look at what costs most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from faqd.quantize.config import QuantConfig
from faqd.quantize.int8_share import int8_share
from faqd.quantize.sensitivity import Places, Sensitivity, Trial, expression
from faqd.quantize.without_training import Equalize, Untrained

SHORTLIST = 8
"""Of those that cost most at first, so many are compared anew at every step."""


def mixed_precision(
    best_of: Callable[[QuantConfig, Equalize], Untrained],
    bits: QuantConfig,
    equalize: Equalize,
    batches: Sequence[Tensor],
    images: Tensor,
    most: int,
    enough: float,
    tried: Callable[[Trial], None] = lambda trial: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Untrained:
    """The student nearest to its teacher on `images` with at most `most` places float beside those that `bits` exclude;
    where a fidelity is `enough`, the one that reaches it with the fewest that were tried.

    best_of: the search of `without_training`; where its first answer is equalized, nothing else is tried on the way.
    batches: network input for scales. images: (N, C, H, W) network input that no scale is chosen on. progress: of the
    ranking, places done and in all.
    """

    def made(floats: Places, equalize: Equalize) -> Untrained:
        config = replace(bits, exclude=(*bits.exclude, expression(floats))) if floats else bits
        untrained = best_of(config, equalize)
        tried(Trial(expression(floats), len(floats), int8_share(untrained.student), untrained.fidelity))
        return untrained

    best = one = made((), equalize)
    equalize = equalize if one.equalized is None else "always"
    floats, ranked = Places(), list[Places]()
    while one.fidelity < enough:
        asked = Sensitivity(one.student, images, batches, one.method)
        ranked = ranked or _ranked(asked, floats, asked.groups(), progress)
        fitting = [group for group in ranked if len(floats) < len({*floats, *group}) <= most]
        if not fitting:
            break
        floats = tuple(dict.fromkeys((*floats, *_ranked(asked, floats, fitting[:SHORTLIST])[0])))
        one = made(floats, equalize)
        best = min(best, one, key=lambda each: each.distance)
    for place in floats[:-1] if one.fidelity >= enough else ():  # the last one was needed by those before it
        fewer = tuple(each for each in floats if each != place)
        another = made(fewer, equalize)
        if another.fidelity >= enough:
            one, floats = another, fewer
    return one if one.fidelity >= enough else best


def _ranked(
    asked: Sensitivity,
    floats: Places,
    groups: Sequence[Places],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Places]:
    """The most expensive first, by what each place costs that is not float yet."""
    costs = {}
    for group in groups:
        costs[group] = asked.cost_of({*floats, *group}) / len({*group} - {*floats})
        progress(len(costs), len(groups))
    return sorted(costs, key=lambda group: -costs[group])
