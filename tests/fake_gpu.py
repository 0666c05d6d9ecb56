"""A GPU and a TensorRT made of Python, for what the runtime itself decides: binding, order, shapes, and who frees what.

Device memory is a dictionary of bytes by address, a stream runs at once, and an engine is a Python function. That its
names are those of the real libraries is tested apart, in test_bindings.py and test_runtime_without_gpu.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from faqd.deploy.cuda.interface import Cuda, Device
from faqd.deploy.engine.trt import TensorRT
from faqd.deploy.runtime import runtime
from faqd.errors import UserError

GPU = Device("Fake GPU", "8.7", 1 << 33, "580.1", "13.0")


class FakeCuda(Cuda):
    """Counts what is taken and given back. fails: calls that raise, with their text; `name#n` is the n-th of them."""

    name = "fake"
    has_graphs = True

    def __init__(self) -> None:
        self.memory: dict[int, bytearray] = {}
        self.pinned: dict[int, NDArray[np.uint8]] = {}
        self.streams: set[str] = set()
        self.events: dict[str, float] = {}
        self.graphs: list[list[Callable[[], None]]] = []
        self.closed = False
        self.shared = False
        self.log: list[str] = []
        self.fails: dict[str, str] = {}
        self.capturing: list[Callable[[], None]] | None = None
        self._calls: dict[str, int] = {}
        self._next = 1 << 40

    def held(self) -> dict[str, int]:
        """What has not been given back."""
        kinds = ("memory", "pinned", "streams", "events", "graphs")
        return {kind: len(getattr(self, kind)) for kind in kinds if getattr(self, kind)}

    def _did(self, call: str) -> None:
        assert not self.closed, f"{call} after close"
        self.log.append(call)
        self._calls[call] = self._calls.get(call, 0) + 1
        for key in (call, f"{call}#{self._calls[call]}"):
            if key in self.fails:
                raise UserError(self.fails[key], exit_code=1)

    def device(self) -> Device:
        self._did("device")
        return GPU

    def allocate(self, size: int) -> int:
        assert size > 0
        self._did("allocate")
        self._next += 1 << 20
        self.memory[self._next] = bytearray(b"\xee" * size)
        return self._next

    def free(self, address: int) -> None:
        del self.memory[address]
        self._did("free")

    def allocate_pinned(self, size: int) -> NDArray[np.uint8]:
        self._did("allocate_pinned")
        array = np.full(size, 0xEE, np.uint8)
        self.pinned[array.ctypes.data] = array
        return array

    def allocate_mapped(self, size: int) -> tuple[NDArray[np.uint8], int]:
        self._did("allocate_mapped")
        data = bytearray(b"\xee" * size)
        array = np.frombuffer(data, np.uint8)
        self.pinned[array.ctypes.data] = array
        self.memory[array.ctypes.data] = data
        return array, array.ctypes.data

    def shares_memory(self) -> bool:
        return self.shared

    def free_pinned(self, array: NDArray[np.uint8]) -> None:
        del self.pinned[array.ctypes.data]
        self.memory.pop(array.ctypes.data, None)
        self._did("free_pinned")

    def copy_in(self, address: int, array: NDArray[np.uint8], stream: Any) -> None:
        assert stream in self.streams and array.ctypes.data in self.pinned
        self._did("copy_in")
        self.memory[address][:] = array.tobytes()

    def copy_out(self, array: NDArray[np.uint8], address: int, stream: Any) -> None:
        assert stream in self.streams and array.ctypes.data in self.pinned
        self._did("copy_out")
        array[:] = np.frombuffer(self.memory[address], np.uint8)

    def stream(self) -> Any:
        self._did("stream")
        name = f"stream {len(self.log)}"
        self.streams.add(name)
        return name

    def stream_address(self, stream: Any) -> int:
        assert stream in self.streams
        return 77

    def synchronize(self, stream: Any) -> None:
        assert stream in self.streams
        self._did("synchronize")

    def free_stream(self, stream: Any) -> None:
        self.streams.remove(stream)
        self._did("free_stream")

    def follow(self, stream: Any, event: Any) -> None:
        assert stream in self.streams and event in self.events
        self._did("follow")

    def event(self, *, blocking: bool = False) -> Any:
        self._did("event")
        name = f"event {len(self.log)}"
        self.events[name] = math.nan
        return name

    def record(self, event: Any, stream: Any) -> None:
        assert stream in self.streams and event in self.events
        self._did("record")
        self.events[event] = float(len(self.log))

    def wait_for(self, event: Any) -> None:
        assert not math.isnan(self.events[event]), "never recorded"
        self._did("wait_for")

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """As many ms as there were calls between."""
        return self.events[end] - self.events[start]

    def free_event(self, event: Any) -> None:
        del self.events[event]
        self._did("free_event")

    def capture(self, stream: Any, work: Callable[[], None]) -> Any:
        self._did("capture")
        self.capturing = []
        try:
            work()
            self.graphs.append(self.capturing)
            return self.capturing
        finally:
            self.capturing = None

    def launch(self, graph: Any, stream: Any) -> None:
        assert graph in self.graphs
        self._did("launch")
        for work in graph:
            work()

    def free_graph(self, graph: Any) -> None:
        self.graphs.remove(graph)
        self._did("free_graph")

    def close(self) -> None:
        self._did("close")
        self.closed = True


class Kind(Enum):
    """The data types of TensorRT that tests use."""

    FLOAT, HALF, INT8, UINT8, INT32, INT64, BOOL, BF16 = range(8)


TYPES = {
    Kind.FLOAT: np.float32,
    Kind.HALF: np.float16,
    Kind.INT8: np.int8,
    Kind.UINT8: np.uint8,
    Kind.INT32: np.int32,
    Kind.INT64: np.int64,
    Kind.BOOL: np.bool_,
}


class Mode(Enum):
    INPUT, OUTPUT = range(2)


class Layout(Enum):
    LINEAR, CHW32 = range(2)


class Place(Enum):
    DEVICE, HOST = range(2)


@dataclass
class Io:
    """One tensor of a fake engine. low, high: of its profile."""

    name: str
    mode: Mode
    shape: tuple[int, ...]
    kind: Kind = Kind.FLOAT
    low: tuple[int, ...] = ()
    high: tuple[int, ...] = ()
    layout: Layout = Layout.LINEAR
    place: Place = Place.DEVICE


@dataclass
class FakeNetwork:
    """What the engine computes. shapes: from the shapes of the inputs by name to those of the outputs."""

    tensors: list[Io]
    compute: Callable[..., dict[str, NDArray[Any]]]
    shapes: Callable[..., dict[str, tuple[int, ...]]]
    fails: set[str] = field(default_factory=set)


class FakeEngine:
    device_memory_size_v2 = 4096
    num_aux_streams = 0

    def __init__(self, network: FakeNetwork, cuda: FakeCuda) -> None:
        self._network, self._cuda = network, cuda
        self._tensors = {tensor.name: tensor for tensor in network.tensors}

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_dtype(self, name: str) -> Kind:
        return self._tensors[name].kind

    def get_tensor_mode(self, name: str) -> Mode:
        return self._tensors[name].mode

    def get_tensor_format(self, name: str) -> Layout:
        return self._tensors[name].layout

    def get_tensor_location(self, name: str) -> Place:
        return self._tensors[name].place

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        tensor = self._tensors[name]
        return [tensor.low, tensor.low, tensor.high]

    def create_execution_context(self) -> FakeContext | None:
        return None if "context" in self._network.fails else FakeContext(self._network, self._cuda)


class FakeContext:
    def __init__(self, network: FakeNetwork, cuda: FakeCuda) -> None:
        self._network, self._cuda = network, cuda
        self._given: dict[str, tuple[int, ...]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self.profiler: FakeTensorRT.IProfiler | None = None

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._given[name] = shape
        return "set_input_shape" not in self._network.fails

    def infer_shapes(self) -> list[str]:
        self._shapes = self._given | self._network.shapes(**self._given)
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address in self._cuda.memory
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 77
        self._cuda.log.append("execute")
        if self._cuda.capturing is not None:
            if "capture" in self._network.fails:
                return False
            self._cuda.capturing.append(self._compute)
            return True
        if "execute" in self._network.fails:
            return False
        self._compute()
        if self.profiler is not None:
            self.profiler.report_layer_time("reformat", 0.25)
            self.profiler.report_layer_time("conv", 0.5)
        return True

    def _compute(self) -> None:
        feeds = {}
        for tensor in self._network.tensors:
            if tensor.mode == Mode.INPUT:
                flat: NDArray[Any] = np.frombuffer(self._cuda.memory[self._addresses[tensor.name]], TYPES[tensor.kind])
                shape = self._shapes[tensor.name]
                feeds[tensor.name] = flat[: math.prod(shape)].reshape(shape)
        for name, value in self._network.compute(**feeds).items():
            data = np.ascontiguousarray(value).tobytes()
            self._cuda.memory[self._addresses[name]][: len(data)] = data


class FakeTensorRT:
    """Stands for the module `tensorrt`."""

    __version__ = "10.13.3"
    TensorIOMode, TensorFormat, TensorLocation = Mode, Layout, Place

    class IProfiler:
        def report_layer_time(self, layer_name: str, ms: float) -> None:
            raise NotImplementedError

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = "internal error", "error", "warning"

    def __init__(self, network: FakeNetwork, cuda: FakeCuda) -> None:
        self._network, self._cuda = network, cuda

    def Runtime(self, log: Any) -> Any:
        network, cuda = self._network, self._cuda

        class Runtime:
            def deserialize_cuda_engine(self, plan: bytes) -> FakeEngine | None:
                if "deserialize" in network.fails:
                    log.log("error", "Magic tag does not match")
                    return None
                return FakeEngine(network, cuda)

        return Runtime()


@contextmanager
def fake_gpu(network: FakeNetwork, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """The runtime meets this network, whatever file it is asked to load."""
    cuda = FakeCuda()
    trt = TensorRT("tensorrt", FakeTensorRT(network, cuda))
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "open_cuda", lambda backend: cuda)
        patch.setattr(runtime, "installed", lambda *_: trt)
        yield cuda


def engine_file(folder: Path) -> Path:
    """A file to load with trust; its bytes do not matter here."""
    path = folder / "net.engine"
    path.write_bytes(b"plan")
    return path
