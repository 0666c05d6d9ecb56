"""Which layers of an ONNX file run in INT8 on TensorRT, how that is known, and what to change where one does not.

What decides, best first: the record of an engine built from exactly this file, a build with the TensorRT installed
here, the rules of `int8_rules`. A verdict names its source and speaks of nothing else: not of another board.
"""

from __future__ import annotations

import ast
import itertools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from faqd.bundle import MANIFEST, STUDENT_TENSORRT, load_bundle
from faqd.deploy.engine.build import engine_from_onnx
from faqd.deploy.engine.network import NotBuilt
from faqd.deploy.engine.options import BuildOptions
from faqd.deploy.engine.record import engine_name, read_record, record_path
from faqd.deploy.engine.trt import installed
from faqd.deploy.explain.qdq_graph import CONVOLUTIONS, FUSED_OPERATORS, PRODUCTS, Layer, QdqGraph, code_type, layers_of
from faqd.deploy.explain.tensorrt_rules import Broken, Rule, first_broken, refusals
from faqd.deploy.onnx_model.integer_sums import integer_sums
from faqd.deploy.onnx_model.load import load_model
from faqd.errors import UserError
from faqd.extras import install
from faqd.files import sha256

FORMAT = "faqd-explain"
VERSION = 3
"""2: `integer_sums`. 3: `float32_parts`."""
_BITS = {
    "FLOAT8E4M3FN": 8,
    "FLOAT8E5M2": 8,
    "INT8": 8,
    "UINT8": 8,
    "INT16": 16,
    "UINT16": 16,
    "INT4": 4,
    "UINT4": 4,
    "INT2": 2,
    "UINT2": 2,
}


def explanation(source: Path, *, rules_only: bool = False) -> dict[str, Any]:
    """Of a bundle's TensorRT file or of any ONNX file; UserError (exit code 2) where it cannot be read.

    `layers` has one row per convolution and linear layer: `module` (the torch module, None where the file does not
    say), `node`, `operator`, `weights` and `inputs` (labels), `weight_bits`, `act_bits`, `int8` (None where TensorRT
    takes no such file), `source` of that verdict, and `rule`: the first that the layer breaks, or None.
    """
    path, manifest = _network(source)
    model = load_model(path)
    named = _with_unique_names(model)
    graph = QdqGraph(onnx.shape_inference.infer_shapes(named, strict_mode=True, data_prop=True))
    labels = _labels(model, manifest)
    layers = [(layer, first_broken(layer)) for layer in layers_of(graph)]
    refused = refusals(graph) | {found: rule for _, (rule, found) in _broken(layers) if rule.effect == "refused"}
    seen = _Seen() if rules_only else _seen(path, named, crashes=any(rule.name == "scale" for rule in refused.values()))
    rows = [_row(layer, broken, model, labels, seen, bool(refused)) for layer, broken in layers]
    return {
        "format": FORMAT,
        "version": VERSION,
        "file": path.name,
        "sha256": sha256(path),
        "source": seen.source,
        "note": seen.note,
        "refused": [{"found": found, "rule": _rule(rule)} for found, rule in refused.items()],
        "layers": rows,
        "integer_sums": _sums(model, named),
        "float32_parts": manifest.get("float32_parts", []),
    }


def _sums(model: onnx.ModelProto, named: onnx.ModelProto) -> list[dict[str, Any]]:
    """The layers that onnxruntime sums in integers, by module and node: `largest_pair`, what two neighbouring products
    come to at most, and whether that `saturates` on CPUs that add them in int16."""
    return [
        {
            "module": module_of(model, found.node),
            "node": found.node.name,
            "largest_pair": found.largest_sum,
            "saturates": found.saturates,
        }
        for found in integer_sums(named)
    ]


def _network(source: Path) -> tuple[Path, dict[str, Any]]:
    if not source.is_dir():
        return source, {}
    if not (source / MANIFEST).is_file():
        raise UserError(f"{source}: not a bundle (no {MANIFEST}); give a bundle or an ONNX file.")
    bundle = load_bundle(source)
    if not bundle.has(STUDENT_TENSORRT):
        raise UserError(
            f"{source}: holds no {STUDENT_TENSORRT}: its student was trained with --target onnxruntime, and TensorRT "
            "has no type for its 8-bit activations; train with --target tensorrt."
        )
    return bundle.path(STUDENT_TENSORRT), bundle.manifest


def _broken(layers: list[tuple[Layer, Broken | None]]) -> list[tuple[Layer, Broken]]:
    return [(layer, broken) for layer, broken in layers if broken is not None]


def _row(
    layer: Layer,
    broken: Broken | None,
    model: onnx.ModelProto,
    labels: dict[str, dict[str, Any]],
    seen: _Seen,
    refused: bool,
) -> dict[str, Any]:
    node = layer.node
    by_rule = None if refused else broken is None or broken[0].effect == "inexact"
    told = seen.refused or seen.verdicts.get(node.name) is not None
    verdict = seen.verdicts.get(node.name)
    module = _module(model, layer)
    row = {
        "module": module,
        "node": node.name,
        "operator": node.op_type,
        **_types(layer),
        **(labels.get(module or "", {}) if layer.weight.dequantize is not None else {}),
        "int8": verdict if told else by_rule,
        "source": seen.source if told else "rule",
        "rule": None if broken is None else {**_rule(broken[0]), "found": broken[1]},
    }
    # A build that contradicts the rules is worth more than they are, and says so.
    row["contradicts_rules"] = told and verdict != by_rule
    return row


def _rule(rule: Rule) -> dict[str, str]:
    return {"name": rule.name, "effect": rule.effect, "says": rule.says, "cure": rule.cure}


def _types(layer: Layer) -> dict[str, Any]:
    if layer.node.op_type not in (*CONVOLUTIONS, *PRODUCTS, *FUSED_OPERATORS):
        return {"weights": "integer", "inputs": "integer", "weight_bits": 8, "act_bits": 8}
    weight = layer.weight.dequantize
    weights = "FLOAT" if weight is None else code_type(layer.graph, weight)
    quantized = layer.input_quantizers
    complete = len(quantized) == len(layer.inputs)
    inputs = code_type(layer.graph, quantized[0]) if complete else "FLOAT"
    return {
        "weights": weights.lower(),
        "inputs": inputs.lower(),
        "weight_bits": _BITS.get(weights, 32),
        "act_bits": _BITS.get(inputs, 32),
    }


def _labels(model: onnx.ModelProto, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By torch module: the grids that the student was trained on, which may be coarser than the INT8 of the file."""
    if manifest:
        keys = ("weights", "inputs", "weight_bits", "act_bits")
        return {row["name"]: {key: row[key] for key in keys if key in row} for row in manifest["layers"]}
    entries = {entry.key: entry.value for entry in model.metadata_props}.get("faqd.bits", "")
    pairs = [entry.partition(": ") for entry in entries.split("; ") if " x " in entry and entry.isprintable()]
    return {name: _grids(*grids.split(" x ", 1)) for name, _, grids in pairs}


def _grids(weights: str, inputs: str) -> dict[str, Any]:
    """A label such as `4 (±7)` begins with its bits; one that does not, such as `ternary`, leaves those of the file."""
    bits = {"weight_bits": weights.split(" ")[0], "act_bits": inputs.split(" ")[0]}
    return {
        "weights": weights,
        "inputs": inputs,
        **{key: int(label) for key, label in bits.items() if label.isdecimal() and len(label) < 4},
    }


def _with_unique_names(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every node has a name of its own, by which a builder's answer is found again."""
    named = onnx.ModelProto()
    named.CopyFrom(model)
    given = {node.name for node in named.graph.node}
    taken: set[str] = set()
    for node in named.graph.node:
        if not node.name or node.name in taken:
            tried = (f"{node.name or node.op_type}#{index}" for index in itertools.count())
            node.name = next(name for name in tried if name not in taken | given)
        taken.add(node.name)
    return named


# What was seen, not deduced --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What an engine or a build here showed.

    verdicts: by node, whether it runs in INT8; None, or no entry, where that left no trace. refused: whether TensorRT
    was asked and built nothing.
    """

    verdicts: Mapping[str, bool | None] = field(default_factory=dict)
    source: str = "rule"
    note: str | None = None
    refused: bool = False


def _seen(path: Path, named: onnx.ModelProto, *, crashes: bool) -> _Seen:
    """crashes: TensorRT-RTX 1.7 ends the process at a computed scale, so that it is not asked."""
    record = _record_of(path)
    if record is not None:
        return _Seen(_verdicts(record), _source(record, f"{engine_name(path.name)}: "))
    if crashes:
        return _Seen(note="TensorRT was not asked: it wants constant scales")
    try:
        trt = installed()
    except UserError:
        note = f"no TensorRT is installed here, so this is by rule; {install('rtx')} builds and looks"
        return _Seen(note=note)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "network.onnx")
        copy.write_bytes(named.SerializeToString())
        try:
            record = engine_from_onnx(copy, copy.with_suffix(".engine"), BuildOptions(), lambda _: None)
        except UserError as error:
            note = str(error).replace(str(copy), path.name).rstrip(".")
            if isinstance(error, NotBuilt):
                return _Seen(source=f"{trt}, which was tried here", note=note, refused=True)
            return _Seen(note=note)
    return _Seen(_verdicts(record), _source(record, "built here with "))


def _record_of(path: Path) -> dict[str, Any] | None:
    """The record of the engine beside the file, if it was built from exactly this file and knows its layers."""
    engine = path.with_name(engine_name(path.name))
    if not record_path(engine).is_file():
        return None
    record = read_record(engine)
    fits = record.get("onnx", {}).get("sha256") == sha256(path) and record.get("layers_read_from")
    return record if fits and record.get("int8", {}).get("products") else None


def _verdicts(record: dict[str, Any]) -> dict[str, bool | None]:
    return {product["node"]: product["int8"] for product in record["int8"]["products"]}


def _source(record: dict[str, Any], prefix: str) -> str:
    builder = record["builder"]
    name = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}.get(builder["name"], builder["name"])
    gpu = f" on {record['gpu']['name']}" if record.get("gpu") else ", no GPU"
    return f"{prefix}{name} {builder['version']}{gpu}, {record['layers_read_from']}"


# Torch modules ---------------------------------------------------------------------------------------------------


def _module(model: onnx.ModelProto, layer: Layer) -> str | None:
    return module_of(model, layer.node, layer.weight.dequantize)


def module_of(model: onnx.ModelProto, node: onnx.NodeProto, weight: onnx.NodeProto | None = None) -> str | None:
    """The path of the torch module behind a node, by what its exporter left: faqd and torch's two write it down.

    weight: what its weights are dequantized by.
    """
    if model.producer_name == "faqd":
        return str(node.name).rpartition(".")[0] or None
    if node.name.startswith("/"):  # torch's older exporter: /layer1/layer1.0/conv/conv.2/Conv is layer1.0.conv.2
        places: list[str] = []
        for part in node.name.split("/")[1:-1]:
            if places and part.startswith(f"{places[-1]}."):
                places.pop()
            places.append(part)
        return ".".join(places) or None
    # A parameter keeps its name; the scopes of a convolution that took in a batch norm are those of the batch norm.
    for quantizer in (weight, node):
        for name in () if quantizer is None else quantizer.input:
            stem, dot, last = name.rpartition(".")
            if dot and last.startswith("weight"):
                return str(stem)
    scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), None)
    if scopes is not None:
        try:
            path = ast.literal_eval(scopes)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            path = []
        if isinstance(path, list) and len(path) > 1 and str(path[-2]).isprintable():
            return str(path[-2]) or None
    return None
