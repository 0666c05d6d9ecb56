"""The CUDA calls in use over pycuda, which is imported when a `PyCuda` is made. It has no CUDA graphs."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.deploy.cuda.interface import (
    DRIVER,
    Cuda,
    Device,
    NotInstalled,
    cuda_version,
    driver_version,
    failure,
    imported,
)
from faqd.errors import UserError, first_line


class PyCuda(Cuda):
    name = "pycuda"
    has_graphs = False

    def __init__(self) -> None:
        try:
            self._driver = imported("pycuda.driver")
        except NotInstalled as error:
            # pycuda is linked against the driver: without it, the import fails and names libcuda.
            if "libcuda" in str(error):
                raise UserError(f"no NVIDIA driver found ({error}). {DRIVER}") from error
            raise
        self._memory: dict[int, Any] = {}
        with self._errors():
            self._device, self._context = _device_and_context()
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
def _device_and_context() -> tuple[Any, Any]:
    """The first GPU and its primary context, one for the process: pycuda's detach would pop that of another user."""
    driver = importlib.import_module("pycuda.driver")
    driver.init()
    device = driver.Device(0)
    context = device.retain_primary_context()
    atexit.register(context.detach)  # Left to its destructor, pycuda takes the wrong call and complains.
    return device, context
