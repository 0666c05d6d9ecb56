"""Runs an ONNX file with onnxruntime on the CPU: the one module that imports it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as failures

from faqd.deploy.onnx_model.load import load_bytes
from faqd.errors import UserError, first_line

_CANNOT_LOAD = (
    failures.EPFail,
    failures.Fail,
    failures.InvalidArgument,
    failures.InvalidGraph,
    failures.InvalidProtobuf,
    failures.NoModel,
    failures.NoSuchFile,
    failures.NotImplemented,
    failures.RuntimeException,
)
_CANNOT_RUN = (failures.InvalidArgument, failures.Fail, failures.RuntimeException, ValueError)
_FATAL_ONLY = 4  # Everything below is raised as an exception as well; printing it too would say it twice.
onnxruntime.set_default_logger_severity(_FATAL_ONLY)

version: str = onnxruntime.__version__


@dataclass(frozen=True)
class LayerTimes:
    """An operator of the optimised graph, and its ms in every query."""

    name: str
    operator: str
    times_ms: list[float]


class OnnxSession:
    """A loaded network: arrays by input name in, arrays by output name out.

    source: a path, whose file is checked first, or the bytes of a model that needs no check. threads: of one query.
    optimise: False runs the graph as written, without the fusions that change its arithmetic.
    profile: where to begin a file of times, see `layer_times`.
    """

    def __init__(
        self, source: Path | str | bytes, *, threads: int = 1, optimise: bool = True, profile: Path | None = None
    ) -> None:
        level = onnxruntime.GraphOptimizationLevel
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL_ONLY
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
        # Idle workers of one session must not spin while another session is being timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        where = "the model in memory" if isinstance(source, bytes) else str(source)
        model = source if isinstance(source, bytes) else load_bytes(Path(source))
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except _CANNOT_LOAD as error:
            raise UserError(
                f"{where}: onnxruntime {version} cannot load it ({first_line(error)}); "
                "the file is damaged, or newer than this onnxruntime: export it again."
            ) from error
        self.inputs: tuple[str, ...] = tuple(tensor.name for tensor in self._session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(tensor.name for tensor in self._session.get_outputs())

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """One query. UserError where names, shapes or types of `feeds` are not the network's."""
        try:
            values = self._session.run(None, dict(feeds))
        except _CANNOT_RUN as error:
            raise UserError(f"onnxruntime cannot run the network: {first_line(error)}") from error
        return dict(zip(self.outputs, values, strict=True))

    def bound(self, feeds: Mapping[str, NDArray[Any]]) -> BoundQuery:
        """A query on arrays that stay where they are. UserError as `run` has it."""
        results = {name: np.empty_like(values) for name, values in self.run(feeds).items()}
        return BoundQuery(self._session, {name: np.ascontiguousarray(x) for name, x in feeds.items()}, results)

    def end_profile(self) -> str:
        """The file that the profile was written to."""
        return str(self._session.end_profiling())


class BoundQuery:
    """Call it to run the network: it reads `feeds` and overwrites `results`.

    What else `OnnxSession.run` does in Python, every time, is 1 % of the time of a ResNet-20 at batch 1.
    """

    def __init__(self, session: Any, feeds: dict[str, NDArray[Any]], results: dict[str, NDArray[Any]]) -> None:
        self.feeds, self.results = feeds, results  # which the binding does not keep alive
        self._session, self._binding = session, session.io_binding()
        for name, values in feeds.items():
            self._binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(values))
        for name, values in results.items():
            self._binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(values))

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding)


def layer_times(source: Path, feeds: Mapping[str, NDArray[Any]], *, threads: int, runs: int) -> list[LayerTimes]:
    """Time of every operator in each of `runs` queries, as onnxruntime's profiler tells it, in the order of
    execution. Profiling costs time itself: the sum is no latency."""
    with tempfile.TemporaryDirectory() as folder:
        session = OnnxSession(source, threads=threads, profile=Path(folder) / "run")
        for _ in range(runs + 1):
            session.run(feeds)
        events = json.loads(Path(session.end_profile()).read_text(encoding="utf-8"))
    found: dict[str, LayerTimes] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            layer = found.setdefault(name, LayerTimes(name, event["args"]["op_name"], []))
            layer.times_ms.append(event["dur"] / 1e3)
    # The first query allocates.
    return [LayerTimes(layer.name, layer.operator, layer.times_ms[1:]) for layer in found.values()]
