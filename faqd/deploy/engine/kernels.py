"""The kernels of a built engine and the types they compute in, read back from TensorRT.

A misplaced Q/DQ pair is no error: the convolution becomes float in silence, and only this list tells.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

_FIELDS = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), (?P<rest>Inputs: .*)")
_SECTIONS = ("Inputs", "Constants", "Outputs")
_PRODUCT = re.compile(r"correlation|conv|gemm|matrix_?multiply|matmul|fully_?connected", re.IGNORECASE)
_NO_PRODUCT = re.compile(r"reformat|conversion|convert", re.IGNORECASE)


@dataclass(frozen=True)
class Kernel:
    """One kernel: its name, TensorRT's word for its type, the data types of its inputs and outputs in order, and
    `metadata`, which names the ONNX nodes it was made from."""

    name: str
    type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    metadata: str

    @property
    def is_product(self) -> bool:
        """A convolution or a matrix product."""
        return bool(_PRODUCT.search(self.type)) and not _NO_PRODUCT.search(self.type)

    @property
    def int8(self) -> bool:
        """Whether it multiplies integers: the first input decides, the others are shortcuts and constants."""
        return bool(self.inputs) and "int8" in self.inputs[0].lower()

    def comes_from(self, node: str) -> bool:
        return f"[ONNX Layer: {node}]" in self.metadata

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "type": self.type,
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "int8": self.int8,
        }


LayerKind = Literal["int8", "float", "conversion", "other"]


def layer_kind(layer: Mapping[str, Any]) -> LayerKind:
    """Of an entry under `layers` in an engine's record: a product in INT8 or in float, a change of type or layout, or
    something else."""
    kernel = Kernel(layer["name"], layer["type"], tuple(layer["inputs"]), tuple(layer["outputs"]), "")
    if kernel.is_product:
        return "int8" if kernel.int8 else "float"
    return "conversion" if _NO_PRODUCT.search(kernel.type) else "other"


def kernels_from_log(text: str) -> list[Kernel]:
    """The kernels in the verbose message that begins with `Layers:`, one line each; other lines are passed over.

    Seen from TensorRT-RTX 1.7: `Name: N, LayerType: T, Inputs: [ { Name: .., Datatype: Int8, .. }],
    Constants: [..], Outputs: [..], TacticName: .., StreamId: 0, Metadata: [ONNX Layer: node][ONNX Layer: node]`.
    """
    found = (_FIELDS.match(line.strip()) for line in text.splitlines())
    return [_from_line(match) for match in found if match]


def kernels_from_inspector(text: str) -> list[Kernel]:
    """The kernels in the engine inspector's JSON; none where the engine was built without detailed verbosity.

    TensorRT 10 writes one `Format/Datatype` per tensor, 11 has `Datatype` apart from `Format`.
    """
    try:
        layers = json.loads(text).get("Layers", [])
    except (ValueError, AttributeError):
        return []
    return [_from_entry(layer) for layer in layers if isinstance(layer, dict)]


def products(nodes: Iterable[tuple[str, str]], kernels: list[Kernel]) -> list[dict[str, Any]]:
    """For each (name, operator) of the network's convolutions and matrix products: its kernel, and whether INT8.

    `int8` is null where the builder left no kernel by which to tell.
    """
    return [_product(node, operator, kernels) for node, operator in nodes]


def not_int8(kernels: list[Kernel]) -> list[str]:
    """The names of the convolution and matrix product kernels that compute in float."""
    return [kernel.name for kernel in kernels if kernel.is_product and not kernel.int8]


def _product(node: str, operator: str, kernels: list[Kernel]) -> dict[str, Any]:
    candidates = [kernel for kernel in kernels if kernel.is_product]
    made = [kernel for kernel in candidates if kernel.comes_from(node)]
    # A kernel may carry the nodes around it in its metadata; the one named after the node goes first.
    made.sort(key=lambda kernel: not kernel.name.startswith(node))
    kernel = next(iter(made), None)
    return {
        "node": node,
        "operator": operator,
        "kernel": None if kernel is None else kernel.name,
        "int8": None if kernel is None else kernel.int8,
    }


def _from_line(match: re.Match[str]) -> Kernel:
    rest = match["rest"]
    types = {}
    for section, after in zip(_SECTIONS, (*_SECTIONS[1:], "TacticName"), strict=True):
        begin, end = rest.find(f"{section}: ["), rest.find(f"{after}: ")
        types[section] = tuple(re.findall(r"Datatype: (\w+)", rest[begin:end])) if begin >= 0 else ()
    return Kernel(match["name"], match["type"].strip(), types["Inputs"], types["Outputs"], _after(rest, "Metadata: "))


def _after(text: str, mark: str) -> str:
    return text[text.find(mark) + len(mark) :] if mark in text else ""


def _from_entry(layer: dict[str, Any]) -> Kernel:
    kind = " ".join(str(layer[key]) for key in ("LayerType", "ParameterType") if layer.get(key))
    return Kernel(
        str(layer.get("Name", "")),
        kind,
        _types(layer.get("Inputs")),
        _types(layer.get("Outputs")),
        str(layer.get("Metadata", "")),
    )


def _types(tensors: Any) -> tuple[str, ...]:
    if not isinstance(tensors, list):
        return ()
    entries = [tensor for tensor in tensors if isinstance(tensor, dict)]
    return tuple(
        str(entry.get("Datatype") or entry.get("Format/Datatype") or entry.get("Format", "")) for entry in entries
    )
