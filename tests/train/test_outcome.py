"""The last sentence of a distillation."""

from __future__ import annotations

from typing import Any

import pytest

from faqd.train.run.outcome import outcome

PTQ = "; `faqd-deploy ptq`, which takes a minute, does as well."


def record(iteration: int, untrained: float | None, measure: float | None, **recipe: Any) -> dict[str, Any]:
    kept = {"iteration": iteration, "untrained": untrained, "measure": measure, "last": measure}
    return {"recipe": {"select": None, "label_weight": 0.0, **recipe}, "kept": kept}


@pytest.mark.parametrize(
    ("run", "wanted"),
    [
        (
            record(150, 0.38, 0.0164),
            "training helped: on the validation split fidelity 0.620 before, 0.984 after (of its teacher: kept).",
        ),
        (
            record(25, 0.0018, 0.0017),
            "training hardly helped: on the validation split fidelity 0.9982 before, 0.9983 after "
            "(of its teacher: kept)" + PTQ,
        ),
        (
            record(102, 0.00028, 0.00023),
            "training hardly helped: on the validation split fidelity 0.99972 before, 0.99977 after "
            "(of its teacher: kept)" + PTQ,
        ),
        (
            record(0, 0.2, 0.2),
            "training did not help, and the untrained student is kept: on the validation split fidelity 0.800 (of its "
            "teacher: lost something)" + PTQ,
        ),
        (
            record(0, 11.4, 11.4),
            "training did not help, and the untrained student is kept: on the validation split fidelity 0.000 (of its "
            "teacher: ruined)" + PTQ,
        ),
        (
            record(8, -0.70, -0.81, select="m.py:top1"),
            "training helped: m.py:top1 gives 0.7 untrained and 0.81 for what is kept.",
        ),
        (record(8, 1.5, 0.7, label_weight=1.0), "training helped: a loss of 1.5 untrained and 0.7 for what is kept."),
        (record(3, None, 0.1), None),
        ({"recipe": {}}, None),
    ],
)
def test_a_sentence_says_what_training_was_good_for(run: dict[str, Any], wanted: str | None) -> None:
    assert outcome(run) == wanted
