"""Time per kernel, as TensorRT's own profiler tells it."""

from __future__ import annotations

from typing import Any

from faqd.deploy.trt import TensorRT


def profiler_of(trt: TensorRT) -> Any:
    """A profiler for an execution context; its `times` holds the ms of every query by the name of the kernel."""
    base: Any = trt.module.IProfiler

    class Collector(base):  # type: ignore[misc]
        def __init__(self) -> None:
            # pybind11 asks for the base class itself, as with the logger.
            base.__init__(self)
            self.times: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times.setdefault(layer_name, []).append(ms)

    return Collector()
