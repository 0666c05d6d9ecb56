"""Why a layer is not INT8: every rule on the file that breaks it, and against what TensorRT-RTX really builds."""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn

from faqd.bundle import STUDENT_ONNXRUNTIME, STUDENT_TENSORRT, write_manifest
from faqd.deploy.engine.build import engine_from_onnx
from faqd.deploy.engine.options import BuildOptions
from faqd.deploy.explain.explain import explanation
from faqd.deploy.explain.tensorrt_rules import RULES
from faqd.errors import UserError
from tests.fixtures.qdq_layers import LAYER, MIDDLES, Builder, float_stem, network
from tests.fixtures.qdq_network import LAYERS, residual_network, unbuildable_network, written
from tests.fixtures.tiny_bundles import facts_of
from tests.fixtures.toy_runs import faqd_deploy, succeeds

RTX = importlib.util.find_spec("tensorrt_rtx") is not None
needs_rtx = pytest.mark.skipif(
    not RTX, reason="tensorrt-rtx is not installed (pip install 'faqd[rtx]'): nothing here can build an engine"
)

BREAKS = {
    "QLinearConv": "operator",
    "deformable": "no such operator",
    "computed scale": "scale",
    "weight times factor per row": "weight quantized",
    "weight clipped": "weight quantized",
    "nonzero pad between": "input quantized",
    "input uint8 128": "zero point",
    "input int8 zero point": "zero point",
    "weight uint8 128": "zero point",
    "weight int8 zero point": "zero point",
    "weight uint8": "weight type",
    "weight int4": "weight type",
    "weight uint4": "weight type",
    "input int16": "activation type",
    "int32 bias": "bias",
    "transposed": "transposed convolution",
    "float weight": "weight quantized",
    "weight on the input channel": "weight axis",
    "gemm wrong axis": "weight axis",
    "gemm transB wrong axis": "weight axis",
    "matmul wrong axis": "weight axis",
    "average pool between": "average",
    "global average between": "average",
    "relu between": "input quantized",
    "sigmoid between": "input quantized",
    "leaky between": "input quantized",
    "resize between": "input quantized",
    "sum between": "input quantized",
    "concat with float": "input quantized",
    "input per channel": "activation scale",
    "concat of other scale": "concatenation",
    "input uint8": "unsigned activation",
    "input without zero point": "unsigned activation",
}
"""Which rule each file breaks; the others break none."""


def row(record: dict[str, Any], node: str = LAYER) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in record["layers"] if row["node"] == node)
    return found


def written_case(case: str, folder: Path) -> Path:
    return written(
        network(MIDDLES[case], opset=21 if "int4" in case or "int16" in case or "blocks" in case else 19),
        folder / "net.onnx",
    )


def test_every_rule_is_broken_by_some_file() -> None:
    assert {rule.name for rule in RULES} == {*BREAKS.values(), "float8"}
    assert set(BREAKS) < set(MIDDLES)


@pytest.mark.parametrize("case", MIDDLES)
def test_the_rule_that_a_layer_breaks_is_named(case: str, tmp_path: Path) -> None:
    record = explanation(written_case(case, tmp_path), rules_only=True)
    broken = row(record)["rule"]
    assert (broken and broken["name"]) == BREAKS.get(case)
    effect = broken and broken["effect"]
    assert {layer["int8"] for layer in record["layers"] if layer["node"] != LAYER} == {
        None if effect == "refused" else True
    }
    assert row(record)["int8"] is {"refused": None, "float": False}.get(effect, True)
    assert {layer["source"] for layer in record["layers"]} == {"rule"}
    assert bool(record["refused"]) == (effect == "refused")


@needs_rtx
@pytest.mark.parametrize("case", MIDDLES)
def test_the_rules_say_what_tensorrt_builds(case: str, tmp_path: Path) -> None:
    record = explanation(written_case(case, tmp_path))
    broken = row(record)["rule"]
    assert not any(layer["contradicts_rules"] for layer in record["layers"])
    if broken and broken["effect"] == "refused":
        assert record["note"] is not None and "TensorRT" in record["note"]
        return
    assert record["note"] is None and record["source"].startswith("built here with TensorRT")
    # Of a matrix product that runs in float the builder leaves no kernel by which to tell.
    unseen = "wrong axis" in case or case in ("weight clipped", "weight times factor per row")
    assert (row(record)["source"] == "rule") == unseen


@needs_rtx
def test_where_tensorrt_was_tried_and_built_nothing_no_layer_runs(tmp_path: Path) -> None:
    """Though no rule is broken that faqd knows."""
    record = explanation(written(unbuildable_network(), tmp_path / "net.onnx"))
    (layer,) = record["layers"]
    assert layer["int8"] is None and layer["contradicts_rules"] and "which was tried here" in layer["source"]
    assert "built no engine" in record["note"]
    printed = succeeds(faqd_deploy("explain", tmp_path / "net.onnx")).stdout
    assert "refused (not as the rules say)" in " ".join(printed.split())


@pytest.mark.parametrize("operator", ["QGemm", "FusedConv", "MatMulNBits"])
def test_layers_of_onnxruntimes_own_are_listed_and_refused(operator: str, tmp_path: Path) -> None:
    model = network(MIDDLES["plain"])
    layer = next(node for node in model.graph.node if node.name == LAYER)
    layer.op_type, layer.domain = operator, "com.microsoft"
    del layer.attribute[:]
    model.opset_import.add(domain="com.microsoft", version=1)
    shape: list[str | int | None] = ["batch", 32, 16, 16]  # which nothing infers
    model.graph.value_info.append(onnx.helper.make_tensor_value_info(LAYER, onnx.TensorProto.FLOAT, shape))
    record = explanation(written(model, tmp_path / "net.onnx"), rules_only=True)
    assert row(record)["operator"] == operator and row(record)["int8"] is None
    assert row(record)["rule"]["name"] == ("no such operator" if operator == "FusedConv" else "operator")


def test_a_convolution_that_took_in_a_batch_norm_keeps_its_own_name(tmp_path: Path) -> None:
    """torch's exporter leaves it the scopes of the batch norm."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (torch.zeros(1, 3, 8, 8),), tmp_path / "net.onnx", dynamo=True, external_data=False)
    layers = explanation(tmp_path / "net.onnx", rules_only=True)["layers"]
    assert [layer["module"] for layer in layers] == ["0", "4"]


def test_a_name_that_is_made_up_is_nobody_elses(tmp_path: Path) -> None:
    model = network(MIDDLES["average pool between"])
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    convolutions[0].name, convolutions[1].name, convolutions[2].name = "Conv#0", "", "Conv#1"
    record = explanation(written(model, tmp_path / "net.onnx"), rules_only=not RTX)
    assert [layer["int8"] for layer in record["layers"]] == [True, False, True]


def test_weights_that_are_computed_of_constants_are_weights(tmp_path: Path) -> None:
    graph = Builder()
    flat = graph.add("Flatten", ["images"], "flat")
    low = [graph.constant(name, np.ones(shape, np.float32)) for name, shape in (("a", (768, 2)), ("b", (2, 16)))]
    graph.add("MatMul", [flat, graph.add("MatMul", low, "product")], "layer")
    (layer,) = explanation(written(graph.model("layer"), tmp_path / "net.onnx"), rules_only=True)["layers"][-1:]
    assert layer["node"] == "layer" and layer["rule"]["name"] == "weight quantized"


def test_an_input_that_nothing_quantizes(tmp_path: Path) -> None:
    path = written(network(MIDDLES["plain"], stem=float_stem), tmp_path / "net.onnx")
    found = row(explanation(path, rules_only=True))
    assert found["int8"] is False and found["act_bits"] == 32
    assert found["rule"]["found"] == "its input is float: stem.relu (Relu) makes it"


def test_layers_without_names_and_with_equal_names_stay_apart(tmp_path: Path) -> None:
    model = network(MIDDLES["average pool between"])
    for node in model.graph.node:
        node.name = "same" if node.op_type == "Conv" else ""
    record = explanation(written(model, tmp_path / "net.onnx"), rules_only=not RTX)
    assert [layer["int8"] for layer in record["layers"]] == [True, False, True]
    assert len({layer["node"] for layer in record["layers"]}) == 3


def test_a_zero_point_shared_through_an_identity_keeps_its_type(tmp_path: Path) -> None:
    """torch's older exporter shares equal constants so."""
    model = network(MIDDLES["plain"])
    for quantizer in [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]:
        shared = f"{quantizer.output[0]}.shared"
        model.graph.node.insert(0, onnx.helper.make_node("Identity", [quantizer.input[2]], [shared], shared))
        quantizer.input[2] = shared
    record = explanation(written(model, tmp_path / "net.onnx"), rules_only=True)
    assert {(layer["int8"], layer["rule"]) for layer in record["layers"]} == {(True, None)}


@pytest.mark.parametrize(
    ("node", "module"),
    [
        ("/layer1/layer1.0/conv1/Conv", "layer1.0.conv1"),
        ("/features/features.3/conv/conv.0/Conv", "features.3.conv.0"),
        ("/body/body.0/body.0.1/Conv", "body.0.1"),
    ],
)
def test_the_names_of_torchs_older_exporter_are_read(node: str, module: str, tmp_path: Path) -> None:
    model = network(MIDDLES["plain"])
    next(n for n in model.graph.node if n.name == LAYER).name = node
    assert row(explanation(written(model, tmp_path / "net.onnx"), rules_only=True), node)["module"] == module


# Bundles and engines ---------------------------------------------------------------------------------------------


def make_bundle(folder: Path, file: str = STUDENT_TENSORRT) -> Path:
    folder.mkdir()
    model = residual_network()
    model.producer_name = "faqd"
    for node in model.graph.node:
        node.name = f"net.{node.name}.conv" if node.name in LAYERS else node.name
    written(model, folder / file)
    labels = {"weights": "4", "inputs": "3", "weight_bits": 4, "act_bits": 3}
    known = {"operator": "Conv", "weight_shape": [8, 8, 3, 3], "runs_int8": True}
    layers = [{"name": f"net.{name}", **known, **labels} for name in LAYERS]
    write_manifest(folder, facts_of("tiny 4/3", layers=layers), {file: ""})
    return folder


def test_a_bundle_is_explained_with_the_names_and_bits_of_the_torch_modules(tmp_path: Path) -> None:
    record = explanation(make_bundle(tmp_path / "bundle"), rules_only=True)
    assert [layer["module"] for layer in record["layers"]] == [f"net.{name}" for name in LAYERS]
    assert {(layer["weight_bits"], layer["act_bits"], layer["int8"]) for layer in record["layers"]} == {(4, 3, True)}


def test_a_file_out_of_its_bundle_keeps_the_bits_of_its_metadata(tmp_path: Path) -> None:
    model = onnx.load(make_bundle(tmp_path / "bundle") / STUDENT_TENSORRT)
    model.metadata_props.add(key="faqd.bits", value="net.stem: 8 (±127) x 8 (-128..127); net.conv1: ternary x 3")
    layers = explanation(written(model, tmp_path / "alone.onnx"), rules_only=True)["layers"]
    found = [(layer["weights"], layer["inputs"], layer["weight_bits"], layer["act_bits"]) for layer in layers[:3]]
    assert found == [("8 (±127)", "8 (-128..127)", 8, 8), ("ternary", "3", 8, 3), ("int8", "int8", 8, 8)]


def test_many_places_of_one_rule_are_counted(tmp_path: Path) -> None:
    path = written(residual_network(zero=np.uint8(128)), tmp_path / "net.onnx")
    printed = succeeds(faqd_deploy("explain", path, "--rules-only")).stdout
    assert "none of its 6 layers runs" in printed and printed.count("has the zero point 128") == 8
    assert re.search(r"and \d+ more\n", printed)
    assert len(explanation(path, rules_only=True)["refused"]) > 8


@needs_rtx
def test_the_record_of_an_engine_decides_if_it_is_of_this_file(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    onnx_file, engine = bundle / STUDENT_TENSORRT, bundle / "student.tensorrt.engine"
    engine_from_onnx(onnx_file, engine, BuildOptions(), lambda _: None)
    record_file = bundle / "student.tensorrt.engine.json"
    engine_record = json.loads(record_file.read_text())
    engine_record["int8"]["products"][2]["int8"] = False
    engine_record["gpu"] = {"name": "Orin", "compute_capability": "8.7", "cuda": "12.6"}
    engine_record["layers_read_from"] = "engine inspector"
    record_file.write_text(json.dumps(engine_record))
    record = explanation(bundle)
    assert record["source"].startswith("student.tensorrt.engine: TensorRT")
    assert record["source"].endswith("on Orin, engine inspector")
    assert [layer["int8"] for layer in record["layers"]] == [True, True, False, True, True, True]
    assert [layer["contradicts_rules"] for layer in record["layers"]].index(True) == 2
    engine_record["onnx"]["sha256"] = "0" * 64
    record_file.write_text(json.dumps(engine_record))
    assert explanation(bundle)["source"].startswith("built here with")


def test_a_student_for_onnxruntime_has_nothing_to_explain(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--target tensorrt"):
        explanation(make_bundle(tmp_path / "bundle", STUDENT_ONNXRUNTIME))


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    path = written_case("average pool between", tmp_path)
    printed = succeeds(faqd_deploy("explain", path, "--rules-only")).stdout
    assert "2 of 3 convolutions and linear layers run in INT8; source: rule." in printed
    assert "Put Q/DQ after the average as well." in printed and f"{LAYER}: block.between (AveragePool)" in printed
    record = json.loads(succeeds(faqd_deploy("explain", path, "--rules-only", "--json", "-")).stdout)
    assert record == explanation(path, rules_only=True)
    for wrong in (tmp_path, tmp_path / "gone.onnx"):
        assert faqd_deploy("explain", wrong).code == 2


# Files of other tools --------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.body(x).mean((2, 3)))
        return result


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What torch's own exporter writes."""
    path = tmp_path_factory.mktemp("exported") / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of its own deprecations.
        example = (torch.zeros(1, 3, 16, 16),)
        program = torch.onnx.export(Net().eval(), example, dynamo=True, opset_version=19, verbose=False)
    assert program is not None
    program.save(str(path), external_data=False)
    return path


class Images(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str) -> None:
        generator = np.random.default_rng(0)
        draws: list[NDArray[np.float32]] = [generator.normal(size=(1, 3, 16, 16)).astype(np.float32) for _ in range(2)]
        self._feeds: Iterator[dict[str, Any]] = iter([{name: draw} for draw in draws])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def by_onnxruntime(path: Path, out: Path, **options: Any) -> Path:
    name = onnx.load(path).graph.input[0].name
    quantize_static(path, out, Images(name), per_channel=True, **options)
    return out


def test_a_float_network_is_explained_by_its_modules(exported: Path) -> None:
    record = explanation(exported, rules_only=True)
    assert [layer["module"] for layer in record["layers"]] == ["body.0", "body.2", "head"]
    assert {(layer["int8"], layer["rule"]["name"], layer["weight_bits"]) for layer in record["layers"]} == {
        (False, "weight quantized", 32)
    }


@pytest.mark.parametrize(
    ("options", "rules"),
    [
        ({"activation_type": QuantType.QUInt8}, {"zero point", "bias"}),
        ({"activation_type": QuantType.QInt8, "extra_options": {"ActivationSymmetric": True}}, {"bias"}),
        ({"quant_format": QuantFormat.QOperator, "activation_type": QuantType.QUInt8}, {"operator"}),
    ],
    ids=["defaults of a CPU user", "symmetric", "operators"],
)
def test_files_of_onnxruntime_are_explained(
    options: dict[str, Any], rules: set[str], exported: Path, tmp_path: Path
) -> None:
    record = explanation(by_onnxruntime(exported, tmp_path / "net.onnx", **options))
    assert {layer["rule"]["name"] for layer in record["layers"]} <= rules
    assert record["refused"] and {layer["int8"] for layer in record["layers"]} == {None}
    if RTX:
        assert "refuses it" in record["note"]


@needs_rtx
def test_the_cures_make_the_file_of_onnxruntime_run_in_int8(exported: Path, tmp_path: Path) -> None:
    cured = {"ActivationSymmetric": True, "QuantizeBias": False}
    path = by_onnxruntime(exported, tmp_path / "net.onnx", activation_type=QuantType.QInt8, extra_options=cured)
    record = explanation(path)
    assert record["source"].startswith("built here") and not record["refused"]
    assert [layer["int8"] for layer in record["layers"]][:2] == [True, True]
