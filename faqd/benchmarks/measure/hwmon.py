"""Power rails of a Jetson as Linux shows them under /sys/class/hwmon.

INA3221, on Orin: three channels, `in*_label`, `in*_input` in mV, `curr*_input` in mA. INA238, the system input of Thor:
`power1_input` in microwatts. Entries of USB-C ports hold negotiated values, not measured ones, and are passed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from faqd.benchmarks.measure import sysfs

HWMON = Path("sys/class/hwmon")
INPUT_OF_THOR = "VIN"
"""What the system input is called where its sensor has no label."""


@dataclass(frozen=True)
class Rail:
    """A supply whose power is measured. files: whose values, multiplied, are in units of `unit` watt."""

    name: str
    sensor: str
    files: tuple[Path, ...]
    unit: float
    interval_s: float | None
    """How often the sensor measures, where it tells."""

    def watts(self) -> float | None:
        """None while the sensor cannot be read, as when it is switched off for a moment."""
        product = 1.0
        for path in self.files:
            value = sysfs.number(path)
            if value is None:
                return None
            product *= value
        return product * self.unit


def rails(root: Path = Path("/")) -> list[Rail]:
    """Every measured rail, in the order of the sensors."""
    found = []
    for folder in sorted((root / HWMON).glob("hwmon*"), key=lambda path: int(path.name[5:] or 0)):
        chip = sysfs.text(folder / "name")
        if chip == "ina3221":
            found += _ina3221(folder)
        elif chip == "ina238":
            found += _ina238(folder)
    return [rail for rail in found if "USB" not in rail.name.upper() and rail.watts() is not None]


def _ina3221(folder: Path) -> list[Rail]:
    found = []
    for channel in (1, 2, 3):
        label = sysfs.text(folder / f"in{channel}_label")
        if label and label != "NC":
            files = (folder / f"in{channel}_input", folder / f"curr{channel}_input")
            found.append(Rail(label, "INA3221", files, 1e-6, _interval(folder)))
    return found


def _ina238(folder: Path) -> list[Rail]:
    label = sysfs.text(folder / "in1_label") or sysfs.text(folder / "label") or INPUT_OF_THOR
    return [Rail(label, "INA238", (folder / "power1_input",), 1e-6, _interval(folder))]


def _interval(folder: Path) -> float | None:
    value = sysfs.number(folder / "update_interval")
    return value / 1e3 if value else None
