"""The few CUDA calls in use, over either binding: cuda-bindings, or pycuda (which has no CUDA graphs).

Both are imported when a `Cuda` is made, so this module loads on a machine without either.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.deploy.cuda.interface import (
    DRIVER,
    INSTALL,
    NO_GPU,
    Cuda,
    Device,
    cuda_version,
    driver_version,
    failure,
)
from faqd.errors import UserError, first_line

BACKENDS = ("cuda-bindings", "pycuda")
"""In the order in which they are tried."""

AUTO = "auto"
"""The first of them that is installed."""

VARIABLE = "FAQD_CUDA_BACKEND"


def open_cuda(backend: str | None = None) -> Cuda:
    """The first GPU through `backend`. Where that is `auto` or None, FAQD_CUDA_BACKEND decides, else the first binding
    that is installed. UserError where there is none, no driver, or no GPU."""
    missing = []
    for name in _candidates(backend):
        try:
            return _CudaBindings() if name == "cuda-bindings" else _PyCuda()
        except _NotInstalled as error:
            missing.append(f"{name}: {error}")
    raise UserError(f"no CUDA binding can be imported ({'; '.join(missing)}): {INSTALL}. {DRIVER}")


def device_or_none(backend: str | None = None) -> tuple[Device | None, str]:
    """The GPU in use, or None and the reason."""
    _candidates(backend)  # A misspelt back end is no missing GPU.
    try:
        with contextlib.closing(open_cuda(backend)) as cuda:
            return cuda.device(), ""
    except UserError as error:
        return None, str(error)


def _candidates(backend: str | None) -> tuple[str, ...]:
    wanted = os.environ.get(VARIABLE, AUTO) if backend in (None, AUTO) else backend
    if wanted in ("", AUTO):
        return BACKENDS
    if wanted not in BACKENDS:
        raise UserError(f"CUDA back end {wanted!r}: choose {AUTO}, {' or '.join(BACKENDS)} (also in {VARIABLE}).")
    return (wanted,)


class _NotInstalled(Exception):
    """A binding cannot be imported; the next one may."""


class _CudaBindings(Cuda):
    name = "cuda-bindings"
    has_graphs = True

    def __init__(self) -> None:
        self._driver = _imported("cuda.bindings.driver")
        try:
            self._driver.cuInit(0)
        except RuntimeError as error:
            raise UserError(f"no NVIDIA driver found ({first_line(error)}). {DRIVER}") from error
        self._call("cuInit", 0)
        self._number = self._call("cuDeviceGet", 0)
        # The primary context is the one that TensorRT's own CUDA runtime uses. Pushed, not set: several may be open,
        # and closing one must leave it to the others.
        context = self._call("cuDevicePrimaryCtxRetain", self._number)
        try:
            self._call("cuCtxPushCurrent", context)
        except UserError:
            self._driver.cuDevicePrimaryCtxRelease(self._number)
            raise

    def _call(self, function: str, *arguments: Any) -> Any:
        try:
            status, *values = getattr(self._driver, function)(*arguments)
        except RuntimeError as error:  # The library of the driver is older than the bindings and lacks the function.
            raise UserError(
                f"CUDA: the driver here has no {function} ({first_line(error)}): install the cuda-bindings of its CUDA "
                "version, 12.x on JetPack 6."
            ) from error
        if int(status) != 0:
            name, text = (self._text(call, status) for call in ("cuGetErrorName", "cuGetErrorString"))
            raise failure(f"{function} failed: {name}: {text}", name in NO_GPU)
        return values[0] if values else None

    def _text(self, function: str, status: Any) -> str:
        _, text = getattr(self._driver, function)(status)
        return text.decode() if isinstance(text, bytes) else str(text)

    def device(self) -> Device:
        attribute = self._driver.CUdevice_attribute
        major = self._call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, self._number)
        minor = self._call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, self._number)
        name = self._call("cuDeviceGetName", 256, self._number).split(b"\0")[0].decode()
        memory = int(self._call("cuDeviceTotalMem", self._number))
        version = int(self._call("cuDriverGetVersion"))
        return Device(name, f"{major}.{minor}", memory, driver_version(), cuda_version(version))

    def allocate(self, size: int) -> int:
        return int(self._call("cuMemAlloc", size))

    def free(self, address: int) -> None:
        self._call("cuMemFree", address)

    def allocate_pinned(self, size: int) -> NDArray[np.uint8]:
        address = int(self._call("cuMemHostAlloc", size, 0))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def allocate_mapped(self, size: int) -> tuple[NDArray[np.uint8], int]:
        host = int(self._call("cuMemHostAlloc", size, self._driver.CU_MEMHOSTALLOC_DEVICEMAP))
        try:
            address = int(self._call("cuMemHostGetDevicePointer", host, 0))
        except UserError:
            self._call("cuMemFreeHost", host)
            raise
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(host)), address

    def shares_memory(self) -> bool:
        integrated = self._driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED
        return bool(self._call("cuDeviceGetAttribute", integrated, self._number))

    def free_pinned(self, array: NDArray[np.uint8]) -> None:
        self._call("cuMemFreeHost", array.ctypes.data)

    def copy_in(self, address: int, array: NDArray[np.uint8], stream: Any) -> None:
        self._call("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, stream)

    def copy_out(self, array: NDArray[np.uint8], address: int, stream: Any) -> None:
        self._call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, stream)

    def stream(self) -> Any:
        # Non-blocking: the legacy default stream would make itself part of a capture.
        return self._call("cuStreamCreate", int(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING))

    def stream_address(self, stream: Any) -> int:
        return int(stream)

    def synchronize(self, stream: Any) -> None:
        self._call("cuStreamSynchronize", stream)

    def free_stream(self, stream: Any) -> None:
        self._call("cuStreamDestroy", stream)

    def follow(self, stream: Any, event: Any) -> None:
        self._call("cuStreamWaitEvent", stream, event, 0)

    def event(self, *, blocking: bool = False) -> Any:
        flags = self._driver.CUevent_flags
        return self._call("cuEventCreate", int(flags.CU_EVENT_BLOCKING_SYNC if blocking else flags.CU_EVENT_DEFAULT))

    def record(self, event: Any, stream: Any) -> None:
        self._call("cuEventRecord", event, stream)

    def wait_for(self, event: Any) -> None:
        self._call("cuEventSynchronize", event)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(self._call("cuEventElapsedTime", start, end))

    def free_event(self, event: Any) -> None:
        self._call("cuEventDestroy", event)

    def capture(self, stream: Any, work: Callable[[], None]) -> Any:
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", stream, mode)
        try:
            work()
        except BaseException:
            with contextlib.suppress(UserError):  # A stream left in capture could do nothing else.
                self._call("cuGraphDestroy", self._call("cuStreamEndCapture", stream))
            raise
        graph = self._call("cuStreamEndCapture", stream)
        try:
            return self._call("cuGraphInstantiate", graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)

    def launch(self, graph: Any, stream: Any) -> None:
        self._call("cuGraphLaunch", graph, stream)

    def free_graph(self, graph: Any) -> None:
        self._call("cuGraphExecDestroy", graph)

    def close(self) -> None:
        self._call("cuCtxPopCurrent")
        self._call("cuDevicePrimaryCtxRelease", self._number)


class _PyCuda(Cuda):
    name = "pycuda"
    has_graphs = False

    def __init__(self) -> None:
        try:
            self._driver = _imported("pycuda.driver")
        except _NotInstalled as error:
            # pycuda is linked against the driver: without it, the import fails and names libcuda.
            if "libcuda" in str(error):
                raise UserError(f"no NVIDIA driver found ({error}). {DRIVER}") from error
            raise
        self._memory: dict[int, Any] = {}
        with self._errors():
            self._device, self._context = _pycuda_device()
            self._context.push()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """pycuda's texts begin with the name of the call: `cuInit failed: no CUDA-capable device is detected`."""
        try:
            yield
        except (self._driver.Error, self._driver.MemoryError) as error:
            text = first_line(error)
            raise failure(text, text.startswith("cuInit failed")) from error

    def device(self) -> Device:
        attribute = self._driver.device_attribute
        with self._errors():
            major = self._device.get_attribute(attribute.COMPUTE_CAPABILITY_MAJOR)
            minor = self._device.get_attribute(attribute.COMPUTE_CAPABILITY_MINOR)
            name, memory = self._device.name(), self._device.total_memory()
            version = self._driver.get_driver_version()
        return Device(name, f"{major}.{minor}", int(memory), driver_version(), cuda_version(version))

    def allocate(self, size: int) -> int:
        with self._errors():
            memory = self._driver.mem_alloc(size)
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        with self._errors():
            self._memory.pop(address).free()

    def allocate_pinned(self, size: int) -> NDArray[np.uint8]:
        with self._errors():
            array: NDArray[np.uint8] = self._driver.pagelocked_empty(size, np.uint8)
        return array

    def allocate_mapped(self, size: int) -> tuple[NDArray[np.uint8], int]:
        with self._errors():
            flags = self._driver.host_alloc_flags.DEVICEMAP
            array: NDArray[np.uint8] = self._driver.pagelocked_empty(size, np.uint8, mem_flags=flags)
            return array, int(array.base.get_device_pointer())  # type: ignore[union-attr]

    def shares_memory(self) -> bool:
        with self._errors():
            return bool(self._device.get_attribute(self._driver.device_attribute.INTEGRATED))

    def free_pinned(self, array: NDArray[np.uint8]) -> None:
        with self._errors():
            array.base.free()  # type: ignore[union-attr]

    def copy_in(self, address: int, array: NDArray[np.uint8], stream: Any) -> None:
        with self._errors():
            self._driver.memcpy_htod_async(address, array, stream)

    def copy_out(self, array: NDArray[np.uint8], address: int, stream: Any) -> None:
        with self._errors():
            self._driver.memcpy_dtoh_async(array, address, stream)

    def stream(self) -> Any:
        with self._errors():
            return self._driver.Stream()

    def stream_address(self, stream: Any) -> int:
        return int(stream.handle)

    def synchronize(self, stream: Any) -> None:
        with self._errors():
            stream.synchronize()

    def free_stream(self, stream: Any) -> None:
        return None  # pycuda gives it back with the object.

    def follow(self, stream: Any, event: Any) -> None:
        with self._errors():
            stream.wait_for_event(event)

    def event(self, *, blocking: bool = False) -> Any:
        flags = self._driver.event_flags
        with self._errors():
            return self._driver.Event(flags.BLOCKING_SYNC if blocking else flags.DEFAULT)

    def record(self, event: Any, stream: Any) -> None:
        with self._errors():
            event.record(stream)

    def wait_for(self, event: Any) -> None:
        with self._errors():
            event.synchronize()

    def elapsed_ms(self, start: Any, end: Any) -> float:
        with self._errors():
            return float(start.time_till(end))

    def free_event(self, event: Any) -> None:
        return None  # As with streams.

    def close(self) -> None:
        with self._errors():
            self._context.pop()


@functools.cache
def _pycuda_device() -> tuple[Any, Any]:
    """The first GPU and its primary context, one for the process: pycuda's detach would pop that of another user."""
    driver = importlib.import_module("pycuda.driver")
    driver.init()
    device = driver.Device(0)
    context = device.retain_primary_context()
    atexit.register(context.detach)  # Left to its destructor, pycuda takes the wrong call and complains.
    return device, context


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _NotInstalled(first_line(error)) from error
