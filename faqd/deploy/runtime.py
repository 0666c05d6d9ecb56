"""Runs an engine on numpy arrays: load, bind by tensor name, run, time. No torch.

with load_engine(Path("bundle/student.tensorrt.engine")) as engine:
    logits = engine.run({"images": images})["logits"]
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.deploy.cuda import open_cuda
from faqd.deploy.cuda_interface import Cuda
from faqd.deploy.record import check_gpu, check_version, rebuild, record_of
from faqd.deploy.signature import Arrays, Shape, Shapes, checked_shapes, signature
from faqd.deploy.trt import TensorRT, heard, installed
from faqd.errors import UserError


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
    `cuda-bindings`, `pycuda` or `auto`. graph: launch the kernels as one CUDA graph, captured once per shape; where
    that fails they are launched one by one, with a warning. UserError where the engine was changed, does not fit this
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
        return Engine(path, plan, trt, cuda, graph, stack.pop_all())


class Engine:
    """A loaded engine with its buffers; not for several threads. `inputs` and `outputs` give name -> (shape, dtype),
    where -1 is a free axis."""

    def __init__(
        self, path: Path, plan: bytes, trt: TensorRT, cuda: Cuda, graph: bool, stack: contextlib.ExitStack
    ) -> None:
        with giving_back() as taken:
            taken.callback(stack.close)
            taken.callback(self._drop)
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
            self._signature = signature(path, trt, self._engine)
            self.inputs = {name: (tensor.shape, tensor.dtype) for name, tensor in self._signature.inputs.items()}
            self.outputs = {name: (tensor.shape, tensor.dtype) for name, tensor in self._signature.outputs.items()}
            self._stream = _taken(cuda.stream, cuda.free_stream, taken)
            self._events = [_taken(cuda.event, cuda.free_event, taken) for _ in range(4)]
            self._graph = graph
            self._binding = _Binding(None, {}, contextlib.ExitStack())
            taken.callback(lambda: self._binding.resources.close())
            self._resources = taken.pop_all()

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
        self._binding = _Binding(None, {}, contextlib.ExitStack())
        for name, shape in shapes:
            self._must(self._context.set_input_shape(name, shape), f"set_input_shape({name}, {list(shape)})")
        try:
            unknown = self._context.infer_shapes()
        except RuntimeError as error:
            given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes)
            raise UserError(
                f"{self.path.name}: inputs of these shapes do not go together ({given}): {self._messages.why()}."
            ) from error
        if unknown:
            raise UserError(f"{self.path.name}: the shape of {', '.join(unknown)} stays open.", exit_code=1)
        buffers = {}
        with giving_back() as stack:
            for name, (_, dtype) in (self.inputs | self.outputs).items():
                shape = tuple(self._context.get_tensor_shape(name))
                if -1 in shape:
                    raise UserError(
                        f"{self.path.name}: the shape {list(shape)} of {name} depends on values, not on shapes alone; "
                        "such outputs are not run here.",
                        exit_code=1,
                    )
                buffers[name] = _buffer(self.cuda, shape, dtype, stack)
                self._must(self._context.set_tensor_address(name, buffers[name].address), f"set_tensor_address({name})")
            # The first thing to happen when they are given back: a query that was broken off may still use them.
            stack.callback(self.cuda.synchronize, self._stream)
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


@contextlib.contextmanager
def giving_back() -> Iterator[contextlib.ExitStack]:
    """A stack that is unwound if the block fails, and whose own failures then do not hide the reason: after a fault
    CUDA refuses every further call, freeing included."""
    stack = contextlib.ExitStack()
    try:
        yield stack
    except BaseException:
        with contextlib.suppress(UserError):
            stack.close()
        raise


def _taken(take: Callable[[], Any], give_back: Callable[[Any], None], stack: contextlib.ExitStack) -> Any:
    """What `take` returns; the stack gives it back."""
    thing = take()
    stack.callback(give_back, thing)
    return thing


@dataclass(frozen=True)
class _Buffer:
    """Device memory and its page-locked partner; `array` is that one as the tensor's shape and type."""

    address: int
    pinned: NDArray[np.uint8]
    array: NDArray[Any]


@dataclass
class _Binding:
    """The buffers of every tensor for one set of input shapes, and the CUDA graph captured with their addresses."""

    shapes: Shapes | None
    buffers: dict[str, _Buffer]
    resources: contextlib.ExitStack
    graph: Any = None


def _buffer(cuda: Cuda, shape: Shape, dtype: np.dtype[Any], stack: contextlib.ExitStack) -> _Buffer:
    size = max(1, math.prod(shape)) * dtype.itemsize
    address = _taken(lambda: cuda.allocate(size), cuda.free, stack)
    pinned = _taken(lambda: cuda.allocate_pinned(size), cuda.free_pinned, stack)
    return _Buffer(address, pinned, pinned.view(dtype)[: math.prod(shape)].reshape(shape))
