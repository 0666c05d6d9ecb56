"""The bundle's networks as TensorRT engines, on the GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from faqd.benchmarks.measure.networks import Network, Role
from faqd.benchmarks.measure.switches import DeviceSwitches
from faqd.bundle import FLOAT_STUDENT_FP16, STUDENT_TENSORRT, TEACHER, TEACHER_FP16, Bundle
from faqd.deploy.cuda.interface import Device
from faqd.deploy.engine.kernels import layer_kind
from faqd.deploy.engine.record import engine_name, read_record, record_path
from faqd.deploy.engine.trt import installed
from faqd.deploy.runtime.pipeline import Pipeline, Streams
from faqd.deploy.runtime.runtime import Engine, load_engine

_ONNX: dict[Role, str] = {
    "teacher": TEACHER,
    "teacher_fp16": TEACHER_FP16,
    "student": STUDENT_TENSORRT,
    "float": FLOAT_STUDENT_FP16,
}


class EngineBackend:
    """why: how this back end came to be chosen. cuda: the binding to use. trust: load engines that do not match their
    record."""

    name = "engine"
    files: Mapping[Role, str] = _ONNX

    def __init__(
        self, device: Device, why: str, switches: DeviceSwitches, *, cuda: str | None = None, trust: bool = False
    ) -> None:
        self.gpu: str | None = device.name
        self.switches = switches.to_json()
        self._switches, self._cuda, self._trust = switches, cuda, trust
        self.facts: dict[str, Any] = {
            "device": device.name,
            "compute_capability": device.compute_capability,
            "memory_bytes": device.memory_bytes,
            "driver": device.driver,
            "cuda": device.cuda,
            "tensorrt": str(installed()),
            "why": why,
        }

    def missing(self, bundle: Bundle, role: Role) -> str | None:
        path = _engine(bundle, role)
        if path.is_file():
            return None
        everything = "" if role == "student" else " --all"
        return f"{path} is not here: `faqd-deploy build-engine {bundle.folder}{everything}` builds it."

    @contextmanager
    def open(self, bundle: Bundle, role: Role) -> Iterator[Network]:
        path = _engine(bundle, role)
        start = time.perf_counter()
        with load_engine(path, trust=self._trust, backend=self._cuda) as engine:
            load_ms = (time.perf_counter() - start) * 1e3
            yield _Network(path, engine, self._switches, load_ms)

    def open_engine_file(self, bundle: Bundle) -> None:
        """None: its engine is what is run."""


def _engine(bundle: Bundle, role: Role) -> Path:
    return bundle.folder / engine_name(_ONNX[role])


class _Network:
    def __init__(self, path: Path, engine: Engine, switches: DeviceSwitches, load_ms: float) -> None:
        self._path, self._engine, self._switches = path, engine, switches
        self.facts: dict[str, Any] = {
            "load_ms": load_ms,
            "file_bytes": path.stat().st_size,
            "device_memory_bytes": engine.device_memory_bytes,
            "auxiliary_streams": engine.auxiliary_streams,
        }

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return self._engine.run(dict(feeds))

    @contextmanager
    def submission(self, feeds: Mapping[str, NDArray[Any]], slots: int = 1) -> Iterator[Pipeline | Streams]:
        how = self._switches
        options = {"graph": how.cuda_graph, "transfers": how.transfers, "spin": how.spin_wait}
        options["zero_copy"] = how.zero_copy
        count = how.inf_streams if slots > 1 else 1
        with ExitStack() as stack:
            pipelines = [
                stack.enter_context(self._engine.pipeline(feeds, slots=slots, **options)) for _ in range(count)
            ]
            yield pipelines[0] if count == 1 else Streams(pipelines)

    def layer_times(self, feeds: Mapping[str, NDArray[Any]], runs: int) -> list[tuple[str, str, list[float]]]:
        known = {}
        if record_path(self._path).is_file():
            known = {layer["name"]: layer_kind(layer) for layer in read_record(self._path).get("layers", [])}
        times = self._engine.layer_times(feeds, runs)
        return [(name, known.get(name, "unknown"), values) for name, values in times.items()]
