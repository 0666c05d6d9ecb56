"""The bundle's networks on onnxruntime, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.benchmarks.bench import Network, Role
from faqd.benchmarks.latency import Query
from faqd.bundle import FLOAT_STUDENT, STUDENT_ONNXRUNTIME, TEACHER, Bundle
from faqd.deploy.onnx_session import OnnxSession, version

_FILE: dict[Role, str] = {"teacher": TEACHER, "student": STUDENT_ONNXRUNTIME, "float": FLOAT_STUDENT}


class OnnxruntimeBackend:
    """threads: of one query. why: how this back end came to be chosen."""

    name = "onnxruntime"
    student = STUDENT_ONNXRUNTIME

    def __init__(self, threads: int, why: str) -> None:
        self._threads = threads
        self.facts: dict[str, Any] = {"device": "CPU", "threads": threads, "onnxruntime": version, "why": why}

    def missing(self, bundle: Bundle, role: Role) -> str | None:
        file = _FILE[role]
        return None if bundle.has(file) else f"{bundle.folder} holds no {file}: export the run again to have it."

    @contextmanager
    def open(self, bundle: Bundle, role: Role) -> Iterator[Network]:
        yield _Network(OnnxSession(bundle.path(_FILE[role]), threads=self._threads))


class _Network:
    def __init__(self, session: OnnxSession) -> None:
        self._session = session

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return self._session.run(feeds)

    def query(self, feeds: Mapping[str, NDArray[Any]]) -> Query:
        ready = {name: np.ascontiguousarray(values) for name, values in feeds.items()}

        def query() -> None:
            self._session.run(ready)

        return query
