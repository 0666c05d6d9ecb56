"""CPUs of other kinds, and how qemu-user runs Python as one of them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SECONDS = 240
"""Longest that a process may take; a few are usual."""


@dataclass(frozen=True)
class Cpu:
    """A kind of CPU.

    machine, model: what qemu runs, and its -cpu; empty for this machine itself. has, lacks: instruction sets, as the
    runner tells them, which show that it was emulated. saturates: whether onnxruntime adds pairs of products in int16
    there; None where nobody knows. part: implementer and part number of an ARM CPU in /proc/cpuinfo.
    """

    name: str
    machine: str = ""
    model: str = ""
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    saturates: bool | None = False
    part: tuple[int, int] = (0, 0)


A76 = Cpu("Cortex-A76", "aarch64", "cortex-a76", ("ASIMDDP",), ("I8MM", "SVE"), part=(0x41, 0xD0B))
CPUS = (
    Cpu("this machine", saturates=None),
    Cpu("Haswell", "x86_64", "Haswell", ("AVX2",), ("AVX512F",), saturates=True),
    Cpu("Nehalem", "x86_64", "Nehalem", ("SSE42",), ("AVX2",)),
    Cpu("Cortex-A57", "aarch64", "cortex-a57", ("ASIMD",), ("ASIMDDP",), part=(0x41, 0xD07)),
    A76,
    Cpu("ARM with i8mm", "aarch64", "max,sve=off", ("ASIMDDP", "I8MM"), ("SVE",), part=(0, 0x51)),
    Cpu("ARM with SVE", "aarch64", "max", ("ASIMDDP", "I8MM", "SVE"), part=(0, 0x51)),
)
"""A Jetson Nano has Cortex-A57; the A78AE of an Orin is nearest to the A76."""


def run_as(cpu: Cpu, work: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Python with `arguments` as this CPU.

    work: the folder that .ci/test_cpus has filled: root/ with Debian's Python for ARM, site/ with the packages for it.
    """
    emulator = [f"qemu-{cpu.machine}", "-cpu", cpu.model] if cpu.machine else []
    python: list[object] = [sys.executable]
    if cpu.machine == "aarch64":
        root, site = work / "root", work / "site"
        tell_about(cpu, root)
        emulator += ["-L", str(root), "-E", f"PYTHONPATH={site}"]
        python = [root / "usr/bin/python3"]
    line = [*emulator, *map(str, python + list(arguments))]
    try:
        return subprocess.run(line, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(line, 1, "", f"not done after {SECONDS} s")


def tell_about(cpu: Cpu, root: Path) -> None:
    """Writes what an emulated process finds in place of this machine's /proc/cpuinfo and /sys: one core of `cpu`.

    onnxruntime dies on import of a part number that is not that of -cpu, and of more cores than are described.
    """
    implementer, part = cpu.part
    core = {
        "processor": "0",
        "CPU implementer": f"{implementer:#04x}",
        "CPU architecture": "8",
        "CPU variant": "0x0",
        "CPU part": f"{part:#05x}",
        "CPU revision": "0",
    }
    files = {"proc/cpuinfo": "".join(f"{key}\t: {value}\n" for key, value in core.items()) + "\n"}
    files |= {f"sys/devices/system/cpu/{name}": "0\n" for name in ("possible", "present", "online")}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
