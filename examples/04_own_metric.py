"""A measure of one's own, for training and for the bench: how often the right class is among the first two.

    faqd-train distill ... --select examples/04_own_metric.py:select
    faqd-bench BUNDLE --metric examples/04_own_metric.py:metric

Without labels, as here where there are none, the float network's first class counts as the right one.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Outputs = dict[str, NDArray[Any]]


def metric(outputs: Outputs, found: dict[str, Any]) -> dict[str, float]:
    """For `faqd-bench --metric`: figures by name. outputs: (N, classes) by the name of the output; found: `images`,
    `teacher` (its outputs), `preprocess`, and `labels` where there are any."""
    (name,) = outputs
    right = found.get("labels", found["teacher"][name].argmax(1))
    first_two = np.argsort(-outputs[name], 1, kind="stable")[:, :2]
    return {"among the first two": float((first_two == right[:, None]).any(1).mean())}


def select(outputs: Outputs, found: dict[str, Any]) -> float:
    """For `faqd-train distill --select`: one number, the larger the better, on images that are not trained on."""
    return metric(outputs, found)["among the first two"]
