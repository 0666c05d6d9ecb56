"""What a bench run measures, how queries are submitted and for how long: trtexec's switches and defaults."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from faqd.benchmarks.measure.energy import ENERGY_S
from faqd.benchmarks.measure.latency import AVERAGE_RUNS, PERCENTILES, Length
from faqd.benchmarks.record.gates import Gates
from faqd.errors import UserError

Preset = Literal["trtexec10", "trtexec11"]


@dataclass(frozen=True)
class DeviceSwitches:
    """What only a GPU has. transfers: copies in and out are part of every query. spin_wait: the host waits actively.
    zero_copy: the kernels work on the host's memory, which takes the place of copies.
    inf_streams: contexts of an engine that compute side by side where queries are submitted ahead; one in the closed
    loop."""

    preset: Preset
    cuda_graph: bool
    spin_wait: bool
    transfers: bool
    zero_copy: bool = False
    inf_streams: int = 1

    def to_json(self) -> dict[str, Any]:
        return {
            "preset": self.preset,
            "cuda_graph": self.cuda_graph,
            "spin_wait": self.spin_wait,
            "transfers": self.transfers,
            "zero_copy": self.zero_copy,
            "inf_streams": self.inf_streams,
        }


ABSENT = dict.fromkeys(("preset", "cuda_graph", "spin_wait", "transfers", "zero_copy", "inf_streams"))
"""The same keys where there is no GPU."""

PRESETS = {
    "trtexec10": DeviceSwitches("trtexec10", cuda_graph=False, spin_wait=False, transfers=True),
    "trtexec11": DeviceSwitches("trtexec11", cuda_graph=True, spin_wait=True, transfers=False),
}
"""trtexec 10 and 11 agree in everything else: 200 ms of warm-up, 3 s, at least 10 queries, averages of 10."""

DEFAULT: Preset = "trtexec11"


@dataclass(frozen=True)
class Asked:
    """What the command line said; None where it was silent."""

    preset: Preset | None = None
    cuda_graph: bool | None = None
    spin_wait: bool | None = None
    transfers: bool | None = None
    zero_copy: bool | None = None
    inf_streams: int | None = None

    def on_a_gpu(self) -> DeviceSwitches:
        base = PRESETS[self.preset or DEFAULT]
        if self.zero_copy and self.transfers:
            raise UserError("--zero-copy takes the place of copies: leave out --include-data-transfers.")
        if self.zero_copy:
            base = replace(base, transfers=False)
        return DeviceSwitches(
            base.preset,
            base.cuda_graph if self.cuda_graph is None else self.cuda_graph,
            base.spin_wait if self.spin_wait is None else self.spin_wait,
            base.transfers if self.transfers is None else self.transfers,
            bool(self.zero_copy),
            self.inf_streams or base.inf_streams,
        )

    def refuse_without_gpu(self) -> None:
        """UserError where a switch was given that onnxruntime on the CPU cannot follow."""
        options = {
            "--preset": self.preset,
            "--use-cuda-graph": self.cuda_graph,
            "--use-spin-wait": self.spin_wait,
            "--include-data-transfers": self.transfers,
            "--zero-copy": self.zero_copy or None,
            "--inf-streams": self.inf_streams,
        }
        given = [option for option, value in options.items() if value is not None]
        if given:
            raise UserError(
                f"{', '.join(given)} (or its opposite): onnxruntime on the CPU has no CUDA graph, no copies, "
                "no streams and nothing to wait for; leave it out, or bench engines on a GPU."
            )


@dataclass(frozen=True)
class Options:
    """The switches of a run. batch: sizes; the first one is what tables, energy, profile and gates speak of.

    sustained_minutes, energy_duration_s: 0 leaves it out. power_rail: of a Jetson, instead of the module's.
    bootstrap: the resamples of images for the intervals of a user's metric.
    """

    batch: tuple[int, ...] = (1, 32)
    length: Length = field(default_factory=Length)
    percentiles: tuple[float, ...] = PERCENTILES
    average_runs: int = AVERAGE_RUNS
    skip_latency: bool = False
    sweep: bool = False
    profile: bool = False
    sustained_minutes: float = 0.0
    energy_duration_s: float = ENERGY_S
    power_rail: str | None = None
    bootstrap: int | None = None
    gates: Gates = field(default_factory=Gates)
