"""Runs an ONNX file with onnxruntime on the CPU: the one module that imports it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as failures

from faqd.deploy.onnx_file import load_bytes
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
_FATAL_ONLY = 4  # Everything below is raised as an exception as well; printing it too would say it twice.
onnxruntime.set_default_logger_severity(_FATAL_ONLY)

version: str = onnxruntime.__version__


class OnnxSession:
    """A loaded network: arrays by input name in, arrays by output name out.

    source: a path, whose file is checked first, or the bytes of a model that needs no check. threads: of one query.
    optimise: False runs the graph as written, without the fusions that change its arithmetic.
    """

    def __init__(self, source: Path | str | bytes, *, threads: int = 1, optimise: bool = True) -> None:
        level = onnxruntime.GraphOptimizationLevel
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL_ONLY
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
        # Idle workers of one session must not spin while another session is being timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
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
        except (failures.InvalidArgument, failures.Fail, failures.RuntimeException, ValueError) as error:
            raise UserError(f"onnxruntime cannot run the network: {first_line(error)}") from error
        return dict(zip(self.outputs, values, strict=True))
