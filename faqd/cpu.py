"""What the processor here can do, as far as integer arithmetic and the records of measurements depend on it."""

from __future__ import annotations

import platform
from pathlib import Path

_NAMES = {
    "avx2": "avx2",
    "avx512bw": "avx512",
    "avx512_vnni": "avx512-vnni",
    "avx_vnni": "avx-vnni",
    "amx_int8": "amx-int8",
    "asimd": "asimd",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "sve": "sve",
}
"""The kernel's word for an instruction set -> the usual one."""
_ADDS_IN_INT32 = {"avx512-vnni", "avx-vnni"}


def instruction_sets(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Those among avx2, avx512, avx512-vnni, avx-vnni, amx-int8, asimd, dotprod, i8mm and sve that the first processor
    has; empty where the kernel does not tell."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            flags = set(value.split())
            return [name for flag, name in _NAMES.items() if flag in flags]
    return []


def cpu_kind(sets: list[str] | None = None) -> str:
    """Such as `x86_64 avx2 avx512 avx512-vnni`: CPUs of one kind run the same kernels."""
    return " ".join([platform.machine(), *(instruction_sets() if sets is None else sets)])


def adds_pairs_in_int16(kind: str) -> bool:
    """Whether onnxruntime's kernels on a CPU of this kind saturate (faqd.saturation): x86 with AVX2 and no VNNI."""
    names = set(kind.split())
    return "avx2" in names and not names & _ADDS_IN_INT32
