"""Padding. With zeros codes pass through it; with another number it is float."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from faqd.quantize.operators.emit import Emission, Value
from faqd.quantize.operators.row import Call, Operator, Rule
from faqd.quantize.operators.treatment import PASSED_ON, Treatment


class Pad(nn.Module):
    """F.pad. widths: two for each axis, the last axis first. mode: constant, reflect, replicate or circular."""

    def __init__(self, widths: tuple[int, ...], mode: str, value: float) -> None:
        super().__init__()
        self.widths, self.mode, self.value = widths, mode, value

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.widths, self.mode, self.value if self.mode == "constant" else None)

    def extra_repr(self) -> str:
        return f"{self.widths}, {self.mode}, {self.value:g}"


def _pad(call: Call) -> Any:
    mode, value = call.get("mode") or "constant", call.get("value")
    widths = call.get("pad") if call.get("pad") is not None else call["padding"]
    return Pad(tuple(_settled(widths)), mode, 0.0 if value is None else float(value))


def _settled(widths: Any) -> list[int]:
    return [int(width.meta["val"]) if isinstance(width, fx.Node) else int(width) for width in widths]


def _fixed_pad(mode: str) -> Rule:
    return lambda call: Pad(tuple(_settled(call["padding"])), mode, 0.0)


def _unlike_zeros(pad: Any, node: fx.Node) -> str | None:
    if pad.mode == "circular":
        return "circular padding has no ONNX operator yet; use zeros, reflect or replicate."
    if pad.value != 0:
        return "padding with another number than zero is none of the quantized values of the padded tensor."
    return None


_PADDINGS = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
"""torch's mode of a padding -> ONNX's."""


def _emit_pad(emission: Emission) -> Value:
    pad, rank = emission.module, len(emission.before)
    widths = list(pad.widths) + [0] * (2 * rank - len(pad.widths))
    starts, ends = widths[::2][::-1], widths[1::2][::-1]
    inputs = [emission.x, emission.number("pads", [*starts, *ends])]
    if pad.value:
        inputs.append(emission.number("value", float(pad.value)))
    return emission.op("Pad", *inputs, mode=_PADDINGS[pad.mode])


OPERATORS = (
    Operator(
        "reshape",
        (Pad,),
        {
            **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
            **dict.fromkeys(("reflection_pad1d", "reflection_pad2d"), _fixed_pad("reflect")),
            **dict.fromkeys(("replication_pad1d", "replication_pad2d"), _fixed_pad("replicate")),
        },
        problem=_unlike_zeros,
        emit=_emit_pad,
        stands_for="padding by zeros, reflection or replication; a negative one is a slice",
        treatment=Treatment(PASSED_ON, "on INT8", "float, rounded again unchanged"),
    ),
)
