"""The teacher in FP16: what becomes of its file, and a run in which every tensor really is FP16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from faqd.bundle import TEACHER_FP16, VERIFY, load_bundle
from faqd.deploy import bundle_files as student
from faqd.deploy.export.float16 import LARGEST, float16_from_float32
from faqd.deploy.export.teacher_float16 import run_stored, teacher_float16
from faqd.deploy.onnx_model.session import OnnxSession
from faqd.files import read_json
from tests.fixtures.qdq_network import SHAPE, residual_network
from tests.fixtures.toy_runs import faqd_deploy, new_user, succeeds

X = np.array([[1, 2, 3, 0.5]], np.float32)


def network(*nodes: onnx.NodeProto, **constants: Any) -> onnx.ModelProto:
    """From `input` to `output`, both (batch, 4) float32."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("input", "output")]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(list(nodes), "small", values[:1], values[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def node(operator: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [output], output, **attributes)


SCALED_UP_AND_DOWN = network(
    node("Mul", ["input", "up"], "large"),
    node("Mul", ["large", "down"], "output"),
    up=np.float32(60000),
    down=np.float32(1e-4),
)


def test_an_overflow_between_operators_is_seen() -> None:
    half = float16_from_float32(SCALED_UP_AND_DOWN)
    whole = OnnxSession(half.SerializeToString(), optimise=False).run({"input": X})["output"]
    assert np.isfinite(whole).all(), "onnxruntime's CPU keeps float32 in between: it shows nothing of the overflow"
    found, why = teacher_float16(SCALED_UP_AND_DOWN, X)
    assert found is None and "operator large (Mul) gives values beyond FP16's 65504" in why


def test_every_tensor_is_rounded() -> None:
    model = network(node("Add", ["input", "one"], "sum"), node("Sub", ["sum", "one"], "output"), one=np.float32(1024))
    half, _ = teacher_float16(model, X)
    assert half is not None
    np.testing.assert_array_equal(run_stored(half, X)["output"], [[1, 2, 3, 0]])  # 1024.5 is none of FP16's numbers.


@pytest.mark.parametrize(
    "model",
    [
        network(
            node("Cast", ["input"], "real", to=TensorProto.FLOAT),
            node("Mul", ["real", "two"], "output"),
            two=np.float32(2),
        ),
        network(
            node("Constant", [], "two", value=numpy_helper.from_array(np.float32(2))),
            node("Mul", ["input", "two"], "output"),
        ),
        network(node("Constant", [], "two", value_float=2.0), node("Mul", ["input", "two"], "output")),
        network(
            node("Greater", ["input", "zero"], "positive"),
            node("Cast", ["positive"], "mask", to=TensorProto.FLOAT),
            node("Mul", ["input", "mask"], "kept"),
            node("Add", ["kept", "kept"], "output"),
            zero=np.float32(0),
        ),
    ],
    ids=["cast", "constant", "constant of a float", "mask"],
)
def test_types_that_the_graph_states_follow(model: onnx.ModelProto) -> None:
    half, why = teacher_float16(model, X)
    assert half is not None, why
    np.testing.assert_array_equal(run_stored(half, X)["output"], 2 * X)


def test_a_constant_beyond_fp16_becomes_its_largest() -> None:
    model = network(node("Max", ["input", "least"], "output"), least=np.float32(-1e9))
    half, why = teacher_float16(model, X)
    assert half is not None, why
    (least,) = (numpy_helper.to_array(tensor) for tensor in half.graph.initializer)
    assert least == -LARGEST


def test_an_operator_without_fp16_is_a_reason_and_no_traceback() -> None:
    model = network(
        node("Range", ["zero", "four", "one"], "ramp"),
        node("Add", ["input", "ramp"], "output"),
        zero=np.float32(0),
        four=np.float32(4),
        one=np.float32(1),
    )
    found, why = teacher_float16(model, X)
    assert found is None and "has no FP16 form" in why


def test_the_run_is_onnxruntimes_where_nothing_is_rounded() -> None:
    model, x = residual_network(), np.random.default_rng(0).normal(size=(40, *SHAPE)).astype(np.float32)
    whole = OnnxSession(model.SerializeToString(), optimise=False).run({"images": x})
    np.testing.assert_allclose(run_stored(model, x)["classifier"], whole["classifier"], atol=1e-5)


def test_a_bundle_goes_without_where_the_teacher_overflows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "teacher_float16", lambda model, images: (None, "operator x gives too much"))
    user = new_user(tmp_path)
    small = ("--target", "onnxruntime", "--calibration-images", 8, "--eval-samples", 8)
    said = succeeds(faqd_deploy("ptq", *user.teacher, *user.data, *small, "--out", tmp_path / "bundle")).stderr
    assert "no teacher.fp16.onnx: operator x gives too much. The teacher's engine will be FP32." in said
    assert not load_bundle(tmp_path / "bundle").has(TEACHER_FP16)
    assert "teacher_float16" not in read_json(tmp_path / "bundle" / VERIFY)
