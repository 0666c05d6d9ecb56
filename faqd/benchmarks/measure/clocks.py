"""Clocks, temperatures and power mode of the machine, from Linux and from NVML: what a timing depends on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from faqd.benchmarks.measure import nvml, sysfs

MOVED_ABOVE = 0.05
"""Relative change of a clock from which a report speaks of it."""

GPU = re.compile(r"gpu|gv11b|ga10b|gpc", re.IGNORECASE)


class Clocks:
    """Reads them again and again. sources: where from; status: why there is nothing, else None."""

    def __init__(self, gpu: str | None, root: Path = Path("/")) -> None:
        """gpu: the name of the one that computes, None for the CPU."""
        self._root = root
        self._nvml: nvml.Gpu | None = None
        reason = ""
        if gpu is not None:
            try:
                self._nvml = nvml.open_gpu(gpu)
            except nvml.NoNvml as error:
                reason = f"; {error}"
        first = self.read()
        self.sources = [name for name, there in (("sysfs", self._sysfs(first)), ("NVML", self._nvml)) if there]
        nothing = all(value is None or value == {} for value in first.values())
        self.status = f"no clocks and no temperatures under /sys{reason}" if nothing else None

    def to_json(self) -> dict[str, Any]:
        return {"status": self.status or "read", "sources": self.sources}

    def read(self) -> dict[str, Any]:
        """gpu_mhz, memory_mhz, cpu_mhz (the fastest core), temperature_c by zone, power_mode, power_w, power_limit_w;
        None where it is not to be had."""
        gpu = self._nvml
        zones = self._temperatures()
        heat = gpu.temperature_c() if gpu else None
        if heat is not None:
            zones = {**zones, "GPU": heat}
        return {
            "gpu_mhz": (gpu.clock_mhz("SM") if gpu else None) or self._gpu_mhz(),
            "memory_mhz": gpu.clock_mhz("MEM") if gpu else None,
            "cpu_mhz": self._cpu_mhz(),
            "temperature_c": zones,
            "power_mode": self._power_mode(),
            "power_w": gpu.power_w() if gpu else None,
            "power_limit_w": gpu.power_limit_w() if gpu else None,
        }

    @staticmethod
    def _sysfs(found: Mapping[str, Any]) -> bool:
        return found["cpu_mhz"] is not None or any(zone != "GPU" for zone in found["temperature_c"])

    def _gpu_mhz(self) -> float | None:
        folders = sorted((self._root / "sys/class/devfreq").glob("*"))
        values = [sysfs.number(folder / "cur_freq") for folder in folders if GPU.search(folder.name)]
        return max((value / 1e6 for value in values if value), default=None)

    def _cpu_mhz(self) -> float | None:
        files = (self._root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
        return max((value / 1e3 for value in map(sysfs.number, files) if value), default=None)

    def _temperatures(self) -> dict[str, float]:
        found = {}
        for folder in sorted((self._root / "sys/class/thermal").glob("thermal_zone*")):
            kind, value = sysfs.text(folder / "type"), sysfs.number(folder / "temp")
            if kind and value is not None and -40e3 < value < 200e3:  # A zone that is off says -256 degrees.
                found[kind] = value / 1e3
        return found

    def _power_mode(self) -> str | None:
        """What nvpmodel chose last, by the name that /etc/nvpmodel.conf gives it; else the governor of the CPU."""
        chosen = re.search(r"pmode:0*(\d+)", sysfs.text(self._root / "var/lib/nvpmodel/status") or "")
        if chosen:
            names: dict[str, str] = dict(
                re.findall(
                    r"POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>", sysfs.text(self._root / "etc/nvpmodel.conf") or ""
                )
            )
            return names.get(chosen[1], f"nvpmodel {chosen[1]}")
        governor = sysfs.text(self._root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
        return f"governor {governor}" if governor else None


def moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Sentences on clocks and power mode that changed while it was measured."""
    found = []
    for key, what in (("gpu_mhz", "GPU"), ("memory_mhz", "memory")):
        a, b = before[key], after[key]
        if a and b and abs(b / a - 1) > MOVED_ABOVE:
            found.append(f"the {what} clock moved from {a:.0f} to {b:.0f} MHz")
    if before["power_mode"] != after["power_mode"]:
        found.append(f"the power mode changed from {before['power_mode']} to {after['power_mode']}")
    return found
