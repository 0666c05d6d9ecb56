"""The functions of faqd/exact_math.py on torch's tensors: the same IEEE operations in the same order, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from faqd.exact_math import ERFC_TERMS, EXP_REACH, EXP_TERMS, LN2_HIGH, LN2_LOW, LOG2_E, LOG_TERMS


def sigmoid(x: Tensor) -> Tensor:
    return 1.0 / (1.0 + exp(-x))


def tanh(x: Tensor) -> Tensor:
    return 2.0 / (1.0 + exp(-2.0 * x)) - 1.0


def exp(x: Tensor) -> Tensor:
    x = x.clamp(-EXP_REACH, EXP_REACH)
    k = (x * LOG2_E).round()
    rest = (x - k * LN2_HIGH) - k * LN2_LOW
    value = torch.full_like(rest, EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        value.mul_(rest).add_(term)
    # 2^k from its exponent bits: torch.pow need not be exact.
    return value * ((k.long() + 1023) << 52).view(torch.float64)


def log1p(y: Tensor) -> Tensor:
    z = y / (2.0 + y)
    square = z * z
    value = torch.full_like(z, LOG_TERMS[0])
    for term in LOG_TERMS[1:]:
        value = value * square + term
    return 2.0 * z * value


def erf(x: Tensor) -> Tensor:
    z = x.abs()
    t = 2.0 / (2.0 + z)
    u = 4.0 * t - 2.0
    one, two = torch.zeros_like(t), torch.zeros_like(t)
    for term in ERFC_TERMS[:0:-1]:
        one, two = u * one - two + term, one
    series = 0.5 * (u * one + ERFC_TERMS[0]) - two
    complement = t * exp(series - z * z)
    return x.sign() * (1.0 - complement)
