"""Energy and clocks: rails by their real names, NVML made of Python, and sums on a clock that the test turns."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from faqd.benchmarks.measure.clocks import Clocks, moved
from faqd.benchmarks.measure.energy import find_meter, measure
from faqd.benchmarks.measure.sustained import sustained
from faqd.errors import UserError
from tests.benchmarks.test_latency import Clock, Turns
from tests.fixtures.boards import AGX_ORIN, AGX_THOR, ORIN_NANO, board


@pytest.mark.parametrize(
    ("files", "name", "kind", "watts"),
    [
        (ORIN_NANO, "VDD_IN", "hwmon INA3221", 6.0),
        (AGX_ORIN, "VDD_GPU_SOC + VDD_CPU_CV", "hwmon INA3221", 5.7),
        (AGX_THOR, "VIN", "hwmon INA238", 31.0),
    ],
    ids=["Orin Nano", "AGX Orin", "AGX Thor"],
)
def test_the_rail_that_stands_for_the_module(
    tmp_path: Path, files: dict[str, str], name: str, kind: str, watts: float
) -> None:
    meter, reason = find_meter("Orin", root=board(tmp_path, files))
    assert meter is not None and reason == ""
    assert (meter.name, meter.kind) == (name, kind)
    assert meter.watts() == pytest.approx(watts)
    assert meter.interval_s == (0.2 if files is AGX_ORIN else 0.1)


def test_another_rail_is_taken_by_name_and_usb_is_none(tmp_path: Path) -> None:
    root = board(tmp_path, AGX_THOR)
    meter, _ = find_meter(None, "VDD_GPU", root)
    assert meter is not None and meter.watts() == pytest.approx(10.0)
    with pytest.raises(UserError, match=r"--power-rail USB-C VBUS: no such rail; here are VIN, VDD_GPU\."):
        find_meter(None, "USB-C VBUS", root)
    with pytest.raises(UserError, match="no power rail is to be seen here"):
        find_meter(None, "VDD_IN", tmp_path / "empty")


def test_rails_that_nobody_knows_are_no_measurement(tmp_path: Path) -> None:
    files = {key: text.replace("VDD_IN", "VDD_NEW") for key, text in ORIN_NANO.items()}
    meter, reason = find_meter(None, root=board(tmp_path, files))
    assert meter is None and "VDD_NEW, VDD_CPU_GPU_CV, VDD_SOC is known to stand" in reason


class FakeNvml(ModuleType):
    """nvidia-ml-py with one GPU. lacks: what it answers NotSupported to, as most on Orin."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self, *lacks: str, names: tuple[str, ...] = ("Some GPU",)) -> None:
        super().__init__("pynvml")
        self.lacks, self.names = lacks, names
        self.energy_mj = 1000.0

    def nvmlInit(self) -> None:
        if "init" in self.lacks:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return self.names[handle].encode()

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return self._known("power", 70_000)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        return self._known("energy", int(self.energy_mj))

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        return self._known("limit", 72_000)

    def nvmlDeviceGetClockInfo(self, handle: int, which: int) -> int:
        return self._known("clock", {1: 2040, 2: 6251}[which])

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return self._known("temperature", 61)

    def _known(self, what: str, value: int) -> int:
        if what in self.lacks:
            raise self.NVMLError("Not Supported")
        return value


@pytest.mark.parametrize(
    ("nvml", "reason"),
    [
        (None, "nvidia-ml-py, which is not installed: pip install nvidia-ml-py"),
        (FakeNvml("init"), "NVML cannot be asked here: Driver Not Loaded"),
        (FakeNvml(names=("Some GPU", "Some GPU")), "NVML lists 2 GPUs called 'Some GPU'"),
        (FakeNvml(names=("Other",)), "NVML lists 0 GPUs called 'Some GPU'"),
        (FakeNvml("power", "energy"), "it answers NotSupported"),
    ],
)
def test_no_energy_data_has_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None, reason: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter, said = find_meter("Some GPU", root=tmp_path)
    assert meter is None and reason in said
    assert find_meter(None, root=tmp_path) == (
        None,
        "no power rail under /sys/class/hwmon (a Jetson has some), and NVML measures GPUs only",
    )


class Supply:
    """Power that depends on whether a query ran since the last reading; a counter of energy where `counts`."""

    name, kind, interval_s = "VDD_IN", "test", 0.1

    def __init__(self, clock: Clock, idle: float, load: float, *, counts: bool = False, broken: bool = False) -> None:
        self.clock, self.idle, self.load, self.counts, self.broken = clock, idle, load, counts, broken

    def watts(self) -> float | None:
        if self.broken:
            return None
        return self.load if self.clock.log else self.idle

    def joules(self) -> float | None:
        return self.idle * self.clock.now + (self.load - self.idle) * 0.5 * len(self.clock.log) if self.counts else None


def measured(supply: Supply) -> dict[str, Any]:
    clock = supply.clock

    def sleep(seconds: float) -> None:
        clock.now += seconds

    return measure(Turns(clock, "net", 0.5), 4, supply, 10.0, clock, sleep)


@pytest.mark.parametrize("counts", [False, True])
def test_energy_is_that_above_idle_over_the_images(counts: bool) -> None:
    record = measured(Supply(Clock(), 5.0, 8.0, counts=counts))
    assert record["queries"] == 20 and record["duration_s"] == 10.0
    assert record["idle_w"] == pytest.approx(5.0) and record["load_w"] == pytest.approx(8.0)
    # 3 W above idle for 0.5 s per query of four images.
    assert record["energy_per_query_mj"] == pytest.approx(1500)
    assert record["energy_per_image_mj"] == pytest.approx(375)
    assert record["total_energy_per_image_mj"] == pytest.approx(1000)
    assert record["reason"] is None


def test_what_cannot_be_told_is_none_with_a_reason() -> None:
    record = measured(Supply(Clock(), 5.0, 5.0))
    assert record["energy_per_image_mj"] is None and "not above its idle power" in record["reason"]
    record = measured(Supply(Clock(), 5.0, 8.0, broken=True))
    assert record["energy_per_image_mj"] is None and "gave no value" in record["reason"]


def test_clocks_of_a_jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml("power", "energy", "limit", "clock", "temperature"))
    clocks = Clocks("Some GPU", board(tmp_path, ORIN_NANO))
    assert clocks.to_json() == {"status": "read", "sources": ["sysfs", "NVML"]}
    assert clocks.read() == {
        "gpu_mhz": 624.75,
        "memory_mhz": None,
        "cpu_mhz": 1510.4,
        "temperature_c": {"cpu-thermal": 48.5},
        "power_mode": "MAXN_SUPER",
        "power_w": None,
        "power_limit_w": None,
    }


def test_clocks_of_a_desktop_gpu_and_of_a_machine_without_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    found = Clocks("Some GPU", tmp_path).read()
    assert (found["gpu_mhz"], found["memory_mhz"], found["temperature_c"]) == (2040, 6251, {"GPU": 61})
    assert (found["power_w"], found["power_limit_w"], found["power_mode"]) == (70, 72, None)
    nothing = Clocks(None, tmp_path)
    assert nothing.to_json() == {"status": "no clocks and no temperatures under /sys", "sources": []}


def test_clocks_that_moved_are_said() -> None:
    before = {"gpu_mhz": 1000.0, "memory_mhz": None, "power_mode": "MAXN"}
    assert moved(before, {**before, "gpu_mhz": 980.0}) == []
    assert moved(before, {**before, "gpu_mhz": 600.0, "power_mode": "15W"}) == [
        "the GPU clock moved from 1000 to 600 MHz",
        "the power mode changed from MAXN to 15W",
    ]


def test_under_load_the_throughput_that_is_left_is_told(tmp_path: Path) -> None:
    clock = Clock()
    turns = Turns(clock, "net", 0.25)
    clocks = Clocks(None, board(tmp_path, ORIN_NANO))
    found = sustained(turns, 2, 1.0, clocks, clock)
    assert found["throughput_kept"] == 1.0 and len(found["windows"]) == 60
    assert found["windows"][3] | {"temperature_c": {}} == {
        "start_s": 3.0,
        "duration_s": 1.0,
        "queries": 4,
        "median_ms": 250.0,
        "max_ms": 250.0,
        "throughput_images_per_s": 8.0,
        **clocks.read(),
        "temperature_c": {},
    }
    slowing = Turns(clock, "net", 0.25)
    begun = clock.now
    monkey = slowing.collect

    def collect() -> Any:
        slowing.seconds = 0.25 if clock.now - begun < 30 else 0.5
        return monkey()

    slowing.collect = collect  # type: ignore[method-assign]
    assert sustained(slowing, 2, 1.0, clocks, clock)["throughput_kept"] == pytest.approx(0.5, rel=0.05)
