"""exp, log(1 + y), the logistic function, tanh and erf in float64 from additions, products and roundings alone.

Libraries differ in the last bit of these functions, and one bit can move a code. Built from IEEE operations in a stated
order they are the same bits on every machine: here in numpy, for the reference, and in torch in
faqd/quantize/operators/activation.py.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LOG2_E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10
"""ln 2 in two parts; the first has zeros at its end, so that its product with a small integer is exact."""
EXP_TERMS = tuple(1.0 / math.factorial(n) for n in range(12, -1, -1))
"""Coefficients of exp on half of ln 2 around zero, highest power first; the rest is below 1e-15."""
EXP_REACH = 700.0
"""exp is taken of -700..700: beyond, no float32 result changes."""
LOG_TERMS = tuple(1.0 / (2 * n + 1) for n in range(16, -1, -1))
"""Coefficients of atanh(z) / z in z^2 for z up to 1/3, highest power first; the rest is below 1e-17."""
# Chebyshev coefficients of log(erfc(z) / t) + z^2 in 2 t - 1, t = 2 / (2 + z): computed with 40 digits, cut where the
# rest is below 2e-16.
ERFC_TERMS = (
    -1.3026537197817094,
    0.6419697923564902,
    0.019476473204185836,
    -0.009561514786808632,
    -0.0009465953444820369,
    0.00036683949785276145,
    4.252332480690777e-05,
    -2.0278578112534242e-05,
    -1.6242900046470256e-06,
    1.3036558355805232e-06,
    1.5626441722066142e-08,
    -8.523809591492654e-08,
    6.5290544390988515e-09,
    5.059343495551469e-09,
    -9.91364156493033e-10,
    -2.273651222931836e-10,
    9.646791102015527e-11,
    2.3940380830391146e-12,
    -6.886027526497553e-12,
    8.944879273090725e-13,
    3.130921399342958e-13,
    -1.1270822361367252e-13,
    3.810905255189232e-16,
    7.106097613609237e-15,
    -1.5230282014571043e-15,
    -9.457494571291233e-17,
)


def exp(x: Array) -> Array:
    """e^x: 2^k times a polynomial, k the nearest integer to x / ln 2."""
    x = np.clip(x, -EXP_REACH, EXP_REACH)
    k = np.rint(x * LOG2_E)
    rest = (x - k * LN2_HIGH) - k * LN2_LOW
    value = np.full_like(rest, EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        value = value * rest + term
    result: Array = np.ldexp(value, k.astype(np.int64))
    return result


def log1p(y: Array) -> Array:
    """log(1 + y) for y from 0 to 1: 2 atanh(y / (2 + y))."""
    z = y / (2.0 + y)
    square = z * z
    value = np.full_like(z, LOG_TERMS[0])
    for term in LOG_TERMS[1:]:
        value = value * square + term
    return 2.0 * z * value


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x)"""
    return 1.0 / (1.0 + exp(-x))


def tanh(x: Array) -> Array:
    """2 / (1 + e^(-2 x)) - 1"""
    return 2.0 / (1.0 + exp(-2.0 * x)) - 1.0


def erf(x: Array) -> Array:
    """sign(x) (1 - erfc|x|), erfc from its Chebyshev series by Clenshaw's recurrence."""
    z = np.abs(x)
    t = 2.0 / (2.0 + z)
    u = 4.0 * t - 2.0
    one, two = np.zeros_like(t), np.zeros_like(t)
    for term in ERFC_TERMS[:0:-1]:
        one, two = u * one - two + term, one
    series = 0.5 * (u * one + ERFC_TERMS[0]) - two
    complement = t * exp(series - z * z)
    result: Array = np.sign(x) * (1.0 - complement)
    return result
