"""A captured or converted network to ONNX: each call is written by the row of its operator, under its own place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from torch import Tensor, fx

from faqd.deploy.export.onnx_file import OnnxFile
from faqd.deploy.export.other_operators import write_others
from faqd.deploy.export.tensor_facts import TensorFacts, facts_of
from faqd.deploy.onnx_model.inference import with_shapes
from faqd.files import written_beside
from faqd.quantize import nodes
from faqd.quantize.convert import Deployed
from faqd.quantize.operators.emit import Emission
from faqd.quantize.operators.registry import emission_of
from faqd.quantize.outputs import called_input, graph_outputs


@dataclass(frozen=True)
class Written:
    """tensors: what the results of a network's nodes are called in its file, by the nodes' names."""

    model: onnx.ModelProto
    tensors: dict[str, str]


def written_from_deployed(deployed: Deployed, example: Tensor, metadata: dict[str, str]) -> Written:
    """Write a deployed student of any flavour. example: (N, C, H, W), for its sizes only."""
    written = _written(deployed.network, deployed.flavour, example, metadata)
    if deployed.flavour == "onnxruntime":
        # Told the shapes of tensors inside, it lays activations out in fewer buffers and is slower at batch 1.
        del written.model.graph.value_info[:]
    return written


def onnx_from_deployed(deployed: Deployed, example: Tensor, metadata: dict[str, str]) -> onnx.ModelProto:
    """The file alone."""
    return written_from_deployed(deployed, example, metadata).model


def onnx_from_network(network: fx.GraphModule, example: Tensor, metadata: dict[str, str]) -> onnx.ModelProto:
    """Write a captured network in evaluation mode: dynamic batch, readable names, no trace of this machine."""
    network.eval()
    return _written(network, "float", example, metadata).model


def save(proto: onnx.ModelProto, path: Path) -> None:
    with written_beside(path) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))


def _written(network: fx.GraphModule, flavour: str, example: Tensor, metadata: dict[str, str]) -> Written:
    writer = _Writer(network, flavour, facts_of(network, example))
    model = writer.model()
    model.metadata_props.update(metadata)
    proto: onnx.ModelProto = ir.serde.serialize_model(model)
    return Written(with_shapes(proto, check=True), writer.tensors())


class _Writer:
    def __init__(self, network: fx.GraphModule, flavour: str, facts: dict[fx.Node, TensorFacts]) -> None:
        self._network, self._flavour, self._facts = network, flavour, facts
        self._sizes = {node: known.sizes for node, known in facts.items()}
        self._places = nodes.places(network)
        self._outputs = graph_outputs(network)
        self._values: dict[fx.Node, ir.Value] = {}
        self._others: list[fx.Node] = []
        """Nodes that no row writes and nothing that is written has read yet."""
        image = next(node for node in network.graph.nodes if node.op == "placeholder")
        self._file = OnnxFile(called_input(network), facts[image], list(self._outputs))
        self._values[image] = self._file.input

    def model(self) -> ir.Model:
        for node in self._network.graph.nodes:
            if node.op == "get_attr" and node in self._facts:
                self._values[node] = self._file.number(str(node.target), nodes.held_tensor(self._network, node))
            elif node.op.startswith("call") and not self._write(node):
                self._others.append(node)
        self._write_others()
        return self._file.model({name: self._values[node] for name, node in self._outputs.items()})

    def tensors(self) -> dict[str, str]:
        """What the results of nodes are called, once the model is written."""
        return {node.name: str(value.name) for node, value in self._values.items() if node.op.startswith("call")}

    def _write(self, node: fx.Node) -> bool:
        """Whether a row has written this node."""
        module = nodes.module_of(self._network, node)
        emit = emission_of(module, node.target)
        if emit is None or not all(self._is_real(each) for each in (node, *node.all_input_nodes)):
            return False
        if not set(self._others).isdisjoint(node.all_input_nodes):
            self._write_others()
        path = self._places[node] if module is None else str(node.target)
        value = emit(Emission(self._file, node, module, path, self._flavour, self._values, self._sizes))
        if value is None:
            return False
        self._file.describe(value, self._facts[node])
        self._values[node] = value
        return True

    def _is_real(self, node: fx.Node) -> bool:
        return node in self._facts and self._facts[node].dtype.is_floating_point

    def _write_others(self) -> None:
        write_others(self._network, self._others, self._facts, self._values, self._file, self._places)
        self._others = []
