"""The types of an engine's kernels, read from what the builder and the inspector write."""

from __future__ import annotations

import json
from typing import Any

import pytest

from faqd.deploy.engine.kernels import kernels_from_inspector, kernels_from_log, not_int8, products

LOG = """Layers:
Name: __myl_Cast_0, LayerType: kgen, Inputs: [ { Name: images, Dimensions: [-1,3], Datatype: Float, Format: \
(Linear) Row major linear format }], Constants: [], Outputs: [ { Name: a, Datatype: Int8 }], TacticName: , \
StreamId: 0, Metadata:\x20
Name: layer1, with a comma_1, LayerType: correlation, Inputs: [ { Name: a, Datatype: Int8 }], Constants: [ { Name: w, \
Datatype: Int8 }, { Name: b, Datatype: Float }], Outputs: [ { Name: c, Datatype: Float }], TacticName: t, StreamId: 0, \
Metadata: [ONNX Layer: layer1, with a comma][ONNX Layer: dq]
Name: fc_2, LayerType: gemm, Inputs: [ { Name: c, Datatype: Float }], Constants: [], Outputs: [], TacticName: t
a line of another kind

I/O Tensors:
 Name: images, IOMode: Input, DataType: Float
"""


def test_kernels_are_read_from_the_build_log() -> None:
    kernels = kernels_from_log(LOG)
    assert [(kernel.type, kernel.inputs, kernel.outputs) for kernel in kernels] == [
        ("kgen", ("Float",), ("Int8",)),
        ("correlation", ("Int8",), ("Float",)),
        ("gemm", ("Float",), ()),
    ]
    assert not_int8(kernels) == ["fc_2"]
    nodes = [("layer1, with a comma", "convolution"), ("fused away", "convolution")]
    assert [product["int8"] for product in products(nodes, kernels)] == [True, None]
    assert kernels_from_log("") == []


@pytest.mark.parametrize(
    "tensor",
    [{"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}, {"Datatype": "Int8"}],
    ids=["TensorRT 10", "TensorRT 11"],
)
def test_kernels_are_read_from_the_inspector(tensor: dict[str, str]) -> None:
    layers: list[Any] = [
        {"Name": "Reformatting CopyNode", "LayerType": "Reformat", "Inputs": [{"Name": "x", "Datatype": "Float"}]},
        {
            "Name": "conv1 + relu",
            "LayerType": "CaskConvolution",
            "ParameterType": "Convolution",
            "Inputs": [{"Name": "a", **tensor}],
            "Outputs": [{"Name": "b", **tensor}],
            "Metadata": "[ONNX Layer: conv1]\x1e[ONNX Layer: relu]",
        },
        "only a name, as built without detailed verbosity",
    ]
    kernels = kernels_from_inspector(json.dumps({"Layers": layers}))
    assert [kernel.is_product for kernel in kernels] == [False, True]
    assert products([("conv1", "convolution")], kernels)[0]["int8"] is True
    assert kernels_from_inspector("no JSON") == []
