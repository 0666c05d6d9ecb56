"""Options of `distill` that would do nothing beside others: refused before data are read."""

from __future__ import annotations

from collections.abc import Sequence

from faqd.given import options_given, refuse_idle
from faqd.quant import FLOAT_BITS
from faqd.train.recipes import DistillRecipe, has_a_choice_of_starts


def refuse_idle_options(variants: Sequence[DistillRecipe]) -> None:
    """variants: what was asked for, one for each pair of bits; they differ in nothing else."""
    recipe = variants[0]
    if recipe.logit != "kl":
        refuse_idle(["--temperature"], "only the outputs of --logit kl are softened")
    if not recipe.logit_weight:
        refuse_idle(["--logit", "--temperature"], "the outputs do not count with --logit-weight 0")
    if recipe.affinity == "none":
        refuse_idle(["--affinity-weight", "--affinity-floor"], "no affinity is compared with --affinity none")
    if recipe.affinity != "fast":
        refuse_idle(["--columns"], "only --affinity fast has projections")
    if "--steps" in options_given():
        refuse_idle(["--epochs"], "--steps says how long the training is")
    if all(each.act_bits == FLOAT_BITS for each in variants):
        refuse_idle(
            ["--rounding", "--scale-gradient", "--calibration", "--equalize", "--asymmetric", "--attention"],
            f"no activation is rounded with --act-bits {FLOAT_BITS}",
        )
    if recipe.equalize == "always" and not any(map(has_a_choice_of_starts, variants)):
        refuse_idle(["--equalize"], "only students of 4/4 bits and more that start from trained weights are equalized")
