"""What becomes of an operator's result, in words: docs/operators.md has them of every row."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Treatment:
    """grid: of the result. tensorrt, onnxruntime: what computes it there. Rows that are treated alike share one."""

    grid: str
    tensorrt: str
    onnxruntime: str


SUMS = "float until the next rounding; weights of 1 to 8 bits with a scale per output channel"
OWN = "its own: 0..127, or signed 8 bits"
PASSED_ON = "that of the input: quantized values pass through"

CURVED = Treatment("signed 8 bits", "float, between INT8 layers", "float, as the layer before it")
PASSED = Treatment(PASSED_ON, "on INT8", "on integers, quantized again unchanged")
AVERAGED = Treatment(OWN, "reads integers, float result, quantized", "reads integers, float result, quantized")
ISLAND = Treatment("none: float", "FP16", "FP32")
"""Of what has no integer form."""
