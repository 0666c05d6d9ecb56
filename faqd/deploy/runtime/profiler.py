"""Time per kernel, as TensorRT's own profiler tells it."""

from __future__ import annotations

from faqd.deploy.engine.trt import IProfiler, TensorRT


def profiler_of(trt: TensorRT, times: dict[str, list[float]]) -> IProfiler:
    """A profiler for an execution context; it puts the ms of every query into `times`, by the name of the kernel."""
    base: IProfiler = trt.module.IProfiler

    class Collector(base):  # type: ignore[misc]
        def __init__(self) -> None:
            # pybind11 asks for the base class itself, as with the logger.
            base.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times.setdefault(layer_name, []).append(ms)

    return Collector()
