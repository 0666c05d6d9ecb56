"""Attention on codes is proved as layers are: code for code, in both flavours, and a wrong scale is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

import faqd
from faqd.bundle import Bundle
from faqd.deploy.export.torch_to_onnx import written_from_deployed
from faqd.deploy.reference.evaluator import Evaluator
from faqd.deploy.verify.layers import verify_file
from faqd.deploy.verify.torch_values import torch_digests
from faqd.files import read_json
from faqd.quantize.convert import collect_output_scales, convert
from faqd.quantize.operators.requantize import Flavour
from faqd.reference import Grid, real
from tests.fixtures.networks import lively
from tests.fixtures.transformer import Vit

PIXELS = torch.randint(0, 256, (16, 3, 8, 8), generator=torch.Generator().manual_seed(0)) / 255


@pytest.fixture(scope="module")
def student() -> nn.Module:
    config = faqd.QuantConfig(attention="int8")
    found = faqd.prepare(lively(Vit(), 0), PIXELS[:2], config)
    faqd.calibrate(found, PIXELS)
    return found


Written = tuple[onnx.ModelProto, dict[str, Any]]


@pytest.fixture(scope="module", params=["tensorrt", "onnxruntime"])
def written(request: pytest.FixtureRequest, student: Any) -> Written:
    flavour: Flavour = request.param
    deployed = convert(student.eval(), flavour, collect_output_scales(student, [PIXELS]))
    file = written_from_deployed(deployed, PIXELS[:2], {})
    return file.model, torch_digests(deployed, PIXELS, tensors=file.tensors)


def failures(model: onnx.ModelProto, digests: dict[str, Any]) -> list[str]:
    found: list[str] = verify_file(model, PIXELS.numpy(), digests, [False, True])["failures"]
    return found


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    found: onnx.ModelProto = onnx.ModelProto.FromString(model.SerializeToString())
    return found


def products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "MatMul"]


def test_every_product_reads_codes_and_all_are_proved(written: Written) -> None:
    model, digests = written
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    assert len(products(model)) == 4
    assert {makers[name] for node in products(model) for name in node.input} == {"DequantizeLinear"}
    assert failures(model, digests) == []


@pytest.mark.parametrize("factor", [1 + 2.0**-20, 1.01, 2.0])
@pytest.mark.parametrize("operand", [0, 1])
@pytest.mark.parametrize("product", [0, 1])
def test_a_wrong_scale_of_an_operand_is_found(product: int, operand: int, factor: float, written: Written) -> None:
    """Of the rounding and of what reads its codes; then of that alone."""
    model, digests = written
    dequantize = next(n for n in model.graph.node if n.output[0] == products(model)[product].input[operand])
    wrong, apart = copied(model), copied(model)
    (scale,) = (tensor for tensor in wrong.graph.initializer if tensor.name == dequantize.input[1])
    other = numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(factor), scale.name)
    scale.CopyFrom(other)
    assert failures(wrong, digests)
    other.name = "other"
    apart.graph.initializer.append(other)
    next(node for node in apart.graph.node if node.name == dequantize.name).input[1] = "other"
    assert failures(apart, digests)


def test_queries_and_keys_in_the_other_order_are_found(written: Written) -> None:
    model, digests = written
    wrong = copied(model)
    product = products(wrong)[0]
    left, right = product.input
    turned = [helper.make_node("Transpose", [name], [f"{name}_turned"], perm=[0, 1, 3, 2]) for name in (left, right)]
    place = list(wrong.graph.node).index(product)
    for node in turned:
        wrong.graph.node.insert(place, node)
    product.input[:] = [turned[1].output[0], turned[0].output[0]]
    assert failures(wrong, digests)


@pytest.mark.parametrize("flavour", ["tensorrt", "onnxruntime"])
def test_operands_of_products_stay_around_zero_where_all_else_is_asymmetric(flavour: Flavour) -> None:
    student = faqd.prepare(lively(Vit(), 0), PIXELS[:2], faqd.QuantConfig(attention="int8", asymmetric=True))
    faqd.calibrate(student, PIXELS)
    deployed = convert(student.eval(), flavour, collect_output_scales(student, [PIXELS]))
    file = written_from_deployed(deployed, PIXELS[:2], {})
    digests = torch_digests(deployed, PIXELS, tensors=file.tensors)
    assert any(quantizer.quant.low != -quantizer.quant.high - 1 for quantizer in student.quantizers().values())
    makers = {name: node.op_type for node in file.model.graph.node for name in node.output}
    assert {makers[name] for node in products(file.model) for name in node.input} == {"DequantizeLinear"}
    assert failures(file.model, digests) == []


def test_the_reference_sums_integers() -> None:
    draw = np.random.default_rng(0)
    codes = [draw.integers(-128, 128, (2, 3, 7, 7)).astype(np.float64) for _ in range(2)]
    scales = [np.asarray(np.float32(number), np.float64) for number in (0.0123, 0.0371)]
    node = helper.make_node("MatMul", ["a", "b"], ["c"])
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 3, 7, 7]) for name in "abc"]
    graph = helper.make_graph([node], "one", values[:2], values[2:])
    evaluator = Evaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)]))
    (found,) = evaluator.results(node, [Grid(code, scale) for code, scale in zip(codes, scales, strict=True)])
    assert np.array_equal(real(found), (codes[0] @ codes[1]) * (scales[0] * scales[1]))


def test_a_bundle_says_that_its_attention_is_int8_and_is_proved_in_fp16_too(student: Any, tmp_path: Path) -> None:
    bundle: Bundle = faqd.export(student, tmp_path / "bundle", PIXELS)
    assert bundle.manifest["attention"] == "int8" and bundle.manifest["int8_share"] == 1.0
    assert bundle.manifest["float_type"] == "fp16"
    found = read_json(bundle.folder / "verify.json")["flavours"]
    assert {name: flavour["passed"] for name, flavour in found.items()} == {"tensorrt": True, "onnxruntime": True}
