"""What this project asks of CUDA: one GPU, buffers, copies, a stream, events, a graph.

cuda_bindings.py and pycuda.py do it, each over the binding of its name; cuda.py takes one of them. The bindings are
imported when a `Cuda` is made, so these modules load on a machine without either.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.errors import UserError, first_line
from faqd.extras import install


def how_to_install() -> str:
    return f"{install('device')} (cuda-bindings), or {install('pycuda')} (compiled on this machine)"


DRIVER = (
    "Engines run only on an NVIDIA GPU with its driver (in a container: started with the NVIDIA runtime); "
    "without one, the bench measures with onnxruntime on the CPU."
)


@dataclass(frozen=True)
class Device:
    """The GPU in use. driver: the version of its kernel module where Linux tells; cuda: the newest CUDA it runs."""

    name: str
    compute_capability: str
    memory_bytes: int
    driver: str | None
    cuda: str


class Cuda(ABC):
    """One GPU and its primary context. Handles are the binding's own objects; device memory is a plain address.

    A failing call raises UserError with the call's name and CUDA's message. Give back what you take, then `close`.
    """

    name: str
    has_graphs: bool

    @abstractmethod
    def device(self) -> Device: ...

    @abstractmethod
    def allocate(self, size: int) -> int:
        """Device memory of `size` bytes."""

    @abstractmethod
    def free(self, address: int) -> None: ...

    @abstractmethod
    def allocate_pinned(self, size: int) -> NDArray[np.uint8]:
        """Page-locked host memory, from and to which copies are asynchronous."""

    @abstractmethod
    def allocate_mapped(self, size: int) -> tuple[NDArray[np.uint8], int]:
        """Page-locked host memory, and the address at which the GPU reads and writes it without a copy."""

    @abstractmethod
    def shares_memory(self) -> bool:
        """Whether the GPU and the host have one memory, as on a Jetson: only there mapped memory costs no transfer."""

    @abstractmethod
    def free_pinned(self, array: NDArray[np.uint8]) -> None:
        """After this the array must not be touched."""

    @abstractmethod
    def copy_in(self, address: int, array: NDArray[np.uint8], stream: Any) -> None:
        """Host to device, as part of `stream`."""

    @abstractmethod
    def copy_out(self, array: NDArray[np.uint8], address: int, stream: Any) -> None:
        """Device to host, as part of `stream`."""

    @abstractmethod
    def stream(self) -> Any: ...

    @abstractmethod
    def stream_address(self, stream: Any) -> int:
        """What TensorRT takes as a stream."""

    @abstractmethod
    def synchronize(self, stream: Any) -> None: ...

    @abstractmethod
    def free_stream(self, stream: Any) -> None: ...

    @abstractmethod
    def follow(self, stream: Any, event: Any) -> None:
        """What is put on `stream` from now on waits until `event` has passed."""

    @abstractmethod
    def event(self, *, blocking: bool = False) -> Any:
        """blocking: a host that waits for it sleeps; otherwise it spins."""

    @abstractmethod
    def record(self, event: Any, stream: Any) -> None: ...

    @abstractmethod
    def wait_for(self, event: Any) -> None:
        """Until the event has passed."""

    @abstractmethod
    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Between two events that were recorded and have passed."""

    @abstractmethod
    def free_event(self, event: Any) -> None: ...

    def capture(self, stream: Any, work: Callable[[], None]) -> Any:
        """The CUDA graph of what `work` puts on `stream`; nothing is run."""
        raise UserError(f"{self.name} has no CUDA graphs: use cuda-bindings ({how_to_install()}).")

    def launch(self, graph: Any, stream: Any) -> None:
        raise UserError(f"{self.name} has no CUDA graphs: use cuda-bindings ({how_to_install()}).")

    def free_graph(self, graph: Any) -> None:
        return None

    @abstractmethod
    def close(self) -> None:
        """Let go of the context."""


NO_GPU = ("CUDA_ERROR_NO_DEVICE", "CUDA_ERROR_STUB_LIBRARY", "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH")


def failure(text: str, no_gpu: bool) -> UserError:
    if no_gpu:
        return UserError(f"no usable NVIDIA GPU ({text}). {DRIVER}")
    cure = " Take a smaller batch, or free GPU memory." if "out of memory" in text else ""
    return UserError(f"CUDA: {text}.{cure}", exit_code=1)


def driver_version() -> str | None:
    path = Path("/sys/module/nvidia/version")
    return path.read_text(encoding="ascii").strip() if path.is_file() else None


def cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


class NotInstalled(Exception):
    """A binding cannot be imported; the next one may."""


def imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotInstalled(first_line(error)) from error
