"""The network that TensorRT's parser makes of an ONNX file, and what the record says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from faqd.deploy.engine.trt import (
    Builder,
    ILayer,
    ILogger,
    INetworkDefinition,
    ITensor,
    Messages,
    ParserError,
    TensorRT,
)
from faqd.errors import UserError

_FLOAT_TYPES = {"HALF": "fp16", "BF16": "bf16"}


class NotBuilt(UserError):
    """TensorRT runs here, and does not take this file."""


def parsed(
    trt: TensorRT, builder: Builder, onnx: Path, content: bytes, log: ILogger, messages: Messages
) -> INetworkDefinition:
    """NotBuilt where the parser refuses the file, or finds nothing in it."""
    network = builder.create_network(network_flags(trt))
    parser = trt.module.OnnxParser(network, log)
    read = parser.parse(content)
    if parser.num_errors:
        raise NotBuilt(f"{onnx}: {trt} refuses it: {_parser_error(parser.get_error(0))}")
    # Bytes that are no ONNX at all can count as a network without nodes.
    if not read or network.num_outputs == 0:
        why = f": {messages.why()}" if messages.errors else ""
        raise NotBuilt(f"{onnx}: {trt} finds no network in it{why}. The file is damaged; export it again.")
    return network


def network_flags(trt: TensorRT) -> int:
    return 1 << int(trt.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if trt.strongly_typed else 0


def _parser_error(error: ParserError) -> str:
    text = " ".join(str(error.desc()).split())
    if not error.node_operator():
        return f"{text} The file is damaged or cut short; export it again."
    return f"node {error.node_name() or '(without a name)'} ({error.node_operator()}): {text.rstrip('.')}."


def is_quantized(network: INetworkDefinition) -> bool:
    return any(layer.type.name == "QUANTIZE" for layer in layers_in(network))


def float_type(trt: TensorRT, network: INetworkDefinition) -> str:
    """The type of what is not quantized: the smallest float type that any layer puts out."""
    if not trt.strongly_typed:
        return "fp16 or fp32"  # The builder chooses per layer.
    types = {
        layer.get_output(index).dtype.name
        for layer in layers_in(network)
        for index in range(layer.num_outputs)
        if layer.get_output(index) is not None
    }
    return next((word for name, word in _FLOAT_TYPES.items() if name in types), "fp32")


def layers_in(network: INetworkDefinition) -> list[ILayer]:
    return [network.get_layer(index) for index in range(network.num_layers)]


def input_shapes(network: INetworkDefinition) -> dict[str, tuple[int, ...]]:
    tensors = (network.get_input(index) for index in range(network.num_inputs))
    return {tensor.name: tuple(tensor.shape) for tensor in tensors}


def tensor_facts(tensor: ITensor) -> dict[str, Any]:
    return {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype.name.lower()}
