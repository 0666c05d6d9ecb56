"""The bundle's networks as TensorRT engines, on the GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.benchmarks.bench import Network, Role
from faqd.benchmarks.latency import Query
from faqd.bundle import FLOAT_STUDENT_FP16, STUDENT_TENSORRT, TEACHER, Bundle
from faqd.deploy.record import engine_name
from faqd.deploy.runtime import Engine, load_engine

_ONNX: dict[Role, str] = {"teacher": TEACHER, "student": STUDENT_TENSORRT, "float": FLOAT_STUDENT_FP16}


class EngineBackend:
    """device: the GPU's name. why: how this back end came to be chosen."""

    name = "engine"
    student = STUDENT_TENSORRT

    def __init__(self, device: str, why: str) -> None:
        self.facts: dict[str, Any] = {"device": device, "why": why}

    def missing(self, bundle: Bundle, role: Role) -> str | None:
        path = _engine(bundle, role)
        if path.is_file():
            return None
        everything = "" if role == "student" else " --all"
        return f"{path} is not here: `faqd-deploy build-engine {bundle.folder}{everything}` builds it."

    @contextmanager
    def open(self, bundle: Bundle, role: Role) -> Iterator[Network]:
        with load_engine(_engine(bundle, role)) as engine:
            yield _Network(engine)


def _engine(bundle: Bundle, role: Role) -> Path:
    return bundle.folder / engine_name(_ONNX[role])


class _Network:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return self._engine.run(dict(feeds))

    def query(self, feeds: Mapping[str, NDArray[Any]]) -> Query:
        ready = {name: np.ascontiguousarray(values) for name, values in feeds.items()}
        return lambda: self._engine.timed(ready).latency_ms
