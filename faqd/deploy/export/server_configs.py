"""Configuration for servers that load what a bundle holds: Triton's config.pbtxt, a snippet for DeepStream's nvinfer.

Names, types and sizes are read from the ONNX files. None of it was tried with a server, and each file says so. They are
made to be edited, so the manifest holds no checksum of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import onnx

from faqd.bundle import STUDENT_DEEPSTREAM, STUDENT_ONNXRUNTIME, STUDENT_TENSORRT, Bundle
from faqd.deploy.engine.options import BATCHES
from faqd.deploy.engine.record import engine_name
from faqd.deploy.onnx_model.load import load_model
from faqd.errors import UserError
from faqd.preprocess import Preprocess

Server = Literal["triton", "deepstream"]
SERVERS: tuple[Server, ...] = get_args(Server)

TRITON_TENSORRT = "triton.tensorrt.config.pbtxt"
TRITON_ONNXRUNTIME = "triton.onnxruntime.config.pbtxt"
DEEPSTREAM = "deepstream.config.txt"
LABELS = {"triton": "triton.labels.txt", "deepstream": "deepstream.labels.txt"}
"""One class a line for Triton; all in one line, with semicolons, for a classifier in nvinfer."""

_UNTRIED = "# Written by faqd, untried: no {} has loaded it yet."
_TRITON_TYPES = {"FLOAT": "TYPE_FP32", "UINT8": "TYPE_UINT8"}
_COLOURS = {"rgb": 0, "bgr": 1, "grey": 2}


def serving_files(bundle: Bundle, servers: Sequence[Server]) -> dict[str, str]:
    """The text of each file by name. UserError where the bundle has not what the server runs."""
    files: dict[str, str] = {}
    for server in servers:
        files |= _triton(bundle) if server == "triton" else {DEEPSTREAM: _deepstream(bundle)}
        if classes := bundle.manifest.get("classes"):
            labels = [" ".join(str(label).replace(";", " ").split()) for label in classes]
            files[LABELS[server]] = ("\n" if server == "triton" else ";").join(labels) + "\n"
    return files


# Triton ----------------------------------------------------------------------------------------------------------


def _triton(bundle: Bundle) -> dict[str, str]:
    files = {}
    for name, config in ((STUDENT_TENSORRT, TRITON_TENSORRT), (STUDENT_ONNXRUNTIME, TRITON_ONNXRUNTIME)):
        if bundle.has(name):
            files[config] = _config(bundle, name, config)
    return files


def _config(bundle: Bundle, network: str, config: str) -> str:
    graph = load_model(bundle.path(network)).graph
    on_gpu = network == STUDENT_TENSORRT
    model = engine_name(network) if on_gpu else network
    folder = "student-tensorrt" if on_gpu else "student-onnxruntime"
    classes = bool(bundle.manifest.get("classes"))
    inputs = ",\n".join(_tensor(value) for value in graph.input)
    outputs = ",\n".join(_tensor(value, labels=classes and index == 0) for index, value in enumerate(graph.output))
    engine = (
        "\n# The engine must come from the TensorRT version inside Triton, and not from TensorRT-RTX. Its largest batch"
        "\n# is that of build-engine --max-shapes; this file has its default."
    )
    return f"""{_UNTRIED.format("Triton")}
# In the model repository: {folder}/config.pbtxt (this file) and {folder}/1/{model}{engine if on_gpu else ""}
# Input: {_input_in_words(bundle)}
name: "{folder}"
backend: "{"tensorrt" if on_gpu else "onnxruntime"}"
default_model_filename: "{model}"
max_batch_size: {max(BATCHES)}
input [
{inputs}
]
output [
{outputs}
]
dynamic_batching {{ }}
instance_group [
  {{
    count: 1
    kind: {"KIND_GPU" if on_gpu else "KIND_CPU"}
  }}
]
"""


def _tensor(value: onnx.ValueInfoProto, labels: bool = False) -> str:
    """One tensor without its batch, which Triton adds."""
    kind = _TRITON_TYPES[onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)]
    sizes = ", ".join(str(size) for size in _sizes(value))
    label = f'\n    label_filename: "{LABELS["triton"]}"' if labels else ""
    return f'  {{\n    name: "{value.name}"\n    data_type: {kind}\n    dims: [ {sizes} ]{label}\n  }}'


def _sizes(value: onnx.ValueInfoProto) -> list[int]:
    """Behind the batch; -1 where a size is free."""
    return [size.dim_value or -1 for size in value.type.tensor_type.shape.dim][1:]


def _input_in_words(bundle: Bundle) -> str:
    record = bundle.preprocess
    fitted = f"resized to {record.height}x{record.width} ({record.resize})"
    if bundle.takes_pixels:
        order = bundle.manifest["input"]["channels"]
        return f"uint8 pixels (N, H, W, C), {order}, {fitted}; the network normalises."
    return (
        f"float32 (N, C, H, W), {record.channels}, {fitted}, then (pixel / 255 - mean) / std\n"
        f"# with mean {list(record.mean)} and std {list(record.std)}."
    )


# DeepStream ------------------------------------------------------------------------------------------------------


def _deepstream(bundle: Bundle) -> str:
    if not bundle.has(STUDENT_TENSORRT):
        raise UserError(f"--for deepstream: the bundle holds no {STUDENT_TENSORRT}; train with --target tensorrt.")
    network = STUDENT_DEEPSTREAM if bundle.has(STUDENT_DEEPSTREAM) else STUDENT_TENSORRT
    normalises = network == STUDENT_DEEPSTREAM
    graph = load_model(bundle.path(network)).graph
    record, (value,) = bundle.preprocess, graph.input
    ranks = {len(_sizes(output)) for output in graph.output}
    classifies = ranks == {1} and len(graph.output) == 1
    properties: dict[str, Any] = {
        "gpu-id": 0,
        "onnx-file": network,
        "model-engine-file": engine_name(network),
        "network-mode": 1,
        "network-type": 1 if classifies else 100,
        "batch-size": 1,
        "infer-dims": ";".join(map(str, _sizes(value))),
        "model-color-format": _COLOURS[record.channels],
        **({"net-scale-factor": "1"} if normalises else one_factor(record) or {}),
        "maintain-aspect-ratio": int(record.resize == "letterbox"),
        "symmetric-padding": int(record.resize == "letterbox"),
        "output-blob-names": ";".join(output.name for output in graph.output),
        "output-tensor-meta": int(not classifies),
        "process-mode": 1,
        "gie-unique-id": 1,
    }
    if bundle.manifest.get("classes"):
        properties["labelfile-path"] = LABELS["deepstream"]
    lines = [
        _UNTRIED.format("DeepStream"),
        *(f"# {text}" for text in _remarks(record, network, classifies)),
        "[property]",
    ]
    return "\n".join([*lines, *(f"{key}={value}" for key, value in properties.items())]) + "\n"


def one_factor(record: Preprocess) -> dict[str, str] | None:
    """nvinfer's y = net-scale-factor * (x - offset): one factor for all channels, an offset for each; None where one
    factor is not enough."""
    if len(set(record.std)) > 1:
        return None
    return {
        "net-scale-factor": f"{1 / (255 * record.std[0]):.17g}",
        "offsets": ";".join(f"{255 * mean:.9g}" for mean in record.mean),
    }


def _remarks(record: Preprocess, network: str, classifies: bool) -> list[str]:
    remarks = [
        f"Build {engine_name(network)} with `faqd-deploy build-engine` on the machine that runs it,",
        "with the TensorRT of its DeepStream: then nvinfer loads it and builds none itself.",
    ]
    if network == STUDENT_DEEPSTREAM:
        remarks += [
            "The network takes pixels 0..255 as floats and does (pixel / 255 - mean) / std itself, with",
            f"mean {list(record.mean)} and std {list(record.std)}:",
            "nvinfer has one factor for all channels, so it is 1 here.",
        ]
    if record.resize == "crop":
        remarks.append("The network was trained on centre crops; nvinfer scales the whole frame.")
    if record.resize == "letterbox":
        remarks.append("The network was trained with grey borders (114); nvinfer's are black.")
    if not classifies:
        remarks.append("The outputs are no class scores: nvinfer hands them on as tensors (output-tensor-meta).")
    return remarks
