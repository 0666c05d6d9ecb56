"""What the processor here is and can do, as far as integer arithmetic and the records of measurements depend on it."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
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
_CPUINFO = Path("/proc/cpuinfo")


def cpu_model() -> str:
    """The kernel's name for the processor; ARM kernels often have none, then the machine type."""
    return next(_entries("model name", "hardware"), "") or platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Those among avx2, avx512, avx512-vnni, avx-vnni, amx-int8, asimd, dotprod, i8mm and sve that the first processor
    has; empty where the kernel does not tell. A processor's name tells less: `AMD EPYC` is four generations."""
    flags = set(next(_entries("flags", "features"), "").split())
    return [name for flag, name in _NAMES.items() if flag in flags]


def cpu_kind() -> str:
    """Such as `x86_64 avx2 avx512 avx512-vnni`. CPUs of one kind add integers alike."""
    return " ".join([platform.machine(), *instruction_sets()])


def adds_pairs_in_int16(sets: Sequence[str]) -> bool:
    """Whether onnxruntime's kernels on such a CPU saturate (faqd.saturation)."""
    return "avx2" in sets and "avx512-vnni" not in sets and "avx-vnni" not in sets


def has_dot_products(sets: Sequence[str]) -> bool:
    """Whether such a CPU multiplies 8-bit integers and adds them up in one instruction, by which INT8 pays most."""
    return not {"avx512-vnni", "avx-vnni", "amx-int8", "dotprod", "i8mm"}.isdisjoint(sets)


def _entries(*keys: str) -> Iterator[str]:
    """What /proc/cpuinfo says under one of these keys."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip().lower() in keys and value.strip():
            yield value.strip()
