"""The few facts that NVML has of a GPU, through nvidia-ml-py where it is installed (its module is called pynvml)."""

from __future__ import annotations

import importlib
from typing import Any

INSTALL = "pip install nvidia-ml-py"


class NoNvml(Exception):
    """NVML cannot be asked; the text says why."""


class Gpu:
    """One GPU. A value that NVML does not have there, as most on Jetson Orin, is None."""

    def __init__(self, module: Any, handle: Any) -> None:
        self._nvml, self._handle = module, handle

    def power_w(self) -> float | None:
        return _scaled(self._asked("nvmlDeviceGetPowerUsage"), 1e-3)

    def energy_j(self) -> float | None:
        """Since the driver was loaded."""
        return _scaled(self._asked("nvmlDeviceGetTotalEnergyConsumption"), 1e-3)

    def power_limit_w(self) -> float | None:
        return _scaled(self._asked("nvmlDeviceGetEnforcedPowerLimit"), 1e-3)

    def clock_mhz(self, which: str) -> float | None:
        """which: SM or MEM."""
        return _scaled(self._asked("nvmlDeviceGetClockInfo", getattr(self._nvml, f"NVML_CLOCK_{which}")), 1.0)

    def temperature_c(self) -> float | None:
        return _scaled(self._asked("nvmlDeviceGetTemperature", self._nvml.NVML_TEMPERATURE_GPU), 1.0)

    def _asked(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except (AttributeError, self._nvml.NVMLError):
            return None


def open_gpu(name: str) -> Gpu:
    """The GPU of this name; NoNvml where it is not known which one is meant, or NVML cannot be asked."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        raise NoNvml(f"NVML needs nvidia-ml-py, which is not installed: {INSTALL}") from None
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        named = [handle for handle in handles if _text(nvml.nvmlDeviceGetName(handle)) == name]
    except nvml.NVMLError as error:
        raise NoNvml(f"NVML cannot be asked here: {error}") from error
    if len(named) != 1:
        raise NoNvml(f"NVML lists {len(named)} GPUs called {name!r}, so it is not known which one computes")
    return Gpu(nvml, named[0])


def _scaled(value: Any, factor: float) -> float | None:
    return None if value is None else float(value) * factor


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
