"""The demo ends well only if 4 bits without training lose to 4 bits with it."""

from __future__ import annotations

from typing import Any

import pytest

from faqd.demo import _control
from faqd.errors import UserError


def result(ptq: float, distilled: float) -> dict[str, Any]:
    kinds = {"ptq": ptq, "distilled": distilled}
    students = [
        {"role": "student", "kind": kind, "weight_bits": 4, "accuracy": {"kl_to_teacher_nats": value}}
        for kind, value in kinds.items()
    ]
    return {"networks": [*students, {"role": "float", "kind": "float", "weight_bits": 4, "accuracy": None}]}


def test_a_control_that_loses_is_said() -> None:
    assert "0.0200 nats" in _control(result(0.02, 0.005))


def test_a_control_that_wins_fails_the_demo() -> None:
    with pytest.raises(UserError, match="as close to the teacher"):
        _control(result(0.005, 0.02))
