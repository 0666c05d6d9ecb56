"""Float islands: what torch computed inside them against the reference, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from faqd.deploy.reference.values import Value
from faqd.deploy.verify.segments import Segment, Trace
from faqd.deploy.verify.sketches import BITS, agreeing_bits, sketched
from faqd.reference import real


class Floats:
    """Compares each tensor once, where the reference computes it first. wanted: sketches of torch's, by tensor."""

    def __init__(self, wanted: dict[str, list[float]]) -> None:
        self._wanted, self._bits = wanted, dict[str, float]()

    def compare(self, segment: Segment, values: dict[str, Value], trace: Trace) -> Iterator[str]:
        """What is wrong with those that this segment computes."""
        for node in segment.model.graph.node:
            for name in self._wanted.keys() & set(node.output) - self._bits.keys():
                found = sketched(trace.without_driven(real(values[name])))
                bits = self._bits[name] = agreeing_bits(found, self._wanted[name])
                if bits < BITS:
                    yield (
                        f"{segment.layer}: {name}, a float on the way, is torch's to {bits:.0f} bits only, at least "
                        f"{BITS} are needed"
                    )

    def missing(self) -> list[str]:
        return [f"{name}: the file has no such tensor" for name in self._wanted if name not in self._bits]

    def record(self) -> dict[str, Any]:
        """How many tensors were compared, and the fewest bits, None where there were none."""
        least = min(self._bits, key=self._bits.__getitem__, default=None)
        return {
            "tensors": len(self._bits),
            "least_bits": None if least is None else round(self._bits[least], 1),
            "tensor": least,
        }
