"""Runs segments with onnxruntime and writes what came out: python runner.py SEGMENTS RESULTS

It runs on a CPU that is emulated, on an ARM one beside numpy and onnxruntime alone, so it imports nothing else. Each
segment N.onnx is fed N.npz, plain and optimised; RESULTS gets N.npz with both, and instruction_sets.json.
"""

from __future__ import annotations

import ctypes
import json
import platform
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from numpy._core._multiarray_umath import __cpu_features__ as features  # type: ignore[import-not-found]

INSTRUCTION_SETS = ("SSE42", "AVX2", "AVX512F", "AVX512VNNI", "ASIMD", "ASIMDDP", "SVE")
"""Those that choose among onnxruntime's integer kernels, as numpy calls them; numpy does not look for I8MM."""
HWCAP2, I8MM = 26, 1 << 13
"""Of Linux on ARM: the entry of the auxiliary vector, and its bit."""
_LEVEL = onnxruntime.GraphOptimizationLevel
LEVELS = {"plain": _LEVEL.ORT_DISABLE_ALL, "optimised": _LEVEL.ORT_ENABLE_ALL}
FATAL_ONLY = 4


def main(segments: Path, results: Path) -> None:
    (results / "instruction_sets.json").write_text(json.dumps(instruction_sets()), encoding="utf-8")
    for path in sorted(segments.glob("*.onnx")):
        with np.load(path.with_suffix(".npz")) as stored:
            feeds = dict(stored)
        found = {how: session(path, level).run(None, feeds)[0] for how, level in LEVELS.items()}
        np.savez(results / f"{path.stem}.npz", **found)


def session(path: Path, level: onnxruntime.GraphOptimizationLevel) -> onnxruntime.InferenceSession:
    """As `faqd.deploy.onnx_model.session` has it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = FATAL_ONLY
    options.graph_optimization_level = level
    return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])


def instruction_sets() -> list[str]:
    """What this process may use."""
    found = [name for name in INSTRUCTION_SETS if features.get(name)]
    if platform.machine() == "aarch64":
        getauxval = ctypes.CDLL(None).getauxval
        getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
        found += ["I8MM"] if getauxval(HWCAP2) & I8MM else []
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
