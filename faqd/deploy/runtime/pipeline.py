"""Queries of one set of arrays, submitted one after the other or ahead of each other, timed by trtexec's definitions.

trtexec keeps a query in flight while it submits the next one: copies in, kernels and copies out each have a stream of
their own, so that the copies of one query run beside the kernels of another. With one slot it is a closed loop.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from faqd.deploy.cuda.interface import Cuda
from faqd.deploy.engine.trt import IExecutionContext, TensorRT, heard
from faqd.deploy.runtime.binding import (
    Buffer,
    buffers_for,
    giving_back,
    must,
    refuse_zero_copy,
    set_addresses,
    set_shapes,
    taken,
)
from faqd.deploy.runtime.signature import Arrays, Signature, checked_shapes
from faqd.errors import UserError


class QueryTimes(NamedTuple):
    """One query in ms. Starts count from the last `begin`, enqueue on the host's clock, the others between CUDA events.

    Without transfers their times are zero, at the begin and end of the kernels.
    """

    start_enqueue_ms: float
    enqueue_ms: float
    start_h2d_ms: float
    h2d_ms: float
    start_compute_ms: float
    compute_ms: float
    start_d2h_ms: float
    d2h_ms: float

    @property
    def latency_ms(self) -> float:
        """Copies in, kernels and copies out; enqueue is host time and no part of it."""
        return self.h2d_ms + self.compute_ms + self.d2h_ms


@dataclass
class _Slot:
    """Buffers and events of one query in flight. h2d, compute, d2h: their two events each."""

    buffers: dict[str, Buffer]
    h2d: tuple[Any, Any]
    compute: tuple[Any, Any]
    d2h: tuple[Any, Any]
    graph: Any = None
    enqueued: tuple[float, float] = (0.0, 0.0)


class Streams:
    """Several pipelines of one engine, each with its context and streams, that compute side by side: queries are given
    to them in turn."""

    def __init__(self, pipelines: Sequence[Pipeline]) -> None:
        self._all = tuple(pipelines)
        self.slots = sum(pipeline.slots for pipeline in pipelines)
        self.cuda_graph = all(pipeline.cuda_graph for pipeline in pipelines)
        self._submitted = self._collected = 0

    def begin(self) -> None:
        """Starts count from now, of all of them. Nothing may be in flight."""
        self._submitted = self._collected = 0
        for pipeline in self._all:
            pipeline.begin()

    def submit(self) -> None:
        self._all[self._submitted % len(self._all)].submit()
        self._submitted += 1

    def collect(self) -> QueryTimes:
        times = self._all[self._collected % len(self._all)].collect()
        self._collected += 1
        return times


class Pipeline:
    """Made by Engine.pipeline, for use in a `with` block; it has an execution context of its own.

    cuda_graph: whether the kernels really are launched as one CUDA graph. slots: queries that can be in flight. With
    zero_copy the kernels work on the host's memory, so that there is nothing to transfer.
    """

    def __init__(
        self,
        path: Path,
        trt: TensorRT,
        cuda: Cuda,
        context: IExecutionContext,
        tensors: Signature,
        feeds: Arrays,
        *,
        slots: int,
        graph: bool,
        transfers: bool,
        spin: bool,
        zero_copy: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.slots = slots
        self.cuda_graph = graph
        self._name, self._trt, self._cuda = path.name, trt, cuda
        self._context = context
        self._inputs, self._outputs = list(tensors.inputs), list(tensors.outputs)
        self._transfers, self._zero_copy, self._clock = transfers and not zero_copy, zero_copy, clock
        if zero_copy:
            refuse_zero_copy(self._name, cuda)
        types = {name: tensor.dtype for name, tensor in (tensors.inputs | tensors.outputs).items()}
        with giving_back() as stack, heard(trt) as (_, self._messages):
            stack.callback(self.__dict__.pop, "_context")  # Before the engine that it belongs to goes.
            shapes = checked_shapes(self._name, tensors.inputs, feeds)
            set_shapes(self._name, context, shapes, self._messages)
            self._in, self._kernels, self._out = (taken(cuda.stream, cuda.free_stream, stack) for _ in range(3))
            # Waiting with a blocking event lets the processor sleep; a spinning one answers sooner.

            def event() -> Any:
                return taken(lambda: cuda.event(blocking=not spin), cuda.free_event, stack)

            self._origin = event()
            pairs = [[(event(), event()) for _ in range(3)] for _ in range(slots)]
            self._free = deque(
                _Slot(buffers_for(self._name, context, types, cuda, stack, zero_copy=zero_copy), *pair)
                for pair in pairs
            )
            self._in_flight: deque[_Slot] = deque()
            # The first thing to happen when they are given back: queries in flight still use them.
            stack.callback(self._wait_for_all)
            for slot in self._free:
                for name in self._inputs:
                    np.copyto(slot.buffers[name].array, feeds[name])
                self._prepare(slot, stack)
            self.begin()
            self._resources = stack.pop_all()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with contextlib.suppress(*([UserError] if error else [])):  # What went wrong first is what must be seen.
            self._resources.close()

    def begin(self) -> None:
        """Starts count from now."""
        self._cuda.record(self._origin, self._in)
        self._cuda.wait_for(self._origin)
        self._zero = self._clock()

    def submit(self) -> None:
        """Put one query on the device. There must be a slot free: at most `slots` queries are in flight."""
        slot = self._free.popleft()
        with heard(self._trt) as (_, self._messages):
            if self._transfers:
                self._copy_in(slot)
            self._cuda.record(slot.compute[0], self._kernels)
            before = self._clock()
            self._launch(slot)
            slot.enqueued = (before, self._clock())
            self._cuda.record(slot.compute[1], self._kernels)
            if self._transfers:
                self._copy_out(slot)
        self._in_flight.append(slot)

    def collect(self) -> QueryTimes:
        """Wait for the query that was submitted first, and read its times."""
        slot = self._in_flight.popleft()
        self._free.append(slot)
        self._cuda.wait_for((slot.d2h if self._transfers else slot.compute)[1])
        before, after = slot.enqueued
        start, compute = self._span(slot.compute)
        start_in, h2d = self._span(slot.h2d) if self._transfers else (start, 0.0)
        start_out, d2h = self._span(slot.d2h) if self._transfers else (start + compute, 0.0)
        enqueue = (before - self._zero) * 1e3, (after - before) * 1e3
        return QueryTimes(*enqueue, start_in, h2d, start, compute, start_out, d2h)

    def _span(self, events: tuple[Any, Any]) -> tuple[float, float]:
        # The duration between its own two events: CUDA counts ms in float32, which far from the origin is too coarse.
        return self._cuda.elapsed_ms(self._origin, events[0]), self._cuda.elapsed_ms(*events)

    def _copy_in(self, slot: _Slot) -> None:
        self._cuda.record(slot.h2d[0], self._in)
        for name in self._inputs:
            self._cuda.copy_in(slot.buffers[name].address, slot.buffers[name].pinned, self._in)
        self._cuda.record(slot.h2d[1], self._in)
        self._cuda.follow(self._kernels, slot.h2d[1])

    def _copy_out(self, slot: _Slot) -> None:
        self._cuda.follow(self._out, slot.compute[1])
        self._cuda.record(slot.d2h[0], self._out)
        for name in self._outputs:
            self._cuda.copy_out(slot.buffers[name].pinned, slot.buffers[name].address, self._out)
        self._cuda.record(slot.d2h[1], self._out)

    def _prepare(self, slot: _Slot, stack: contextlib.ExitStack) -> None:
        """One whole query, because TensorRT allocates during the first one and its inputs must be there even where
        transfers are not timed; then the kernels as one graph."""
        if not self._zero_copy:
            self._copy_in(slot)
        set_addresses(self._name, self._context, slot.buffers, self._messages)
        self._enqueue()
        self._cuda.synchronize(self._kernels)
        if not self.cuda_graph:
            return
        try:
            slot.graph = self._cuda.capture(self._kernels, self._enqueue)
        except UserError as error:
            self.cuda_graph = False
            warnings.warn(f"{self._name}: no CUDA graph, kernels are launched one by one: {error}", stacklevel=4)
            return
        stack.callback(self._cuda.free_graph, slot.graph)

    def _launch(self, slot: _Slot) -> None:
        if self.cuda_graph:
            self._cuda.launch(slot.graph, self._kernels)
            return
        if self.slots > 1:
            set_addresses(self._name, self._context, slot.buffers, self._messages)
        self._enqueue()

    def _enqueue(self) -> None:
        done = self._context.execute_async_v3(self._cuda.stream_address(self._kernels))
        must(done, self._name, "execute_async_v3", self._messages)

    def _wait_for_all(self) -> None:
        for stream in (self._in, self._kernels, self._out):
            self._cuda.synchronize(stream)
