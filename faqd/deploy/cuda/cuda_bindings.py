"""The CUDA calls in use over cuda-bindings, which is imported when a `CudaBindings` is made."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.deploy.cuda.interface import DRIVER, NO_GPU, Cuda, Device, cuda_version, driver_version, failure, imported
from faqd.errors import UserError, first_line


class CudaBindings(Cuda):
    name = "cuda-bindings"
    has_graphs = True

    def __init__(self) -> None:
        self._driver = imported("cuda.bindings.driver")
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
