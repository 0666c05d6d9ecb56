"""What the reference computes with: values of tensors, and operators on them.

A value is a float64 array, an integer array, or a Grid. An operator takes (operands, attributes), None for an operand
that is left out, and gives a value; a tuple of them where it has several outputs. ValueError says what it does not
know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from faqd.reference import Array, Grid, real

Value = Any
Attributes = dict[str, Any]
Operator = Callable[[list[Value], Attributes], Value]


def on_one_scale(x: Value) -> tuple[Array, Array]:
    """Codes and their scale where they have one for all, else the real values and 1."""
    return (x.codes, x.scale) if isinstance(x, Grid) and x.scale.ndim == 0 else (real(x), np.ones(()))
