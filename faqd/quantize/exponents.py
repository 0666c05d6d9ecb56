"""How far the channels of a tensor are made alike: by what the layers that read them then compute wrongly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from faqd.quantize.channel_readers import Reader
from faqd.quantize.placement import Placement

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""0 leaves channels as they are, 1 gives all of them the peak of the largest."""
LARGEST = 64.0
"""Of all factors: channels that are hardly there need no more."""


def factors(peaks: Tensor, largest: float, exponent: float) -> Tensor:
    """t (channels) float64, from 1 for the largest channel on. largest: of all that share the scale."""
    return (largest / peaks).nan_to_num(1.0, posinf=1.0).pow(exponent).clamp(1.0, LARGEST)


class Trial(fx.Interpreter):
    """Runs the float network (shapes propagated), and measures beside each layer what it computes of rounded input and
    rounded weights, for each of EXPONENTS.

    readers: of each tensor that is tried. peaks: its channels' largest magnitudes, of other images than those of the
    trial: where all channels are as large as the largest, each may be clipped on an image that nobody has seen.
    """

    def __init__(
        self,
        network: fx.GraphModule,
        placement: Placement,
        readers: dict[fx.Node, list[Reader]],
        peaks: dict[fx.Node, Tensor],
    ) -> None:
        super().__init__(network)
        self._placement, self._peaks = placement, peaks
        self._read_by: dict[fx.Node, list[tuple[fx.Node, Reader]]] = {}
        for node, found in readers.items():
            for reader in found:
                self._read_by.setdefault(reader.node, []).append((node, reader))
        self._errors = {node: [0.0] * len(EXPONENTS) for node in readers}

    def best(self, node: fx.Node) -> float:
        errors = self._errors[node]
        return EXPONENTS[errors.index(min(errors))]

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        for node, reader in self._read_by.get(n, ()):
            (x,), _ = self.fetch_args_kwargs_from_env(n)
            for index, exponent in enumerate(EXPONENTS):
                rounded = self._rounded(node, reader, x, exponent)
                self._errors[node][index] += float((rounded - result).square().sum())
        return result

    def _rounded(self, node: fx.Node, reader: Reader, x: Tensor, exponent: float) -> Tensor:
        """What a layer computes of codes; its input channels stand on axis 1."""
        largest = float(self._peaks[node].max())
        t = factors(self._peaks[node], largest, exponent)
        grid, quant = self._placement.activations[node], self._placement.weights[reader.node]
        of_all = torch.ones(x.shape[1]).to(x)
        of_all[reader.start : reader.start + len(t)] = t.to(x)
        step = largest / grid.high / of_all.reshape(-1, *[1] * (x.dim() - 2))
        codes = (x / step).round_().clamp_(grid.low, grid.high)
        weight = reader.divided(reader.layer.weight, t)
        axes = list(range(weight.dim()))[0 if quant.axis is None else 1 :]
        unit = weight.abs().amax(axes, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny) / quant.high
        weight = reader.divided((weight / unit).round_().mul_(unit), 1 / t)
        found: Tensor = torch.func.functional_call(reader.layer, {"weight": weight}, (codes.mul_(step),))
        return found
