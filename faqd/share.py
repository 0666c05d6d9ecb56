"""A share of images, and how far chance may have moved it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

Z95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Share:
    """`count` of `n` images, with Wilson's score interval (Wilson 1927), which holds near 0 and 1 too."""

    count: int
    n: int

    @property
    def value(self) -> float:
        return self.count / self.n

    @property
    def interval(self) -> tuple[float, float]:
        p, n, z2 = self.value, self.n, Z95**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        reach = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        low = 0.0 if self.count == 0 else max(0.0, centre - reach)
        high = 1.0 if self.count == n else min(1.0, centre + reach)
        return low, high

    def to_json(self) -> dict[str, Any]:
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high, "count": self.count, "n": self.n}
