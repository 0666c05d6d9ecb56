"""Float parts that FP16 is too coarse for stay float32 in the FP16 file, by themselves, and everything says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

import faqd
from faqd.bundle import STUDENT_TENSORRT, Bundle
from faqd.deploy.explain.explain import explanation
from faqd.deploy.explain.table import print_explanation
from faqd.deploy.export.float16 import float16_from_float32
from faqd.deploy.export.float16_islands import float32_parts
from faqd.deploy.export.stored_run import StoredRun
from faqd.deploy.export.torch_to_onnx import onnx_from_deployed, save
from faqd.deploy.inspect import inspect_folder
from faqd.deploy.onnx_model.inference import inferred
from faqd.deploy.onnx_model.session import OnnxSession
from faqd.deploy.verify.float16 import changed
from faqd.quantize.config import QuantConfig
from faqd.quantize.convert import convert
from faqd.quantize.student import Student
from tests.fixtures.networks import calibrated, images, lively

SHAPE = (3, 8, 8)


class Between(nn.Module):
    """An operator between two layers, or behind the last one."""

    def __init__(self, operator: Callable[[Tensor], Tensor], *, last: bool) -> None:
        super().__init__()
        self.operator, self.first = operator, nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Identity() if last else nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.operator(self.first(x)))  # type: ignore[no-any-return]


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


PLACES = torch.arange(64).reshape(8, 8) * 30.0
BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "a softmax": (lambda x: x.softmax(1), False),
    "a norm": (lambda x: rms(x), False),
    "squares beyond 65504": (lambda x: rms(x * 1000), True),
    "a difference of large numbers": (lambda x: (x.tanh() + 3000) - 2999.5, True),
    "a mask of -1e9": (lambda x: (x + torch.where(PLACES > 900, -1e9, 0.0)).softmax(3), False),
    "a long sum": (lambda x: x.abs().flatten(2).cumsum(2).reshape(x.shape).sin(), True),
}
"""An operator between layers -> whether it has to stay float32."""
LAST: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "probabilities": (lambda x: x.softmax(1), False),
    "moved": (lambda x: x.flatten(2).transpose(1, 2), False),
    "offsets of few pixels": (lambda x: x.sigmoid() * 2 + PLACES / 2000, False),
    "boxes by the distance of their sides": (lambda x: (PLACES + x.tanh().exp()) - (PLACES - x.tanh().exp()), True),
}


def student_of(operator: Callable[[Tensor], Tensor], *, last: bool) -> Student:
    torch.manual_seed(0)
    return calibrated(lively(Between(operator, last=last), 1), QuantConfig(8, 8), shape=SHAPE)


CASES = [
    *((name, operator, stays, False) for name, (operator, stays) in BETWEEN.items()),
    *((name, operator, stays, True) for name, (operator, stays) in LAST.items()),
]


@pytest.mark.parametrize(("name", "operator", "stays", "last"), CASES, ids=[case[0] for case in CASES])
def test_a_part_stays_float32_where_fp16_moves_what_is_seen_of_it(
    name: str, operator: Callable[[Tensor], Tensor], stays: bool, last: bool
) -> None:
    x = images(3, 12, SHAPE)
    full = onnx_from_deployed(convert(student_of(operator, last=last), "tensorrt"), x, {})
    parts = float32_parts(full, x.numpy())
    assert bool(parts) == stays, parts
    stay = {node for part in parts for node in part.nodes}
    half = float16_from_float32(full, stay)
    assert changed(half, full) == []
    types = {value.name: value.type.tensor_type.elem_type for value in inferred(half).graph.value_info}
    made = {node.name: types.get(node.output[0]) for node in half.graph.node}
    assert all(made[node] != TensorProto.FLOAT16 for node in stay)
    assert TensorProto.FLOAT16 in made.values()
    wanted = OnnxSession(full.SerializeToString(), optimise=False).run({"input": x.numpy()})
    found = StoredRun(half)({"input": x.numpy()})
    for result, values in wanted.items():
        coarse = 2**-6 if not last else 2**-9
        assert np.abs(found[result] - values).max() <= coarse * np.ptp(values), name


@pytest.mark.parametrize(("factor", "wanted"), [(1.0, []), (100.0, [("first.conv",)])])
def test_a_layer_whose_bias_takes_its_sums_back_stays_float32(factor: float, wanted: list[tuple[str, ...]]) -> None:
    model = onnx_from_deployed(convert(student_of(torch.relu, last=False), "tensorrt"), images(1, 2, SHAPE), {})
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "first.bias")
    large = numpy_helper.to_array(bias) * factor + np.float32(factor - 1)
    bias.CopyFrom(numpy_helper.from_array(large, bias.name))
    parts = float32_parts(model, images(2, 4, SHAPE).numpy())
    assert [part.nodes for part in parts] == wanted and all("bias of first.conv" in part.reason for part in parts)
    half = float16_from_float32(model, {name for part in parts for name in part.nodes})
    types = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    assert types["first.bias"] == (TensorProto.FLOAT if wanted else TensorProto.FLOAT16)
    assert types["second.bias"] == TensorProto.FLOAT16 and changed(half, model) == []


def test_a_residual_stream_stays_fp16() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)
            self.second, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x.flatten(1)[:, :16])
            x = x + self.second(self.norm(x))
            return self.last(self.norm(x))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    network = Stream().eval()
    nn.init.constant_(network.norm.bias, 3000.0)
    nn.init.constant_(network.norm.weight, 3.0)
    student, x = calibrated(network, QuantConfig(8, 8), shape=SHAPE), images(3, 8, SHAPE)
    full = onnx_from_deployed(convert(student, "tensorrt"), x, {})
    additions = {node.name for node in full.graph.node if node.op_type == "Add"}
    assert additions and all(additions.isdisjoint(part.nodes) for part in float32_parts(full, x.numpy()))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    operator, _ = BETWEEN["squares beyond 65504"]
    return faqd.export(
        student_of(operator, last=False), tmp_path_factory.mktemp("squares") / "bundle", torch.rand(24, *SHAPE)
    )


def test_the_bundle_says_what_stays_float32_and_why(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    (part,) = bundle.manifest["float32_parts"]
    assert bundle.manifest["float_type"] == "fp16" and "beyond FP16's 65504" in part["reason"]
    said = f"1 float part of {STUDENT_TENSORRT} FP32, for FP16 is too coarse there: {part['reason']}."
    assert said in inspect_folder(bundle.folder)[1]
    record = explanation(bundle.folder, rules_only=True)
    assert record["float32_parts"] == [part]
    print_explanation(record)
    assert said in " ".join(capsys.readouterr().out.split())


def test_a_number_of_a_float32_part_that_is_wrong_in_the_fp16_file_is_found(bundle: Bundle) -> None:
    full, half = (onnx.load(bundle.path(name)) for name in ("student.tensorrt.fp32.onnx", STUDENT_TENSORRT))
    assert changed(half, full) == []
    number = next(
        tensor
        for tensor in half.graph.initializer
        if numpy_helper.to_array(tensor).size == 1 and numpy_helper.to_array(tensor) == 1000
    )
    assert number.data_type == TensorProto.FLOAT
    number.CopyFrom(numpy_helper.from_array(np.float32(1001), number.name))
    assert changed(half, full) == [f"{number.name}: the FP16 file has not the numbers of the FP32 file"]


def test_tensorrt_builds_a_file_of_both_types(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    save(onnx.load(bundle.path(STUDENT_TENSORRT)), tmp_path / "student.onnx")
    record = explanation(tmp_path / "student.onnx")
    assert record["source"].startswith("built here") and all(row["int8"] for row in record["layers"])
