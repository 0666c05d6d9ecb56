"""Activations: curves on a signed 8-bit grid, exact in float64 in the order that the file states, and ReLU.

Numbers that stand in the file are float32 there, so they are rounded to float32 here. The reference has the same
functions in numpy (faqd/exact_math.py); the steps are the same IEEE operations, so results are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from faqd.quantize.operators.emit import Emission, Value, one
from faqd.quantize.operators.exact_math import erf, exp, log1p, sigmoid, tanh
from faqd.quantize.operators.row import Call, ExactForm, Operator, parameter
from faqd.quantize.operators.treatment import CURVED, Treatment


def float32(number: float) -> float:
    """The number as it stands in the file."""
    return float(np.float32(number))


SIXTH = float32(1 / 6)
ROOT_HALF = float32(0.5**0.5)
GELU_CUBE = float32(0.044715)
GELU_FACTOR = float32((2 / np.pi) ** 0.5)


class Curve(nn.Module):
    """An activation of the user's as the file has it, on float64 values. dimensions: of its input.

    It has the numbers of its formula as attributes, float32 values: of a leaky ReLU the `slope`, of a PReLU a tensor of
    them that meets the channels.
    """

    slope: Any

    def __init__(self, module: Any, dimensions: int = 4) -> None:
        super().__init__()
        row = next(row for row in OPERATORS if row.role == "curve" and isinstance(module, row.kinds))
        assert row.formula is not None
        self.formula: Formula = row.formula(module)
        self.never_negative = row.never_negative
        for name, value in self.formula.numbers(module, dimensions).items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.formula.exact(x, self)


On = Callable[..., Value]
"""Writes an operator of the file: on(ONNX operator, *inputs, **attributes)."""


def _none(module: Any, dimensions: int) -> dict[str, float | Tensor]:
    return {}


@dataclass(frozen=True)
class Formula:
    """What an activation computes, in one order of operations: `exact` of (x, curve) in float64, `file` of (on, x,
    curve, constants) in ONNX. numbers: of (the user's module, dimensions), by name. constants: that stand in the file.
    """

    exact: Callable[[Tensor, Any], Tensor]
    file: Callable[[On, Value, Any, Any], Value]
    numbers: Callable[[Any, int], dict[str, float | Tensor]] = _none
    constants: dict[str, float] = field(default_factory=dict)

    def __call__(self, module: Any) -> Formula:
        """The formula of a module, where it does not depend on how that was set up."""
        return self


def exact_curve(module: Any, dimensions: int) -> nn.Module:
    return Curve(module, dimensions)


def emit_curve(emission: Emission) -> Value:
    """In the order of the formula."""
    curve = emission.module if isinstance(emission.module, Curve) else Curve(emission.module, len(emission.before))
    constants = {name: emission.number(f"number_{name}", value) for name, value in curve.formula.constants.items()}
    return curve.formula.file(emission.op, emission.x, _InFile(emission, curve), constants)


class _InFile:
    """The numbers of a curve as its file has them: a tensor of them is one there."""

    def __init__(self, emission: Emission, curve: Curve) -> None:
        self._emission, self._curve = emission, curve

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._curve, name)
        return self._emission.number(name, value) if isinstance(value, Tensor) else value


def _one(operator: str, **attributes: float) -> Callable[..., Value]:
    """An activation that is one operator of ONNX."""
    return lambda on, x, curve, constants: on(operator, x, **attributes)


def _rectified(x: Tensor, curve: Any) -> Tensor:
    return torch.where(x >= 0, x, x * curve.slope)


def _slope(module: Any, dimensions: int) -> dict[str, float | Tensor]:
    return {"slope": float32(module.negative_slope)}


def _slopes(module: Any, dimensions: int) -> dict[str, float | Tensor]:
    return {"slope": module.weight.detach().float().reshape(-1, *[1] * (dimensions - 2))}


def _hard_sigmoid(x: Tensor) -> Tensor:
    return (x * SIXTH + 0.5).clamp(0, 1)


def _gelu(module: Any) -> Formula:
    return _GELU_TANH if module.approximate == "tanh" else _GELU


def _half_of(on: On, x: Value, inner: Value, constants: Any) -> Value:
    return on("Mul", on("Mul", x, on("Add", inner, constants["one"])), constants["half"])


def _gelu_file(on: On, x: Value, curve: Any, constants: Any) -> Value:
    return _half_of(on, x, on("Erf", on("Mul", x, constants["root_half"])), constants)


def _gelu_tanh_file(on: On, x: Value, curve: Any, constants: Any) -> Value:
    cube = on("Mul", on("Mul", on("Mul", x, x), x), constants["cube"])
    return _half_of(on, x, on("Tanh", on("Mul", on("Add", cube, x), constants["factor"])), constants)


_GELU = Formula(
    lambda x, curve: x * (erf(x * ROOT_HALF) + 1.0) * 0.5,
    _gelu_file,
    constants={"root_half": ROOT_HALF, "one": 1.0, "half": 0.5},
)
_GELU_TANH = Formula(
    lambda x, curve: x * (tanh((x * x * x * GELU_CUBE + x) * GELU_FACTOR) + 1.0) * 0.5,
    _gelu_tanh_file,
    constants={"cube": GELU_CUBE, "factor": GELU_FACTOR, "one": 1.0, "half": 0.5},
)


def _elu(call: Call) -> nn.Module | None:
    return nn.ELU(float(call["alpha"])) if call["scale"] == 1 == call["input_scale"] else None


def _softplus(call: Call) -> nn.Module | None:
    """Beyond its threshold torch gives x itself: from 20 on that is the same in float32."""
    return nn.Softplus() if call["beta"] == 1 and call["threshold"] >= 20 else None


def _prelu(call: Call) -> Any:
    weight = call.tensor(call["weight"])
    if weight is None:
        return None
    module = nn.PReLU(weight.numel())
    module.weight = parameter(weight)
    return call.layer(module, [call["weight"]])


OPERATORS = (
    Operator(
        "rectify",
        (nn.ReLU, torch.relu_),
        {"relu": lambda call: nn.ReLU()},
        emit=one("Relu"),
        stands_for="ReLU, `clamp(min=0)`",
        treatment=Treatment("unsigned, the chosen bits", "in the layer's kernel", "no operator is left of it"),
    ),
    Operator(
        "curve",
        (nn.LeakyReLU,),
        {"leaky_relu": lambda call: nn.LeakyReLU(float(call["negative_slope"]))},
        formula=Formula(_rectified, lambda on, x, curve, _: on("LeakyRelu", x, alpha=curve.slope), _slope),
        stands_for="LeakyReLU",
        treatment=CURVED,
    ),
    Operator(
        "curve",
        (nn.PReLU,),
        {"prelu": _prelu},
        formula=Formula(_rectified, lambda on, x, curve, _: on("PRelu", x, curve.slope), _slopes),
        stands_for="PReLU",
        treatment=CURVED,
    ),
    Operator(
        "curve",
        (nn.ELU,),
        {"elu": _elu},
        formula=Formula(
            lambda x, curve: torch.where(x >= 0, x, (exp(x) - 1.0) * curve.alpha),
            lambda on, x, curve, _: on("Elu", x, alpha=curve.alpha),
            lambda module, _: {"alpha": float32(module.alpha)},
        ),
        stands_for="ELU",
        treatment=CURVED,
    ),
    Operator(
        "curve",
        (nn.SiLU,),
        {"silu": lambda call: nn.SiLU()},
        formula=Formula(lambda x, _: x * sigmoid(x), lambda on, x, *_: on("Mul", x, on("Sigmoid", x))),
        stands_for="SiLU, `x * sigmoid(x)`",
        treatment=CURVED,
    ),
    Operator(
        "curve",
        (nn.Hardswish,),
        {"hardswish": lambda call: nn.Hardswish()},
        formula=Formula(lambda x, _: x * _hard_sigmoid(x), _one("HardSwish")),
        stands_for="Hardswish, `x * relu6(x + 3) / 6`",
        treatment=CURVED,
    ),
    Operator(
        "curve",
        (nn.Sigmoid,),
        dict.fromkeys(("sigmoid", "special_expit"), lambda call: nn.Sigmoid()),
        never_negative=True,
        formula=Formula(lambda x, _: sigmoid(x), _one("Sigmoid")),
        stands_for="Sigmoid",
        treatment=CURVED,
    ),
    Operator(
        "curve",
        (nn.Hardsigmoid,),
        {"hardsigmoid": lambda call: nn.Hardsigmoid()},
        never_negative=True,
        formula=Formula(lambda x, _: _hard_sigmoid(x), _one("HardSigmoid", alpha=SIXTH, beta=0.5)),
        stands_for="Hardsigmoid",
        treatment=CURVED,
    ),
    Operator(
        "curve",
        (nn.Softplus,),
        {"softplus": _softplus},
        never_negative=True,
        formula=Formula(lambda x, _: x.clamp_min(0) + log1p(exp(-x.abs())), _one("Softplus")),
        stands_for="Softplus",
        treatment=CURVED,
    ),
    Operator(
        "curve",
        (nn.GELU,),
        {"gelu": lambda call: nn.GELU(call["approximate"])},
        formula=_gelu,
        stands_for="GELU, exact or by tanh",
        treatment=CURVED,
    ),
    Operator(
        "curve",
        (nn.Tanh,),
        {"tanh": lambda call: nn.Tanh()},
        formula=Formula(lambda x, _: tanh(x), _one("Tanh")),
        stands_for="Tanh",
        treatment=CURVED,
    ),
)
EXACT_FORMS = (ExactForm(Curve, emit_curve, lambda curve: dict(curve.named_buffers())),)
CURVES: tuple[type[nn.Module], ...] = tuple(row.kinds[0] for row in OPERATORS if row.role == "curve")
"""Activations whose result has a signed 8-bit grid."""
