"""Runs an engine on numpy arrays: load, bind by tensor name, run, time. No torch.

with load_engine(Path("bundle/student.tensorrt.engine")) as engine:
    logits = engine.run({"images": images})["logits"]
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.deploy.cuda import open_cuda
from faqd.deploy.cuda_interface import Cuda
from faqd.deploy.record import check_gpu, check_version, rebuild, record_of
from faqd.deploy.trt import ICudaEngine, TensorRT, heard, installed
from faqd.errors import UserError

Arrays = Mapping[str, NDArray[Any]]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]

_TYPES: dict[str, type[np.generic]] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}


@dataclass(frozen=True)
class Timing:
    """One query in ms, by trtexec's definitions: enqueue is host time and no part of the latency, the copies and the
    kernels are between CUDA events, latency = h2d + compute + d2h."""

    enqueue_ms: float
    h2d_ms: float
    compute_ms: float
    d2h_ms: float

    @property
    def latency_ms(self) -> float:
        return self.h2d_ms + self.compute_ms + self.d2h_ms


def load_engine(path: Path, *, trust: bool = False, backend: str | None = None, graph: bool = False) -> Engine:
    """Load an engine for use in a `with` block.

    An engine is code: it is loaded only if its SHA-256 is the one in its record, unless `trust`. backend:
    `cuda-bindings` or `pycuda`. graph: launch the kernels as one CUDA graph, once per shape, where the back end has it.
    UserError where the engine was changed, does not fit this TensorRT or GPU, or there is no GPU.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file. {rebuild(path)}")
    plan = path.read_bytes()
    record = record_of(path, plan, trust)
    trt = installed((record.get("builder") or {}).get("name"))
    check_version(path, record, trt)
    with contextlib.ExitStack() as stack:
        cuda = open_cuda(backend)
        stack.callback(cuda.close)
        check_gpu(path, record, cuda.device())
        return Engine(path, plan, trt, cuda, graph, stack.pop_all())


class Engine:
    """A loaded engine with its buffers; not for several threads. `inputs` and `outputs` give name -> (shape, dtype),
    where -1 is a free axis."""

    def __init__(
        self, path: Path, plan: bytes, trt: TensorRT, cuda: Cuda, graph: bool, stack: contextlib.ExitStack
    ) -> None:
        with stack:  # Whatever was taken so far is given back if the next step fails.
            stack.callback(self._drop)
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
                self._context = self._engine.create_execution_context()
                if self._context is None:
                    raise UserError(f"{path}: no room to run it: {messages.why()}.", exit_code=1)
            self.inputs, self.outputs = _tensors(trt, self._engine)
            self._stream = cuda.stream()
            stack.callback(cuda.free_stream, self._stream)
            self._events = [cuda.event() for _ in range(4)]
            for event in self._events:
                stack.callback(cuda.free_event, event)
            self._graph = graph
            self._binding = _Binding((), {}, contextlib.ExitStack())
            stack.callback(lambda: self._binding.resources.close())
            self._stack = stack.pop_all()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give all memory back; the engine cannot be used any more."""
        self._stack.close()

    @property
    def device_memory_bytes(self) -> int:
        """Scratch memory of the kernels, without the weights."""
        return int(self._engine.device_memory_size_v2)

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

    def timed(self, feeds: Arrays) -> Timing:
        """One query, timed. Filling the page-locked buffers is not part of it."""
        with heard(self._trt) as (_, self._messages):
            binding = self._fed(feeds)
            start, copied, computed, end = self._events
            self.cuda.record(start, self._stream)
            self._copy_in(binding)
            self.cuda.record(copied, self._stream)
            before = time.perf_counter()
            self._launch(binding)
            enqueue = time.perf_counter() - before
            self.cuda.record(computed, self._stream)
            self._copy_out(binding)
            self.cuda.record(end, self._stream)
            self.cuda.synchronize(self._stream)
        elapsed = self.cuda.elapsed_ms
        return Timing(enqueue * 1e3, elapsed(start, copied), elapsed(copied, computed), elapsed(computed, end))

    def _fed(self, feeds: Arrays) -> _Binding:
        """The binding of the shapes of `feeds`, with the arrays in its page-locked buffers."""
        shapes = self._checked(feeds)
        if shapes != self._binding.shapes:
            self._bind(shapes)
        for name in self.inputs:
            np.copyto(self._binding.buffers[name].array, feeds[name])
        if self._graph and self._binding.graph is None:
            self._capture(self._binding)
        return self._binding

    def _checked(self, feeds: Arrays) -> Shapes:
        if feeds.keys() != self.inputs.keys():
            raise UserError(f"{self.path.name}: takes {', '.join(self.inputs)}; it was given {', '.join(feeds)}.")
        for name, (shape, dtype) in self.inputs.items():
            found = feeds[name]
            if found.dtype != dtype:
                raise UserError(f"{self.path.name}: input {name} is {dtype}; it was given {found.dtype}.")
            fits = len(shape) == found.ndim and all(a in (-1, b) for a, b in zip(shape, found.shape, strict=True))
            if not fits or not self._in_profile(name, shape, found.shape):
                raise UserError(
                    f"{self.path.name}: input {name} takes {self._allowed(name, shape)}; it was given "
                    f"{list(found.shape)}. Build the engine again with other batch sizes, or change the batch."
                )
        return tuple((name, tuple(feeds[name].shape)) for name in self.inputs)

    def _in_profile(self, name: str, shape: tuple[int, ...], given: tuple[int, ...]) -> bool:
        if -1 not in shape:
            return True
        low, _, high = self._engine.get_tensor_profile_shape(name, 0)
        return all(a <= b <= c for a, b, c in zip(tuple(low), given, tuple(high), strict=True))

    def _allowed(self, name: str, shape: tuple[int, ...]) -> str:
        if -1 not in shape:
            return str(list(shape))
        low, _, high = self._engine.get_tensor_profile_shape(name, 0)
        return f"{list(low)} to {list(high)}"

    def _bind(self, shapes: Shapes) -> None:
        """Buffers and addresses for these input shapes, in place of the ones before."""
        self._binding.resources.close()
        self._binding = _Binding((), {}, contextlib.ExitStack())
        for name, shape in shapes:
            self._must(self._context.set_input_shape(name, shape), "set_input_shape")
        unknown = self._context.infer_shapes()
        if unknown:
            raise UserError(f"{self.path.name}: the shape of {', '.join(unknown)} stays open.", exit_code=1)
        buffers = {}
        with contextlib.ExitStack() as stack:
            for name, (_, dtype) in (self.inputs | self.outputs).items():
                shape = tuple(self._context.get_tensor_shape(name))
                buffers[name] = _buffer(self.cuda, shape, dtype, stack)
                self._must(self._context.set_tensor_address(name, buffers[name].address), "set_tensor_address")
            self._binding = _Binding(shapes, buffers, stack.pop_all())

    def _capture(self, binding: _Binding) -> None:
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

    def _launch(self, binding: _Binding) -> None:
        if binding.graph is None:
            self._enqueue()
        else:
            self.cuda.launch(binding.graph, self._stream)

    def _enqueue(self) -> None:
        self._must(self._context.execute_async_v3(self.cuda.stream_address(self._stream)), "execute_async_v3")

    def _copy_in(self, binding: _Binding) -> None:
        for name in self.inputs:
            self.cuda.copy_in(binding.buffers[name].address, binding.buffers[name].pinned, self._stream)

    def _copy_out(self, binding: _Binding) -> None:
        for name in self.outputs:
            self.cuda.copy_out(binding.buffers[name].pinned, binding.buffers[name].address, self._stream)

    def _must(self, done: bool, call: str) -> None:
        if not done:
            raise UserError(f"{self.path.name}: {call} failed: {self._messages.why()}.", exit_code=1)

    def _drop(self) -> None:
        # In this order, and before the context of CUDA goes: each needs the next.
        for name in ("_events", "_stream", "_context", "_engine", "_runtime"):
            self.__dict__.pop(name, None)


@dataclass(frozen=True)
class _Buffer:
    """Device memory and its page-locked partner; `array` is that one as the tensor's shape and type."""

    address: int
    pinned: NDArray[np.uint8]
    array: NDArray[Any]


@dataclass
class _Binding:
    """The buffers of every tensor for one set of input shapes, and the CUDA graph captured with their addresses."""

    shapes: Shapes
    buffers: dict[str, _Buffer]
    resources: contextlib.ExitStack
    graph: Any = None


def _buffer(cuda: Cuda, shape: tuple[int, ...], dtype: np.dtype[Any], stack: contextlib.ExitStack) -> _Buffer:
    size = max(1, math.prod(shape)) * dtype.itemsize
    address = cuda.allocate(size)
    stack.callback(cuda.free, address)
    pinned = cuda.allocate_pinned(size)
    stack.callback(cuda.free_pinned, pinned)
    return _Buffer(address, pinned, pinned.view(dtype)[: math.prod(shape)].reshape(shape))


Tensors = dict[str, tuple[tuple[int, ...], "np.dtype[Any]"]]


def _tensors(trt: TensorRT, engine: ICudaEngine) -> tuple[Tensors, Tensors]:
    inputs: Tensors = {}
    outputs: Tensors = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = engine.get_tensor_dtype(name).name
        if kind not in _TYPES:
            raise UserError(f"tensor {name} is {kind}, which numpy does not hold: export it with a Cast to float.")
        is_input = engine.get_tensor_mode(name) == trt.module.TensorIOMode.INPUT
        (inputs if is_input else outputs)[name] = (tuple(engine.get_tensor_shape(name)), np.dtype(_TYPES[kind]))
    return inputs, outputs
