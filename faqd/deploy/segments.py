"""Cutting a Q/DQ file at its integer tensors, so that each layer can be compared on equal inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from faqd.deploy.referee import code_tensors


@dataclass(frozen=True)
class Segment:
    """The part of a network between integer tensors: `inputs` (codes, or the network's own) to `output`."""

    model: onnx.ModelProto
    inputs: tuple[str, ...]
    output: str

    @property
    def layer(self) -> str:
        """The torch module whose result `output` is: `stages.0.1.relu2` for the node `stages.0.1.relu2.codes`."""
        return self.model.graph.node[-1].name.rpartition(".")[0] or self.output


def segments(model: onnx.ModelProto) -> Iterator[Segment]:
    """One segment per integer tensor and per network output, in graph order."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    graph = inferred.graph
    codes = code_tensors(graph)
    known = {v.name: v for v in [*graph.value_info, *graph.input, *graph.output]}
    producer = {name: node for node in graph.node for name in node.output}
    constants = {t.name: t for t in graph.initializer}
    borders = {*codes, *(v.name for v in graph.input)}
    for target in [*codes, *(v.name for v in graph.output)]:
        needed: set[str] = set()
        stack, inputs = [target], []
        while stack:
            name = stack.pop()
            if name in borders and name != target:
                inputs.append(name)
            elif name in producer and name not in needed:
                needed.add(name)
                stack.extend(producer[name].input)
        nodes = [node for node in graph.node if needed & set(node.output)]
        used = {name for node in nodes for name in node.input}
        inputs = sorted(set(inputs))
        part = onnx.helper.make_graph(
            nodes,
            "segment",
            [known[name] for name in inputs],
            [known[target]],
            [tensor for name, tensor in constants.items() if name in used],
        )
        cut = onnx.helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
        yield Segment(cut, tuple(inputs), target)
