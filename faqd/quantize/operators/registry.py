"""All rows of operators, joined: what the quantizer knows, by what it meets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from faqd.quantize.operators import (
    activation,
    arithmetic,
    attention,
    clamp,
    float_math,
    layer,
    layer_norm,
    norm,
    pad,
    pool,
    requantize,
    resize,
    separable,
    shape,
    slice,
)
from faqd.quantize.operators.emit import Emit
from faqd.quantize.operators.row import ExactForm, Operator, Rule

OPERATORS: tuple[Operator, ...] = (
    *layer.OPERATORS,
    *norm.OPERATORS,
    *activation.OPERATORS,
    *clamp.OPERATORS,
    *arithmetic.OPERATORS,
    *pool.OPERATORS,
    *resize.OPERATORS,
    *shape.OPERATORS,
    *slice.OPERATORS,
    *pad.OPERATORS,
    *attention.OPERATORS,
    *layer_norm.OPERATORS,
    *separable.OPERATORS,
    *float_math.OPERATORS,
)
EXACT_FORMS: tuple[ExactForm, ...] = (
    *layer.EXACT_FORMS,
    *norm.EXACT_FORMS,
    *activation.EXACT_FORMS,
    *arithmetic.EXACT_FORMS,
    *pool.EXACT_FORMS,
    *resize.EXACT_FORMS,
    *attention.EXACT_FORMS,
    *requantize.EXACT_FORMS,
)
RULES: dict[str, Rule] = {name: rule for row in OPERATORS for name, rule in row.spellings.items()} | shape.HELPERS
"""The base name of an operator of torch's -> what it is in the quantizer's terms."""
_MODULES = tuple((kind, row) for row in OPERATORS for kind in row.kinds if isinstance(kind, type))
_FUNCTIONS = {kind: row for row in OPERATORS for kind in row.kinds if not isinstance(kind, type)}
NEVER_NEGATIVE: tuple[type, ...] = tuple(kind for row in OPERATORS if row.never_negative for kind in row.kinds)


def of_module(module: Any) -> Operator | None:
    """The row of a module, or of the kind that it is made of; None for one that no row knows."""
    return next((row for kind, row in _MODULES if isinstance(module, kind)), None)


def of_function(function: Any) -> Operator | None:
    return _FUNCTIONS.get(function)


def exact_form_of(module: Any) -> Callable[..., Any] | None:
    """What makes of a student's module what it is in a converted network; None where it stays."""
    row = of_module(module)
    return None if row is None else activation.exact_curve if row.formula is not None else row.exact


def numbers_of(module: Any) -> dict[str, Tensor]:
    """The numbers of a module of a converted network that its file has to state, by name."""
    form = _exact_form(module)
    return {} if form is None else form.numbers(module)


def is_exact(module: Any) -> bool:
    """Whether a module is one of a converted network with an arithmetic of its own, and no float operator."""
    return _exact_form(module) is not None


def _exact_form(module: Any) -> ExactForm | None:
    return next((form for form in EXACT_FORMS if isinstance(module, form.kind)), None)


def emission_of(module: Any, function: Any) -> Emit | None:
    """What writes a call of a module, or of a function, into an ONNX file; None for an operator that no row knows."""
    if (form := _exact_form(module)) is not None:
        return form.emit
    row = of_function(function) if module is None else of_module(module)
    return None if row is None else activation.emit_curve if row.formula is not None else row.emit
