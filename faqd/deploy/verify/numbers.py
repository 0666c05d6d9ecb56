"""The numbers in a student's file, read off what they are for, against those of the student in torch, one by one.

What a number leads to is proved by codes; but a weight whose input is zero on every probe leads nowhere. Here each has
to be what it was in torch: weight codes, scales, biases, and the limits of every rounding.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from faqd.deploy.reference.evaluator import code_tensors
from faqd.deploy.verify.segments import ON_CODES, place_of

WEIGHTED = ("Conv", "ConvTranspose", "Gemm")
_WHAT = {
    "codes": "quantized weights",
    "weight_scale": "weight scales",
    "bias": "bias",
    "bias_scale": "bias scales",
    "scale": "scale",
    "low": "lower limit",
    "high": "upper limit",
}


def exactly(values: NDArray[Any]) -> str:
    """SHA-256 of a tensor's shape, type and values; the two zeros are one."""
    values = values + 0 if values.dtype.kind == "f" else values
    described = f"{values.shape} {values.dtype.name} ".encode()
    return hashlib.sha256(
        described + np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()
    ).hexdigest()


def in_any_order(values: NDArray[Any]) -> str:
    """SHA-256 of the values of a float tensor as float32, sorted: an exporter may turn it, or leave out axes of one."""
    return exactly(np.sort(values.astype(np.float32).reshape(-1)))


def wrong_constants(model: onnx.ModelProto, wanted: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(place, what is wrong there) of each number of torch's that the file has not.

    wanted: `layers`, `roundings` and `others`, as `torch_constants` writes them.
    """
    constants = _Constants(model)
    for kind, found in (("layer", constants.layers), ("rounding", constants.roundings)):
        for entry in wanted[f"{kind}s"]:
            here = [candidate for candidate in found if candidate["layer"] == entry["layer"]]
            different = [_different(entry, candidate) for candidate in here]
            if not here:
                yield entry["layer"], f"the file has no such {kind}"
            elif all(different):
                names = " and ".join(_WHAT.get(key, key) for key in different[0])
                yield entry["layer"], f"the file has not torch's {names}"
    yield from constants.complaints
    for entry in wanted["others"]:
        if not constants.others[entry["sha256"]]:
            yield entry["layer"], f"the file has not torch's {entry['number']}"
        constants.others[entry["sha256"]] -= 1


def grids(wanted: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Lowest and highest code of every rounding, by place."""
    return {entry["layer"]: tuple(entry["grid"]) for entry in reversed(wanted["roundings"])}


def _different(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What torch states and the file has otherwise."""
    stated = {key: value for key, value in wanted.items() if key not in ("grid", "nonnegative") and value is not None}
    return [key for key, value in stated.items() if found.get(key) != value and not _is_no_limit(key, value, found)]


def _is_no_limit(key: str, wanted: Any, found: dict[str, Any]) -> bool:
    """Whether a limit of torch's is where the codes saturate by themselves: what then limits the values in front of
    them is an operator of the network, such as a ReLU before a signed grid, and shows in the codes."""
    ends = found.get("saturates", (None, None))
    return (key == "low" and wanted == ends[0] and found[key] > wanted) or (
        key == "high" and wanted == ends[1] and found[key] < wanted
    )


class _Constants:
    """The constants of a Q/DQ file by what reads them.

    others: how many operators read each float tensor that belongs to no integer layer and to no rounding, by its values
    in any order.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = model.graph
        self._values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._readers = defaultdict(list)
        for node in model.graph.node:
            if node.op_type == "DequantizeLinear":
                self._readers[node.input[0]].append(node)
        self._taken: set[str] = set()
        self.complaints: list[tuple[str, str]] = []
        self.layers = [entry for node in model.graph.node if (entry := self._layer(node)) is not None]
        self.roundings = [self._rounding(name) for name in code_tensors(model.graph)]
        self.others = self._others()

    def _layer(self, node: onnx.NodeProto) -> dict[str, Any] | None:
        """A convolution or linear layer whose weights are constant codes."""
        weight = self._makers.get(node.input[1]) if node.op_type in WEIGHTED else None
        if weight is None or weight.op_type != "DequantizeLinear" or weight.input[0] not in self._values:
            return None
        codes, scale = (self._values[name] for name in weight.input[:2])
        axis = next((a.i for a in weight.attribute if a.name == "axis"), 1)
        entry = {
            "layer": place_of(node),
            # Output channels first, as torch has them.
            "codes": exactly(np.moveaxis(codes, axis, 0) if -codes.ndim <= axis < codes.ndim else codes),
            "weight_scale": exactly(scale),
            "bias": None,
            "bias_scale": None,
        }
        self._taken |= set(weight.input)
        name = node.input[2] if len(node.input) > 2 else ""
        bias = self._makers.get(name)
        if bias is not None and bias.op_type == "DequantizeLinear" and bias.input[0] in self._values:
            entry |= {"bias": exactly(self._values[bias.input[0]]), "bias_scale": exactly(self._values[bias.input[1]])}
            self._taken |= set(bias.input)
        elif name in self._values:
            entry["bias"] = exactly(self._values[name])
            self._taken.add(name)
        return entry

    def _rounding(self, name: str) -> dict[str, Any]:
        """Of the codes `name`: their scale, and the limits that saturation and Clips leave them, zero point removed."""
        node = self._makers[name]
        place, clips = place_of(node), []
        while node.op_type in ON_CODES and node.input[0] in self._makers:
            clips += [node] if node.op_type == "Clip" else []
            node = self._makers[node.input[0]]
        if node.op_type != "QuantizeLinear":
            return {"layer": place}
        scale, zero_point = (self._values[operand] for operand in node.input[1:3])
        scale, zero, reach = scale.item(), int(zero_point.item()), np.iinfo(zero_point.dtype)
        ends: list[tuple[float, float]] = [(reach.min - zero, reach.max - zero)]
        ends += [(bottom - zero, top - zero) for bottom, top in map(self._limits, clips)]
        saturates = max(low for low, _ in ends), min(high for _, high in ends)
        self._taken |= set(node.input[1:])
        for reader in self._readers[name]:
            self._taken |= set(reader.input[1:])
            for index, word in ((1, "scale"), (2, "zero point")):
                if self._values[reader.input[index]].item() != self._values[node.input[index]].item():
                    self.complaints.append(
                        (place, f"its values are dequantized with another {word} than they were quantized with")
                    )
        before = self._makers.get(node.input[0])
        if before is not None and before.op_type in ("Clip", "Relu"):  # on values
            bottom, top = self._limits(before)
            ends.append((np.rint(bottom / scale), np.rint(top / scale)))
        low, high = max(low for low, _ in ends), min(high for _, high in ends)
        return {"layer": place, "scale": scale, "low": int(low), "high": int(high), "saturates": saturates}

    def _limits(self, node: onnx.NodeProto) -> tuple[float, float]:
        """Of a Clip or a Relu."""
        if node.op_type == "Relu":
            return 0.0, np.inf
        self._taken |= set(node.input[1:])
        bottom, top = ([*node.input[1:], "", ""])[:2]
        low, high = self._values.get(bottom), self._values.get(top)
        return (
            -np.inf if low is None or low.size != 1 else float(low.item()),
            np.inf if high is None or high.size != 1 else float(high.item()),
        )

    def _others(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for node in self._graph.node:
            free = [name for name in node.input if name in self._values and name not in self._taken]
            parts = [self._values[name].astype(np.float64) for name in free[:2]]
            if node.op_type == "DequantizeLinear" and len(free) == 3 and parts[0].shape == parts[1].shape:
                found[in_any_order(parts[0] * parts[1])] += 1  # a bias, with a scale for each number
            else:
                floats = [self._values[name] for name in free if self._values[name].dtype.kind == "f"]
                found.update(map(in_any_order, floats))
        return found
