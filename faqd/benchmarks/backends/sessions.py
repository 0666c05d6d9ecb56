"""The bundle's networks on onnxruntime, on the CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from faqd.benchmarks.measure.latency import Clock
from faqd.benchmarks.measure.networks import Network, Role
from faqd.benchmarks.measure.switches import ABSENT
from faqd.bundle import FLOAT_STUDENT, STUDENT_ONNXRUNTIME, STUDENT_TENSORRT, TEACHER, Bundle
from faqd.deploy.onnx_model.session import OnnxSession, layer_times, version
from faqd.deploy.runtime.pipeline import QueryTimes

_FILE: dict[Role, str] = {"teacher": TEACHER, "student": STUDENT_ONNXRUNTIME, "float": FLOAT_STUDENT}

_PRODUCTS = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
_INT8_PRODUCTS = ("QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat")
_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "Cast", "ReorderInput", "ReorderOutput", "Transpose")


class OnnxruntimeBackend:
    """threads: of one query. why: how this back end came to be chosen. clock: seconds; given by tests."""

    name = "onnxruntime"
    files: Mapping[Role, str] = _FILE
    gpu: str | None = None
    switches: dict[str, Any] = ABSENT

    def __init__(self, threads: int, why: str, clock: Clock = time.perf_counter) -> None:
        self._threads = threads
        self._clock = clock
        self.facts: dict[str, Any] = {"device": "CPU", "threads": threads, "onnxruntime": version, "why": why}

    def missing(self, bundle: Bundle, role: Role) -> str | None:
        file = _FILE[role]
        return None if bundle.has(file) else f"{bundle.folder} holds no {file}: export the run again to have it."

    @contextmanager
    def open(self, bundle: Bundle, role: Role) -> Iterator[Network]:
        yield _Network(bundle.path(_FILE[role]), self._threads, self._clock)

    def open_engine_file(self, bundle: Bundle) -> AbstractContextManager[Network] | None:
        return self._as_written(bundle) if bundle.has(STUDENT_TENSORRT) else None

    @contextmanager
    def _as_written(self, bundle: Bundle) -> Iterator[Network]:
        # Optimised, onnxruntime would compute this file in another arithmetic than TensorRT does.
        yield _Network(bundle.path(STUDENT_TENSORRT), self._threads, self._clock, optimise=False)


class _Network:
    def __init__(self, path: Path, threads: int, clock: Clock, optimise: bool = True) -> None:
        self._path, self._threads, self._clock = path, threads, clock
        start = clock()
        self._session = OnnxSession(path, threads=threads, optimise=optimise)
        self.facts: dict[str, Any] = {
            "load_ms": (clock() - start) * 1e3,
            "file_bytes": path.stat().st_size,
            "device_memory_bytes": None,
            "auxiliary_streams": None,
        }

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return self._session.run(feeds)

    @contextmanager
    def submission(self, feeds: Mapping[str, NDArray[Any]], slots: int = 1) -> Iterator[ClosedLoop]:
        assert slots == 1, "onnxruntime's call returns with the result"
        yield ClosedLoop(self._session, feeds, self._clock)

    def layer_times(self, feeds: Mapping[str, NDArray[Any]], runs: int) -> list[tuple[str, str, list[float]]]:
        layers = layer_times(self._path, feeds, threads=self._threads, runs=runs)
        return [(layer.name, _kind(layer.operator), layer.times_ms) for layer in layers]


class ClosedLoop:
    """One query after the other, on arrays that stay in place. The call blocks the host until the result is there, so
    submitting it and computing are the same span of time, and nothing is copied."""

    slots = 1

    def __init__(self, session: OnnxSession, feeds: Mapping[str, NDArray[Any]], clock: Clock) -> None:
        self._query, self._clock = session.bound(feeds), clock
        self.begin()

    def begin(self) -> None:
        self._zero = self._clock()

    def submit(self) -> None:
        self._start = self._clock()
        self._query()
        self._end = self._clock()

    def collect(self) -> QueryTimes:
        start, took = (self._start - self._zero) * 1e3, (self._end - self._start) * 1e3
        return QueryTimes(start, took, start, 0.0, start, took, start + took, 0.0)


def _kind(operator: str) -> str:
    if operator in _INT8_PRODUCTS:
        return "int8"
    if operator in _PRODUCTS:
        return "float"
    return "conversion" if operator in _CONVERSIONS else "other"
