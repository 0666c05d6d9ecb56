"""All operators whose arithmetic is stated here, by ONNX's names."""

from __future__ import annotations

from faqd.deploy.reference import (
    activation,
    arithmetic,
    layer,
    norm,
    pad,
    pool,
    requantize,
    resize,
    shape,
    slice,
)
from faqd.deploy.reference.values import Operator

OPERATORS: dict[str, Operator] = {
    **requantize.OPERATORS,
    **layer.OPERATORS,
    **norm.OPERATORS,
    **activation.OPERATORS,
    **arithmetic.OPERATORS,
    **pool.OPERATORS,
    **resize.OPERATORS,
    **shape.OPERATORS,
    **slice.OPERATORS,
    **pad.OPERATORS,
}
