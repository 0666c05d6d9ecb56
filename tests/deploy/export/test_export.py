"""The exported files themselves: what is in them, what runs them, and what must not be in them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from faqd.deploy.engine.build import engine_from_onnx
from faqd.deploy.engine.options import BuildOptions
from faqd.deploy.export.float16 import float16_from_float32
from faqd.deploy.export.torch_to_onnx import onnx_from_deployed, save
from faqd.deploy.onnx_model.load import load_model
from faqd.deploy.onnx_model.session import OnnxSession
from faqd.deploy.reference.evaluator import Evaluator, stored
from faqd.deploy.verify.layers import verify_file
from faqd.deploy.verify.segments import segments
from faqd.deploy.verify.torch_values import torch_digests
from faqd.quantize.config import QuantConfig
from faqd.quantize.convert import collect_output_scales, convert
from faqd.quantize.operators.emit import OPSET
from faqd.quantize.operators.requantize import Flavour
from faqd.quantize.student import Student
from faqd.train.networks.zoo import build_architecture
from tests.fixtures.networks import CHANNELS, calibrated, conv, images, lively

SHAPE = (3, 32, 32)
FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "onnxruntime")

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed (pip install 'faqd[rtx]'): nothing here can build an engine",
)


@pytest.fixture(scope="module")
def student() -> Student:
    return calibrated(lively(build_architecture("resnet8", 3, 10, 32), 1), QuantConfig(4, 4), shape=SHAPE)


@pytest.fixture(scope="module")
def models(student: Student) -> dict[str, onnx.ModelProto]:
    return {flavour: exported(student, flavour) for flavour in FLAVOURS}


@pytest.fixture(scope="module")
def half(models: dict[str, onnx.ModelProto]) -> onnx.ModelProto:
    return float16_from_float32(models["tensorrt"])


def exported(student: Student, flavour: Flavour) -> onnx.ModelProto:
    deployed = convert(student, flavour, collect_output_scales(student, [images(2, 16, SHAPE)]))
    return onnx_from_deployed(deployed, torch.zeros(2, *SHAPE), {"faqd.bits": "4/4"})


def constants(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def activation_parameters(model: onnx.ModelProto) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    values = constants(model)
    nodes = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    return [(values[node.input[1]], values[node.input[2]]) for node in nodes]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_it_is_standard_onnx(models: dict[str, onnx.ModelProto], flavour: str) -> None:
    model = models[flavour]
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)] and OPSET == 19
    assert {node.domain for node in model.graph.node} == {""}
    assert {entry.key: entry.value for entry in model.metadata_props} == {"faqd.bits": "4/4"}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_batch_is_free(models: dict[str, onnx.ModelProto], flavour: str) -> None:
    session = OnnxSession(models[flavour].SerializeToString(), optimise=False)
    assert session.inputs == ("input",) and session.outputs == ("logits",)
    x = images(3, 5, SHAPE).numpy()
    together = session.run({"input": x})["logits"]
    alone = np.concatenate([session.run({"input": image[None]})["logits"] for image in x])
    np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_names_come_from_the_torch_modules_and_are_unique(models: dict[str, onnx.ModelProto], flavour: str) -> None:
    graph = models[flavour].graph
    names = [node.name for node in graph.node]
    tensors = [name for node in graph.node for name in node.output] + [tensor.name for tensor in graph.initializer]
    assert len(set(names)) == len(names) and len(set(tensors)) == len(tensors)
    products = {node.name for node in graph.node if node.op_type in ("Conv", "Gemm")}
    assert {"stem.0.conv", "stages.1.0.conv1.conv", "stages.2.0.shortcut.0.conv", "classifier.gemm"} < products
    assert {"stem.2.codes", "stages.0.0.relu2.codes"} <= set(names)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_nothing_of_this_machine_is_in_the_file(models: dict[str, onnx.ModelProto], flavour: str) -> None:
    data = models[flavour].SerializeToString()
    for trace in (str(Path.home()), str(Path(torch.__file__).parent), str(Path.cwd()), "site-packages", ".py", "File "):
        assert trace.encode() not in data, trace
    assert not any(node.metadata_props or node.doc_string for node in models[flavour].graph.node)


def test_tensorrt_scales_are_single_and_zero_points_are_int8_zero(models: dict[str, onnx.ModelProto]) -> None:
    for scale, zero_point in activation_parameters(models["tensorrt"]):
        assert scale.shape == () == zero_point.shape and scale.dtype == np.float32 and scale > 0
        assert zero_point.dtype == np.int8 and zero_point == 0


def test_onnxruntime_zero_points_are_uint8_and_biases_int32(models: dict[str, onnx.ModelProto]) -> None:
    for scale, zero_point in activation_parameters(models["onnxruntime"]):
        assert scale.shape == () == zero_point.shape and zero_point.dtype == np.uint8 and int(zero_point) in (0, 128)
    values = constants(models["onnxruntime"])
    makers = {name: node for node in models["onnxruntime"].graph.node for name in node.output}
    layers = [node for node in models["onnxruntime"].graph.node if node.op_type in ("Conv", "Gemm")]
    for layer in layers:
        weight, bias = makers[layer.input[1]], makers[layer.input[2]]
        read = makers[layer.input[0]]
        assert values[weight.input[0]].dtype == np.int8 and values[bias.input[0]].dtype == np.int32
        step = values[read.input[1]].astype(np.float64) * values[weight.input[1]]
        np.testing.assert_array_equal(values[bias.input[1]], step.astype(np.float32))


def test_no_two_layers_share_an_initializer(models: dict[str, onnx.ModelProto]) -> None:
    for model in models.values():
        codes = [node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"]
        stored_codes = [name for name in codes if name in constants(model)]
        assert len(stored_codes) == len(set(stored_codes))


def test_equal_students_give_equal_bytes(student: Student, models: dict[str, onnx.ModelProto], tmp_path: Path) -> None:
    save(models["tensorrt"], tmp_path / "a.onnx")
    save(exported(student, "tensorrt"), tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert load_model(tmp_path / "a.onnx") == models["tensorrt"]


def test_fp16_keeps_float32_scales_and_interfaces(half: onnx.ModelProto, models: dict[str, onnx.ModelProto]) -> None:
    values, full = constants(half), constants(models["tensorrt"])
    for node in half.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert values[node.input[1]].dtype == np.float32
            np.testing.assert_array_equal(values[node.input[1]], full[node.input[1]])
    assert {values[name].dtype for name in values if name.endswith(".bias")} == {np.dtype(np.float16)}
    elements = [value.type.tensor_type.elem_type for value in [*half.graph.input, *half.graph.output]]
    assert elements == [TensorProto.FLOAT, TensorProto.FLOAT]


def test_fp16_codes_are_within_one_of_fp32(half: onnx.ModelProto, models: dict[str, onnx.ModelProto]) -> None:
    values = Evaluator(models["tensorrt"]).run({"input": images(4, 8, SHAPE).numpy()})
    compared = 0
    for segment in segments(half):
        feeds = {name: stored(values[name]) for name in segment.inputs}
        found = OnnxSession(segment.model.SerializeToString(), optimise=False).run(feeds)[segment.output]
        if found.dtype == np.int8:
            difference = np.abs(found.astype(int) - values[segment.output].astype(int))
            assert np.mean(difference <= 1) >= 0.999, segment.layer
            compared += 1
    assert compared == len(activation_parameters(half))


def test_fp16_of_a_network_that_returns_a_rounded_map_and_an_inner_sum() -> None:
    class TwoOutputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2, self.fc = conv(3), conv(), nn.Linear(CHANNELS, 10)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            first = self.conv1(x).relu()
            second = self.conv2(first) + first
            return first, second, self.fc(second.relu().mean((2, 3)))

    deployed = convert(calibrated(lively(TwoOutputs(), 1), QuantConfig(4, 4)), "tensorrt")
    full = onnx_from_deployed(deployed, images(1, 2), {})
    x = images(2, 8)
    digests = torch_digests(deployed, x)
    assert list(digests["outputs"]) == ["logits_0", "logits_1", "logits_2"]
    assert verify_file(full, x.numpy(), digests, [False])["failures"] == []
    found = OnnxSession(float16_from_float32(full).SerializeToString(), optimise=False).run({"input": x.numpy()})
    for name, wanted in zip(digests["outputs"], deployed(x), strict=True):
        assert found[name].dtype == np.float32
        assert np.abs(found[name] - wanted.numpy()).mean() < 0.02 * wanted.abs().mean()


@needs_rtx
def test_tensorrt_builds_it_with_every_layer_in_int8(half: onnx.ModelProto, tmp_path: Path) -> None:
    save(half, tmp_path / "student.onnx")
    record = engine_from_onnx(tmp_path / "student.onnx", tmp_path / "student.engine", BuildOptions(), lambda _: None)
    assert {product["int8"] for product in record["int8"]["products"]} == {True}
    assert len(record["int8"]["products"]) == 10 and record["not_int8"] == []
