"""What the demo says in the end: that 4 bits without training lose, by which measure, and what INT8 gains here."""

from __future__ import annotations

import shlex
from typing import Any

import click
import pytest

from faqd.demo import STEPS, TOOLS, _control, _speed
from faqd.errors import UserError


def result(ptq: float, distilled: float, faster: float = 2.0, sets: tuple[str, ...] = ()) -> dict[str, Any]:
    kinds = {"ptq": (ptq, 0.994), "distilled": (distilled, 0.992)}
    ratio = {"batch": 1, "over": "own_float", "paired_median": faster}
    students = [
        {
            "role": "student",
            "kind": kind,
            "name": "net 4/4",
            "weight_bits": 4,
            "accuracy": {"kl_to_teacher_nats": distance, "top1": {"value": right, "n": 500}},
            "speed_up": [ratio],
        }
        for kind, (distance, right) in kinds.items()
    ]
    return {
        "networks": [*students, {"role": "float", "kind": "float", "weight_bits": 4, "accuracy": None}],
        "switches": {"batch": [1, 32]},
        "environment": {"instruction_sets": list(sets)},
    }


def test_a_control_that_loses_is_said_with_the_measure_by_which_it_does() -> None:
    said = _control(result(0.02, 0.005))
    assert "(KL divergence)" in said and "0.0200 nats away, the distilled student 0.0050" in said
    assert "get 99.4 and 99.2 % right" in said, "where the table shows the contrary in another measure"


def test_a_control_that_wins_fails_the_demo() -> None:
    with pytest.raises(UserError, match="as close to the teacher"):
        _control(result(0.005, 0.02))


@pytest.mark.parametrize(
    ("faster", "sets", "said"),
    [
        (2.0, ("avx2", "avx512-vnni"), "2.00 times as fast as in float at batch 1 on this CPU, which multiplies"),
        (1.1, ("asimd", "dotprod"), "1.10 times as fast"),
        (0.9, ("avx2",), "0.90 times as fast as in float at batch 1 on this CPU. It has no instruction"),
        (1.6, (), "with one INT8 gains more"),
    ],
)
def test_what_int8_gains_is_said_of_this_cpu(faster: float, sets: tuple[str, ...], said: str) -> None:
    told = _speed(result(0.02, 0.005, faster, sets))
    assert said in told and ("VNNI on x86" in told) == ("vnni" not in " ".join(sets) and "dotprod" not in sets)


def test_every_step_is_a_command_that_exists() -> None:
    for _, line in STEPS:
        name, *arguments = shlex.split(line.format(out="demo"))
        command = TOOLS[name]
        if isinstance(command, click.Group):
            command = command.commands[arguments.pop(0)]
        context = command.make_context(name, arguments)
        context.close()
