"""The machine and the versions that a record was measured with."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from faqd.benchmarks.measure import sysfs
from faqd.cpu import cpu_model, instruction_sets


def environment() -> dict[str, Any]:
    return {
        "time_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "instruction_sets": instruction_sets(),
        "cpus_usable": len(os.sched_getaffinity(0)),
        "board": sysfs.text(Path("/proc/device-tree/model")),
        "os": _os_name(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()
