"""Which roundings cost most, by what the outputs lose, and what has to stay float for them to go."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx

from faqd.calib.ranges import Method
from faqd.fidelity import KEPT, kept_at
from faqd.quantize import nodes
from faqd.quantize.calibrate import calibrate, float_forward
from faqd.quantize.int8_share import int8_share, int8_shares
from faqd.quantize.output_distance import OutputDistance
from faqd.quantize.prepare import insert_quantizers
from faqd.quantize.quantizers.activation import ActivationQuantizer
from faqd.quantize.quantizers.layers import weight_quantizer
from faqd.quantize.student import Student

MOST_EXCLUDED = 0.5
"""Of all roundings: where half of a network has to stay float, INT8 is not its number type."""

Kind = Literal["activations", "weights"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Places = tuple[str, ...]


@dataclass(frozen=True)
class Channels:
    """The channels of a tensor that share a scale, by the largest magnitude of each on the images that are looked at.
    largest, median: of these. step: the scale. lost: how many never reach half of it, and are all zeros."""

    count: int
    largest: float
    median: float
    step: float
    lost: int


@dataclass(frozen=True)
class Part:
    """One rounding of a student. place: of the tensor that is rounded, or of the layer whose weights are. distance: of
    the worst output with nothing else rounded (`faqd.fidelity`). readers: the places that, kept float, leave it out.
    int8_share: what these have of the student's, and it loses with them. channels: of vectors and maps, (N, C) and
    (N, C, H, W); None of anything else."""

    place: str
    kind: Kind
    distance: float
    readers: Places
    int8_share: float
    channels: Channels | None


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
        rounded = self._roundings()
        shares = int8_shares(self.student)
        found = []
        with float_forward(self.student):
            self.student.network.eval()
            channels = self._channels()
            for place, kind, quantizer in rounded:
                readers = self._readers(place, kind, quantizer)
                share = sum(shares.get(each, 0.0) for each in readers)
                found.append(Part(place, kind, self._with([quantizer]), readers, share, channels.get(quantizer)))
                progress(len(found), len(rounded))
        return sorted(found, key=lambda part: -part.distance)

    def all_of(self, kind: Kind) -> float:
        """The distance of the worst output with all weights, or all activations, rounded and nothing else."""
        with self.only(kind):
            return self._distance.of(self.student.network)

    @contextmanager
    def only(self, kind: Kind) -> Iterator[None]:
        """Within the block the student rounds its weights, or its activations, and nothing else."""
        with float_forward(self.student):
            self.student.network.eval()
            with _enabled([quantizer for _, each, quantizer in self._roundings() if each == kind]):
                yield

    def groups(self) -> list[Places]:
        """What has to be float together for a rounding to go, in graph order."""
        found = dict.fromkeys(self._readers(*rounding) for rounding in self._roundings())
        return [places for places in found if places]

    def cost_of(self, places: Collection[str]) -> float:
        """The distance of the worst output with nothing rounded but what goes where `places` are float."""
        going = [rounding for rounding in self._roundings() if set(self._readers(*rounding)) <= set(places)]
        with float_forward(self.student):
            self.student.network.eval()
            return self._with([quantizer for _, _, quantizer in going])

    def _roundings(self) -> list[tuple[str, Kind, Any]]:
        """Each with its place and its quantizer, in graph order."""
        activations = self.student.quantizers().items()
        return [
            *((place, "activations", quantizer) for place, quantizer in activations),
            *((str(node.target), "weights", quantizer) for node, quantizer in _layers(self.student.network).items()),
        ]

    def trials(self, parts: Sequence[Part]) -> Iterator[Trial]:
        """The student as it is, then with ever more of `parts` left out until its outputs are kept: twice as many each
        time, then halved. Of those that are kept, the one with the fewest places float is near the least there is."""
        tried: dict[Places, Trial] = {}

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

    def _trial(self, places: Places) -> Trial:
        config = self.student.config
        exclude = expression(places)
        patterns = (*config.exclude, exclude) if exclude else config.exclude
        student = insert_quantizers(
            self.student.float_network, replace(config, exclude=patterns), nodes.two_of(self._distance.images)
        )
        student.network.eval()
        calibrate(student, self._calibration, self._method)
        return Trial(exclude, len(places), int8_share(student), kept_at(self._distance.of(student.network)))

    def _channels(self) -> dict[ActivationQuantizer, Channels]:
        """Of the tensors that have channels, within `float_forward`."""
        peaks: dict[ActivationQuantizer, Tensor] = {}

        def watch(quantizer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            if output.dim() in (2, 4):
                peak = output.abs().transpose(0, 1).flatten(1).amax(1)
                peaks[quantizer] = torch.maximum(peak, peaks.get(quantizer, peak))

        hooks = [each.register_forward_hook(watch) for each in self.student.quantizers().values()]
        try:
            self._distance.of(self.student.network)
        finally:
            for hook in hooks:
                hook.remove()
        return {quantizer: _channels_of(peak, float(quantizer.scale.detach())) for quantizer, peak in peaks.items()}

    def _with(self, quantizers: Sequence[Any]) -> float:
        """The distance with these roundings alone, within `float_forward`."""
        with _enabled(quantizers):
            return self._distance.of(self.student.network)

    def _readers(self, place: str, kind: Kind, quantizer: Any) -> Places:
        """The layer whose weights are rounded; the operators on whose account a tensor is, behind those that move
        codes."""
        if kind == "weights":
            return (place,)
        network, floats = self.student.network, self.student.float_network
        (node,) = (node for node in network.graph.nodes if nodes.module_of(network, node) is quantizer)
        names = {one.name: place for one, place in nodes.places(floats).items()}
        walk = nodes.reached(node.users, lambda n: n.users if _passes(network, n) else ())
        found = [reader for reader in walk if reader.op.startswith("call") and not _passes(network, reader)]
        order = {each: index for index, each in enumerate(network.graph.nodes)}
        return tuple(names[reader.name] for reader in sorted(found, key=order.__getitem__) if reader.name in names)


def _channels_of(peaks: Tensor, step: float) -> Channels:
    lost = int((peaks < step / 2).sum())
    return Channels(len(peaks), float(peaks.max()), float(peaks.median()), step, lost)


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
def _enabled(quantizers: Sequence[Any]) -> Iterator[None]:
    for quantizer in quantizers:
        quantizer.enabled = True
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enabled = False


def _places(parts: Sequence[Part]) -> Places:
    """What has to be float for all of them to go."""
    return tuple(dict.fromkeys(place for part in parts for place in part.readers))


def expression(places: Sequence[str]) -> str:
    """A regular expression for these places alone."""
    escaped = [place.replace(".", r"\.") for place in places]
    return rf"^({'|'.join(escaped)})$" if len(escaped) > 1 else "".join(f"^{place}$" for place in escaped)
