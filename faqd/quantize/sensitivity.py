"""Which roundings cost most, by what the outputs lose, and what has to stay float for them to go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, fx

from faqd.calib.ranges import Method
from faqd.fidelity import KEPT, kept_at
from faqd.quantize import nodes
from faqd.quantize.calibrate import calibrate, float_forward
from faqd.quantize.int8_share import int8_share
from faqd.quantize.output_distance import OutputDistance
from faqd.quantize.prepare import insert_quantizers
from faqd.quantize.quantizers.activation import ActivationQuantizer
from faqd.quantize.quantizers.layers import weight_quantizer
from faqd.quantize.student import Student

MOST_EXCLUDED = 0.5
"""Of all roundings: where half of a network has to stay float, INT8 is not its number type."""


@dataclass(frozen=True)
class Part:
    """One rounding of a student. place: of the tensor that is rounded, or of the layer whose weights are. distance: of
    the worst output with nothing else rounded (`faqd.fidelity`). readers: the places that, kept float, leave it out."""

    place: str
    kind: Literal["activations", "weights"]
    distance: float
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """What the student is with some places float. exclude: the regular expression for them; empty for none."""

    exclude: str
    floats: int
    int8_share: float
    fidelity: float


class Sensitivity:
    """Questions about one calibrated student.

    images: (N, C, H, W) network input that nothing was chosen on. calibration: the batches that scales are chosen on.
    """

    def __init__(self, student: Student, images: Tensor, calibration: Sequence[Tensor], method: Method) -> None:
        self.student = student
        self._calibration, self._method = calibration, method
        student.network.eval()
        self._distance = OutputDistance(student.float_network, images)

    def parts(self, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Part]:
        """Every rounding alone, the most expensive first."""
        network = self.student.network
        rounded = self.student.quantizers()
        layers = _layers(network)
        total = len(rounded) + len(layers)
        found = []
        with float_forward(self.student):
            network.eval()
            for place, quantizer in rounded.items():
                found.append(Part(place, "activations", self._alone(quantizer), self._readers(quantizer)))
                progress(len(found), total)
            for node, quantizer in layers.items():
                found.append(Part(str(node.target), "weights", self._alone(quantizer), (str(node.target),)))
                progress(len(found), total)
        return sorted(found, key=lambda part: -part.distance)

    def trials(self, parts: Sequence[Part]) -> Iterator[Trial]:
        """The student as it is, then with ever more of `parts` left out until its outputs are kept: twice as many each
        time, then halved. Of those that are kept, the one with the fewest places float is near the least there is."""
        tried: dict[tuple[str, ...], Trial] = {}

        def trial(count: int) -> Iterator[Trial]:
            """Nothing where the same places were float before."""
            if (places := _places(parts[:count])) not in tried:
                tried[places] = self._trial(places)
                yield tried[places]

        def is_kept(count: int) -> bool:
            return tried[_places(parts[:count])].fidelity >= KEPT

        low, high = 0, 0
        most = math.ceil(MOST_EXCLUDED * len(parts))
        while high <= most:
            yield from trial(high)
            if is_kept(high):
                break
            low, high = high, max(1, 2 * high)
        else:
            return
        while high - low > 1:
            middle = (low + high) // 2
            yield from trial(middle)
            low, high = (low, middle) if is_kept(middle) else (middle, high)

    def _trial(self, places: tuple[str, ...]) -> Trial:
        config = self.student.config
        exclude = _expression(places)
        patterns = (*config.exclude, exclude) if exclude else config.exclude
        student = insert_quantizers(
            self.student.float_network, replace(config, exclude=patterns), nodes.two_of(self._distance.images)
        )
        student.network.eval()
        calibrate(student, self._calibration, self._method)
        return Trial(exclude, len(places), int8_share(student), kept_at(self._distance.of(student.network)))

    def _alone(self, quantizer: Any) -> float:
        with _enabled(quantizer):
            return self._distance.of(self.student.network)

    def _readers(self, quantizer: ActivationQuantizer) -> tuple[str, ...]:
        """The operators on whose account a tensor is rounded, behind those that move codes."""
        network, floats = self.student.network, self.student.float_network
        (node,) = (node for node in network.graph.nodes if nodes.module_of(network, node) is quantizer)
        names = {one.name: place for one, place in nodes.places(floats).items()}
        walk = nodes.reached(node.users, lambda n: n.users if _passes(network, n) else ())
        found = [reader for reader in walk if reader.op.startswith("call") and not _passes(network, reader)]
        order = {each: index for index, each in enumerate(network.graph.nodes)}
        return tuple(names[reader.name] for reader in sorted(found, key=order.__getitem__) if reader.name in names)


def _passes(network: fx.GraphModule, node: fx.Node) -> bool:
    return nodes.role(network, node) in nodes.MOVES


def _layers(network: fx.GraphModule) -> dict[fx.Node, Any]:
    """The layers that have a grid for their weights, each with it."""
    layers = [node for node in network.graph.nodes if nodes.role(network, node) == "compute"]
    found = {}
    for node in layers:
        module = nodes.module_of(network, node)
        quantizer = weight_quantizer(module) if module is not None else None
        if quantizer is not None:
            found[node] = quantizer
    return found


@contextmanager
def _enabled(quantizer: Any) -> Iterator[None]:
    quantizer.enabled = True
    try:
        yield
    finally:
        quantizer.enabled = False


def _places(parts: Sequence[Part]) -> tuple[str, ...]:
    """What has to be float for all of them to go."""
    return tuple(dict.fromkeys(place for part in parts for place in part.readers))


def _expression(places: Sequence[str]) -> str:
    """A regular expression for these places alone."""
    escaped = [place.replace(".", r"\.") for place in places]
    return rf"^({'|'.join(escaped)})$" if len(escaped) > 1 else "".join(f"^{place}$" for place in escaped)
