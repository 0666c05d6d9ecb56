"""Runs an engine on numpy arrays: load, bind by tensor name, run, time. No torch.

with load_engine(Path("bundle/student.tensorrt.engine")) as engine:
    logits = engine.run({"images": images})["logits"]
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.deploy.cuda.cuda import open_cuda
from faqd.deploy.cuda.interface import Cuda
from faqd.deploy.engine.record import check_gpu, check_version, rebuild, record_of
from faqd.deploy.engine.trt import IExecutionContext, Messages, TensorRT, heard, installed
from faqd.deploy.runtime.binding import (
    Binding,
    buffers_for,
    giving_back,
    must,
    refuse_zero_copy,
    set_addresses,
    set_shapes,
    taken,
)
from faqd.deploy.runtime.pipeline import Pipeline
from faqd.deploy.runtime.profiler import profiler_of
from faqd.deploy.runtime.signature import Arrays, Shapes, checked_shapes, signature
from faqd.errors import UserError


def load_engine(
    path: Path, *, trust: bool = False, backend: str | None = None, graph: bool = False, zero_copy: bool = False
) -> Engine:
    """Load an engine for use in a `with` block.

    An engine is code: it is loaded only if its SHA-256 is the one in its record, unless `trust`. backend:
    `cuda-bindings`, `pycuda` or `auto`. graph: launch the kernels as one CUDA graph, captured once per shape; where
    that fails they are launched one by one, with a warning. zero_copy: `run`'s kernels work on the host's memory, on a
    GPU that shares it, as a Jetson does. UserError where the engine was changed, does not fit this
    TensorRT or GPU, or there is no GPU.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file. {rebuild(path)}")
    plan = path.read_bytes()
    record = record_of(path, plan, trust)
    trt = installed((record.get("builder") or {}).get("name"))
    check_version(path, record, trt)
    with giving_back() as stack:
        cuda = open_cuda(backend)
        stack.callback(cuda.close)
        check_gpu(path, record, cuda.device())
        if zero_copy:
            refuse_zero_copy(path.name, cuda)
        return Engine(path, plan, trt, cuda, graph, stack.pop_all(), zero_copy=zero_copy)


class Engine:
    """A loaded engine with its buffers; not for several threads. `inputs` and `outputs` give name -> (shape, dtype),
    where -1 is a free axis."""

    def __init__(
        self,
        path: Path,
        plan: bytes,
        trt: TensorRT,
        cuda: Cuda,
        graph: bool,
        stack: contextlib.ExitStack,
        *,
        zero_copy: bool = False,
    ) -> None:
        with giving_back() as owned:
            owned.callback(stack.close)
            owned.callback(self._drop)
            self.path = path
            self.cuda = cuda
            self._trt = trt
            with heard(trt) as (log, messages):
                self._runtime = trt.module.Runtime(log)
                # A version-compatible engine brings host code. What is here is what its record says, or was trusted.
                self._runtime.engine_host_code_allowed = True
                self._engine = self._runtime.deserialize_cuda_engine(plan)
                if self._engine is None:
                    raise UserError(f"{path}: {trt} does not load it: {messages.why()}. {rebuild(path)}", exit_code=1)
                self._context = self._new_context(messages)
            self._signature = signature(path, trt, self._engine)
            self.inputs = {name: (tensor.shape, tensor.dtype) for name, tensor in self._signature.inputs.items()}
            self.outputs = {name: (tensor.shape, tensor.dtype) for name, tensor in self._signature.outputs.items()}
            self._stream = taken(cuda.stream, cuda.free_stream, owned)
            self._graph, self._zero_copy = graph, zero_copy
            self._binding = Binding(None, {}, contextlib.ExitStack())
            owned.callback(lambda: self._binding.resources.close())
            self._resources = owned.pop_all()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(*([UserError] if error else [])):  # What went wrong first is what must be seen.
            self.close()

    def close(self) -> None:
        """Give all memory back; the engine cannot be used any more."""
        self._resources.close()

    @property
    def device_memory_bytes(self) -> int:
        """Scratch memory of the kernels, without the weights."""
        return int(self._engine.device_memory_size_v2)

    @property
    def auxiliary_streams(self) -> int:
        """Streams beside the given one that TensorRT puts kernels on; with any, the sum over kernels is no latency."""
        return int(self._engine.num_aux_streams)

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """One query: arrays by input name in, new arrays by output name out. UserError where names, types or shapes
        are not the engine's."""
        with heard(self._trt) as (_, self._messages):
            binding = self._fed(feeds)
            self._copy_in(binding)
            self._launch(binding)
            self._copy_out(binding)
            self.cuda.synchronize(self._stream)
        return {name: binding.buffers[name].array.copy() for name in self.outputs}

    def pipeline(
        self,
        feeds: Arrays,
        *,
        slots: int = 1,
        graph: bool = False,
        transfers: bool = True,
        spin: bool = True,
        zero_copy: bool = False,
    ) -> Pipeline:
        """Queries of these arrays again and again, timed; `slots` of them can be in flight. See pipeline.py.

        graph: launch the kernels as one CUDA graph. transfers: copy in and out with every query. spin: wait actively.
        zero_copy: the kernels work on the host's memory.
        """
        with heard(self._trt) as (_, messages):
            context = self._new_context(messages)
        how: dict[str, Any] = {"slots": slots, "graph": graph, "transfers": transfers, "spin": spin}
        how["zero_copy"] = zero_copy
        return Pipeline(self.path, self._trt, self.cuda, context, self._signature, feeds, **how)

    def layer_times(self, feeds: Arrays, runs: int) -> dict[str, list[float]]:
        """Time in ms of every kernel in each of `runs` queries, as TensorRT's profiler tells it, in the order of
        execution. The profiler keeps TensorRT from overlapping kernels: the sum is no latency."""
        times: dict[str, list[float]] = {}
        with heard(self._trt) as (_, messages), giving_back() as stack:
            context = self._new_context(messages)
            profiler = profiler_of(self._trt, times)
            shapes = checked_shapes(self.path.name, self._signature.inputs, feeds)
            set_shapes(self.path.name, context, shapes, messages)
            stack.callback(self.cuda.synchronize, self._stream)
            types = {name: dtype for name, (_, dtype) in (self.inputs | self.outputs).items()}
            buffers = buffers_for(self.path.name, context, types, self.cuda, stack)
            set_addresses(self.path.name, context, buffers, messages)
            for name in self.inputs:
                np.copyto(buffers[name].array, feeds[name])
                self.cuda.copy_in(buffers[name].address, buffers[name].pinned, self._stream)
            address = self.cuda.stream_address(self._stream)
            for counted in (False, True):  # The first query allocates.
                if counted:
                    context.profiler = profiler
                for _ in range(runs if counted else 1):
                    must(context.execute_async_v3(address), self.path.name, "execute_async_v3", messages)
                    self.cuda.synchronize(self._stream)
            stack.close()
        return times

    def _new_context(self, messages: Messages) -> IExecutionContext:
        if "_engine" not in self.__dict__:
            raise UserError(f"{self.path.name}: it was closed; load it again to run it.")
        context = self._engine.create_execution_context()
        if context is None:
            raise UserError(f"{self.path}: no room to run it: {messages.why()}.", exit_code=1)
        return context

    def _fed(self, feeds: Arrays) -> Binding:
        """The binding of the shapes of `feeds`, with the arrays in its page-locked buffers."""
        if "_context" not in self.__dict__:
            raise UserError(f"{self.path.name}: it was closed; load it again to run it.")
        shapes = checked_shapes(self.path.name, self._signature.inputs, feeds)
        if shapes != self._binding.shapes:
            self._bind(shapes)
        for name in self.inputs:
            np.copyto(self._binding.buffers[name].array, feeds[name])
        if self._graph and self._binding.graph is None:
            self._capture(self._binding)
        return self._binding

    def _bind(self, shapes: Shapes) -> None:
        """Buffers and addresses for these input shapes, in place of the ones before."""
        self._binding.resources.close()
        self._binding = Binding(None, {}, contextlib.ExitStack())
        set_shapes(self.path.name, self._context, shapes, self._messages)
        types = {name: dtype for name, (_, dtype) in (self.inputs | self.outputs).items()}
        with giving_back() as stack:
            buffers = buffers_for(self.path.name, self._context, types, self.cuda, stack, zero_copy=self._zero_copy)
            set_addresses(self.path.name, self._context, buffers, self._messages)
            # The first thing to happen when they are given back: a query that was broken off may still use them.
            stack.callback(self.cuda.synchronize, self._stream)
            self._binding = Binding(shapes, buffers, stack.pop_all())

    def _capture(self, binding: Binding) -> None:
        """Kernels as one graph; a plain launch goes first, because TensorRT allocates during the first one."""
        self._copy_in(binding)
        self._enqueue()
        self.cuda.synchronize(self._stream)
        try:
            binding.graph = self.cuda.capture(self._stream, self._enqueue)
        except UserError as error:
            self._graph = False
            warnings.warn(f"{self.path.name}: no CUDA graph, kernels are launched one by one: {error}", stacklevel=4)
            return
        binding.resources.callback(self.cuda.free_graph, binding.graph)

    def _launch(self, binding: Binding) -> None:
        if binding.graph is None:
            self._enqueue()
        else:
            self.cuda.launch(binding.graph, self._stream)

    def _enqueue(self) -> None:
        done = self._context.execute_async_v3(self.cuda.stream_address(self._stream))
        must(done, self.path.name, "execute_async_v3", self._messages)

    def _copy_in(self, binding: Binding) -> None:
        for name in () if self._zero_copy else self.inputs:
            self.cuda.copy_in(binding.buffers[name].address, binding.buffers[name].pinned, self._stream)

    def _copy_out(self, binding: Binding) -> None:
        for name in () if self._zero_copy else self.outputs:
            self.cuda.copy_out(binding.buffers[name].pinned, binding.buffers[name].address, self._stream)

    def _drop(self) -> None:
        # In this order, and before the context of CUDA goes: each needs the next.
        for name in ("_stream", "_context", "_engine", "_runtime"):
            self.__dict__.pop(name, None)
