"""LSTM and GRU: torch's own, whose gates stand in another order."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from faqd.train.networks.from_onnx.builder import Node, Rule

_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2)}
"""Where torch's gates stand in ONNX: input, forget, cell, output of i, o, f, c; reset, update, new of z, r, h."""
_KINDS: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU}


class Recurrent(nn.Module):
    """layer: of sequences (L, N, C). Returns what ONNX does: (L, directions, N, H), and the last states."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer, self._directions = layer, 2 if layer.bidirectional else 1

    def forward(self, x: Tensor) -> list[Tensor]:
        every, last = self.layer(x)
        apart = every.reshape(every.shape[0], -1, self._directions, self.layer.hidden_size).permute(0, 2, 1, 3)
        return [apart, *(last if isinstance(last, tuple) else (last,))]


def _recurrent(node: Node) -> Any:
    kind = node.proto.op_type
    weight, recurrent = node.constant(1), node.constant(2)
    if weight is None or recurrent is None:
        raise node.refusal("has no weights")
    _refuse_other_forms(node)
    hidden, gates = recurrent.shape[2], len(_GATES[kind])
    direction = node.setting("direction", default="forward")
    if direction == "reverse":
        raise node.refusal("reads its sequence backwards alone, which torch has no layer for")
    bias = node.constant(3)
    bias = np.zeros((len(weight), 2 * gates * hidden), np.float32) if bias is None else bias
    layer = _KINDS[kind](weight.shape[2], hidden, bidirectional=direction == "bidirectional")
    halves = bias.reshape(len(weight), 2, gates * hidden)
    for index, end in enumerate(("", "_reverse")[: len(weight)]):
        values = {
            "weight_ih_l0": weight[index],
            "weight_hh_l0": recurrent[index],
            "bias_ih_l0": halves[index, 0],
            "bias_hh_l0": halves[index, 1],
        }
        for name, value in values.items():
            setattr(layer, name + end, nn.Parameter(torch.from_numpy(_in_order(value, kind))))
    return node.module(Recurrent(layer.eval()), node.ref())


def _in_order(value: NDArray[Any], kind: str) -> NDArray[np.float32]:
    parts = np.split(value, len(_GATES[kind]))
    return np.concatenate([parts[gate] for gate in _GATES[kind]]).astype(np.float32)


def _refuse_other_forms(node: Node) -> None:
    """What torch's layers have no setting for."""
    if node.proto.op_type == "GRU" and not node.setting("linear_before_reset", default=0):
        raise node.refusal("resets its state before the product (linear_before_reset 0), which torch's GRU does not")
    for name in ("activations", "clip", "input_forget", "layout"):
        usual = {"LSTM": [b"Sigmoid", b"Tanh", b"Tanh"], "GRU": [b"Sigmoid", b"Tanh"]}[node.proto.op_type]
        value = node.attributes.get(name)
        if value and not (name == "activations" and value in (usual, usual * 2)):
            raise node.refusal(f"has {name} {value}, which torch's layer has not")
    if node.at(4) is not None:
        raise node.refusal("is told the lengths of its sequences; leave sequence_lens out")
    for index in (5, 6, 7):
        state = node.constant(index) if node.proto.op_type == "LSTM" or index == 5 else None
        if state is not None and np.any(state):
            raise node.refusal(f"starts from {node.proto.input[index]}, and taken is a start from zero")


RULES: dict[str, Rule] = {"LSTM": _recurrent, "GRU": _recurrent}
