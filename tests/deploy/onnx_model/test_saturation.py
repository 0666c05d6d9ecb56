"""Sums of onnxruntime's kernels that could saturate: none in what we write, told in what others write."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from faqd import cpu, saturation
from faqd.bundle import STUDENT_ONNXRUNTIME, Bundle, load_bundle
from faqd.deploy.explain.explain import explanation
from faqd.deploy.explain.table import print_explanation
from faqd.deploy.export.torch_to_onnx import onnx_from_deployed
from faqd.deploy.onnx_model.graph import Graph
from faqd.deploy.onnx_model.integer_sums import integer_sums, intervals
from faqd.deploy.onnx_model.session import OnnxSession
from faqd.deploy.reference.int16_kernel import emulated
from faqd.deploy.verify import layers as verify_layers
from faqd.deploy.verify import verify
from faqd.deploy.verify.layers import SATURATED, trace_of, verify_file
from faqd.deploy.verify.segments import Segment
from faqd.deploy.verify.torch_values import torch_digests
from faqd.deploy.verify.verify import verified
from faqd.files import read_json, write_json
from faqd.proof import proof_of
from faqd.quant import Quant, weight_quant
from faqd.quantize.config import QuantConfig
from faqd.quantize.convert import Deployed, collect_output_scales, convert
from faqd.quantize.lowering import pair_limits
from faqd.quantize.operators.filling import Filling
from faqd.quantize.quantizers.weight import WeightQuantizer, project, within_pairs
from faqd.quantize.student import Student
from faqd.train.networks.zoo import build_architecture
from tests.deploy.verify.test_verify import NETWORK
from tests.fixtures.networks import calibrated, images, lively
from tests.fixtures.toy_runs import faqd_deploy

SHAPE = (3, 16, 16)


class Everything(nn.Module):
    """Layers of all kinds that read signed codes: odd channels, stride, dilation, groups, a multiplier, linear.

    Next to nothing stands between them: what a SiLU reads is no integer sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(10, 24, 3, dilation=2, padding=2)
        self.grouped = nn.Conv2d(24, 24, 3, groups=4, padding=1)
        self.depthwise = nn.Conv2d(24, 24, 5, groups=24, padding=2)
        self.multiplied = nn.Conv2d(24, 48, 3, groups=24)
        self.point = nn.Conv2d(48, 16, 1)
        self.hidden, self.head = nn.Linear(64, 12), nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.grouped(self.dilated(self.stem(x))))
        x = nn.functional.max_pool2d(self.point(self.multiplied(x)), 3).flatten(1)
        result: torch.Tensor = self.head(nn.functional.leaky_relu(self.hidden(x), 0.5))
        return result


def student_of(network: nn.Module, bits: QuantConfig) -> Student:
    return calibrated(lively(network, 1), bits, shape=SHAPE)


def lowered(student: Student) -> tuple[Deployed, onnx.ModelProto]:
    deployed = convert(student, "onnxruntime", collect_output_scales(student, [images(2, 16, SHAPE)]))
    return deployed, onnx_from_deployed(deployed, images(3, 2, SHAPE), {})


@pytest.fixture
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no pair were too large: the files of faqd 0.1.0."""
    monkeypatch.setattr(saturation, "pair_limit", lambda highest: 10**6)


# The rule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "limit"), [(Quant(0, 127), 258), (Quant(0, 255), 128), (Quant(-128, 127), 128)])
def test_no_codes_carry_a_pair_within_the_limit_beyond_int16(grid: Quant, limit: int) -> None:
    highest = grid.high + saturation.zero_point(grid)
    assert saturation.pair_limit(highest) == limit
    assert highest * limit <= 2**15 - 1 < highest * (limit + 1)


def test_neighbours_have_the_channels_innermost() -> None:
    weight = np.zeros((1, 3, 1, 2), np.int64)
    weight[0, :, 0, 0], weight[0, :, 0, 1] = (1, 2, 4), (8, -16, -32)
    rows = saturation.in_kernel_order(weight)
    assert rows.tolist() == [[1, 2, 4, 8, -16, -32]]
    assert saturation.largest_pairs(rows).tolist() == [48]
    assert saturation.largest_pairs(rows[:, :5]).tolist() == [16]
    assert saturation.largest_pairs(np.array([[100, -100, 0, 0]])).tolist() == [100]


@pytest.mark.parametrize("at_end", [0, 1])
@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("shape", [(16, 3, 3, 3), (7, 5), (8, 12, 1), (4, 1, 3, 3)], ids=str)
@pytest.mark.parametrize("bits", [8, 7, 4])
def test_weights_within_pairs(axis: int | None, shape: tuple[int, ...], bits: int, at_end: int) -> None:
    quant = weight_quant(bits, axis)
    for seed in range(5):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        codes, scale = project(weight, quant)
        found, coarser = within_pairs(weight, codes, scale, quant, 128, at_end)
        filled = [Filling(at_end)(c) for c in (codes, found)]
        pairs = [saturation.largest_pairs(saturation.in_kernel_order(c.numpy())) for c in filled]
        assert (pairs[1] <= 128).all() and (bits > 7 or torch.equal(found, codes))
        changed = (found != codes).flatten(1).any(1).numpy()
        assert ((pairs[0] > 128) >= changed).all() or axis is None
        assert (changed | (axis is None) | (pairs[0] <= 128)).all()
        error = (weight - found * coarser.reshape(-1, *[1] * (weight.dim() - 1))).norm()
        assert error / weight.norm() < {8: 0.02, 7: 0.03, 4: 0.2}[bits]


# What we write -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
@pytest.mark.parametrize("bits", [8, 4, 1])
@pytest.mark.parametrize("name", ["resnet8", "everything"])
def test_no_sum_of_a_written_file_saturates(target: Any, bits: int, name: str) -> None:
    network = Everything() if name == "everything" else build_architecture(name, 3, 10, 16)
    student = student_of(network, QuantConfig(bits, 8, target))
    deployed, model = lowered(student)
    sums = integer_sums(model)
    assert len(sums) >= 7 and not any(found.saturates for found in sums)
    assert max(found.largest_sum for found in sums) > 2**14
    x = images(5, 16, SHAPE, reach=3.0)
    assert verify_file(model, x.numpy(), torch_digests(deployed, x), [False, True])["failures"] == []
    # A student for TensorRT has its trained weights there; one for onnxruntime alone was trained within the limits.
    assert (deployed.changes.coarser == {}) == (target == "onnxruntime" or name == "resnet8")
    if target == "tensorrt":
        assert convert(student, "tensorrt").changes.coarser == {}


def test_the_tensorrt_file_knows_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    students = [student_of(Everything(), QuantConfig(8, 8))]
    monkeypatch.setattr(pair_limits, "pair_limit", lambda *_: None)
    students.append(student_of(Everything(), QuantConfig(8, 8)))
    files = [onnx_from_deployed(convert(s, "tensorrt"), images(3, 2, SHAPE), {}) for s in students]
    assert files[0].SerializeToString(deterministic=True) == files[1].SerializeToString(deterministic=True)


def test_weights_trained_before_the_rule_are_right_everywhere() -> None:
    student = student_of(Everything(), QuantConfig(8, 8, "onnxruntime"))
    for module in student.network.modules():
        if isinstance(module, WeightQuantizer):
            module.pair_limit = None
    deployed, model = lowered(student)
    assert deployed.changes.coarser and not any(found.saturates for found in integer_sums(model))


# What others write -------------------------------------------------------------------------------------------------


def constant(name: str, values: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values), name)


def layer_file(
    operator: str, weight: NDArray[Any], reads: list[onnx.NodeProto], *, codes: Any = np.uint8, zero: int = 0
) -> onnx.ModelProto:
    """x -> QuantizeLinear (scale 1) -> `reads` from `codes` to `read` -> a layer -> QuantizeLinear."""
    grid = [constant("one", np.float32(1)), constant("zero", codes(zero))]
    nodes = [helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["codes"], "round")]
    nodes += reads or [helper.make_node("DequantizeLinear", ["codes", "one", "zero"], ["read"])]
    if operator == "QLinearConv":
        nodes = nodes[:1]
        nodes.append(
            helper.make_node(operator, ["codes", "one", "zero", "w", "one", "w_zero", "one", "zero"], ["y"], "layer")
        )
    elif operator == "MatMulInteger":
        nodes = [*nodes[:1], helper.make_node(operator, ["codes", "w", "zero", "w_zero"], ["y"], "layer")]
    else:
        turned: dict[str, Any] = {"transB": 1} if operator == "Gemm" else {}
        nodes.append(helper.make_node("DequantizeLinear", ["w", "one", "w_zero"], ["real_w"]))
        nodes.append(helper.make_node(operator, ["read", "real_w"], ["out"], "layer", **turned))
        nodes.append(helper.make_node("QuantizeLinear", ["out", "one", "zero"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, None)],
        [*grid, constant("w", weight), constant("w_zero", np.zeros((), weight.dtype)), *LIMITS],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


LIMITS = [constant("low", np.uint8(0)), constant("high", np.uint8(127)), constant("six", np.float32(100))]
WEIGHT = np.full((4, 4, 1, 1), 100, np.int8)
CLIPPED = [
    helper.make_node("Clip", ["codes", "low", "high"], ["clipped"]),
    helper.make_node("DequantizeLinear", ["clipped", "one", "zero"], ["real"]),
    helper.make_node("MaxPool", ["real"], ["pooled"], kernel_shape=[1, 1]),
    helper.make_node("Concat", ["pooled", "pooled"], ["joined"], axis=2),
    helper.make_node("QuantizeLinear", ["joined", "one", "zero"], ["again"]),
    helper.make_node("DequantizeLinear", ["again", "one", "zero"], ["read"]),
]


@pytest.mark.parametrize(
    ("model", "highest", "pair"),
    [
        (layer_file("Conv", WEIGHT, []), 255, 200),
        (layer_file("Conv", WEIGHT, [], zero=128), 255, 200),
        (layer_file("Conv", WEIGHT, CLIPPED), 127, 200),
        (layer_file("Gemm", np.array([[1, 2, 30]], np.int8), []), 255, 30),
        (layer_file("MatMul", np.array([[1], [2], [30]], np.int8), []), 255, 30),
        (layer_file("MatMulInteger", np.array([[9], [2], [3]], np.int8), []), 255, 11),
        (layer_file("QLinearConv", WEIGHT, []), 255, 200),
        (layer_file("Conv", WEIGHT.astype(np.uint8), []), None, None),
        (layer_file("Conv", WEIGHT, [], codes=np.int8), None, None),
    ],
    ids=["conv", "signed", "clipped", "gemm", "matmul", "integers", "qlinear", "unsigned weights", "signed codes"],
)
def test_what_a_layer_reads_and_adds(model: onnx.ModelProto, highest: int | None, pair: int | None) -> None:
    found = [(entry.highest_code, entry.largest_pair) for entry in integer_sums(model)]
    assert found == ([] if highest is None else [(highest, pair)])


def test_a_layer_that_stays_float_is_no_sum() -> None:
    model = layer_file("Conv", WEIGHT, [])
    del model.graph.node[-1]
    model.graph.output[0].name = "out"
    assert integer_sums(model) == []


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes", "interval"),
    [
        ("Relu", ["a"], {}, (0, 5)),
        ("Clip", ["a", "", "b"], {}, (-3, 2)),
        ("Add", ["a", "b"], {}, (-1, 7)),
        ("Sigmoid", ["a"], {}, (0, 1)),
        ("Pad", ["b"], {}, (0, 2)),
        ("AveragePool", ["b"], {"kernel_shape": [2]}, (0, 2)),
        ("Concat", ["a", "b"], {"axis": 0}, (-3, 5)),
        ("Mul", ["a", "b"], {}, (-math.inf, math.inf)),
    ],
)
def test_between_which_numbers_a_tensor_lies(
    operator: str, inputs: list[str], attributes: dict[str, Any], interval: tuple[float, float]
) -> None:
    graph = helper.make_graph(
        [helper.make_node(operator, inputs, ["y"], **attributes)],
        "one",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [constant("a", np.array([-3, 5], np.float32)), constant("b", np.array([2], np.float32))],
    )
    assert intervals(Graph(helper.make_model(graph)))["y"] == interval


# The cause, and the verdict ----------------------------------------------------------------------------------------


class SaturatingSession(OnnxSession):
    """onnxruntime as it is on a CPU that adds in int16, but for models that are not one layer."""

    def __init__(self, source: Path | str | bytes, *, optimise: bool = True, **options: Any) -> None:
        super().__init__(source, optimise=optimise, **options)
        self._model = onnx.load_from_string(source) if isinstance(source, bytes) and optimise else None

    def run(self, feeds: Any) -> dict[str, NDArray[Any]]:
        found = super().run(feeds)
        if self._model is not None and len(self.outputs) == 1:
            values = emulated(self._model, dict(feeds), self.outputs[0])
            found |= {} if values is None else {self.outputs[0]: values}
        return found


def turned_around(model: onnx.ModelProto, feeds: dict[str, NDArray[Any]], output: str) -> NDArray[Any] | None:
    found = emulated(model, feeds, output)
    return None if found is None else found[::-1]


@pytest.mark.usefixtures("unlimited")
def test_verify_names_saturation_as_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    deployed, model = lowered(student_of(Everything(), QuantConfig(8, 8)))
    assert sum(found.saturates for found in integer_sums(model)) >= 6
    x = images(5, 16, SHAPE, reach=3.0)
    digests = torch_digests(deployed, x)
    monkeypatch.setattr(verify_layers, "OnnxSession", SaturatingSession)
    result = verify_file(model, x.numpy(), digests, [False, True])
    of_layers = [text for text in result["failures"] if not text.startswith("all layers")]
    assert len(of_layers) >= 6 and all(text.endswith(SATURATED) for text in of_layers)
    # What differs otherwise is not put down to it.
    monkeypatch.setattr(verify_layers, "emulated", turned_around)
    assert not any(SATURATED in text for text in verify_file(model, x.numpy(), digests, [True])["failures"])


@pytest.mark.usefixtures("unlimited")
def test_a_large_layer_is_emulated_for_some_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    deployed, model = lowered(student_of(Everything(), QuantConfig(8, 8)))
    x = images(5, 16, SHAPE, reach=3.0).numpy()
    cut: list[tuple[Segment, dict[str, NDArray[Any]]]] = []
    for segment, feeds, _ in trace_of(model, x, torch_digests(deployed, images(5, 16, SHAPE, reach=3.0))):
        cut.append((segment, feeds))
    whole = [emulated(s.model, feeds, s.output) for s, feeds in cut]
    monkeypatch.setattr("faqd.deploy.reference.int16_kernel.MOST_PRODUCTS", 2**18)
    some = [emulated(s.model, feeds, s.output) for s, feeds in cut]
    pairs = [(a, b) for a, b in zip(whole, some, strict=True) if a is not None and b is not None]
    assert len(pairs) >= 6 and any(len(b) < len(a) for a, b in pairs)
    assert all(np.array_equal(a[: len(b)], b) for a, b in pairs)


@pytest.fixture
def old(unlimited: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle whose file for onnxruntime can saturate, verified on a CPU with VNNI."""
    (tmp_path / "net.py").write_text(NETWORK)
    monkeypatch.setattr(cpu, "instruction_sets", lambda: ["avx2", "avx512", "avx512-vnni"])
    for place in (verify, verify_layers):
        monkeypatch.setattr(place, "OnnxSession", ExactSession)
    arguments = ("--data", "digits", "--calibration-images", 64, "--eval-samples", 40)
    weights = tmp_path / "best.pth"
    space: dict[str, Any] = {}
    exec(NETWORK, space)
    torch.save(lively(space["Net"](), 1).state_dict(), weights)
    net = ("--teacher", f"{tmp_path}/net.py:Net", "--teacher-weights", weights)
    assert faqd_deploy("ptq", *net, *arguments, "--out", tmp_path / "bundle").code == 0
    return load_bundle(tmp_path / "bundle")


class ExactSession(OnnxSession):
    """onnxruntime as it is on a CPU that adds in int32: as written it multiplies floats, and these are exact."""

    def __init__(self, source: Path | str | bytes, *, optimise: bool = True, **options: Any) -> None:
        super().__init__(source, optimise=optimise and not cpu.adds_pairs_in_int16(REAL_SETS), **options)


REAL_SETS = cpu.instruction_sets()


def test_a_verdict_is_bound_to_the_cpus_it_was_seen_on(old: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = read_json(old.folder / "verify.json")["flavours"]
    assert verdicts["onnxruntime"]["integer_sums"]["saturating"] and verdicts["onnxruntime"]["passed"]
    assert [verdicts[key]["every_cpu"] for key in ("tensorrt", "onnxruntime")] == [True, False]
    assert proof_of(old, "onnxruntime").status == "passed"
    monkeypatch.setattr(cpu, "instruction_sets", lambda: ["avx2"])
    proof = proof_of(old, "onnxruntime")
    assert proof.status == "elsewhere" and "avx512-vnni" in str(proof.complaint)
    assert proof_of(old, "tensorrt").status == "passed"
    outcome = faqd_deploy("inspect", old.folder)
    assert "verify tensorrt: passed" in outcome.stdout and "NOT PROVED ON THIS CPU" in outcome.stdout
    # Seen there as well, it counts on both.
    write_json(old.folder / "verify.json", verified(old))
    kinds = read_json(old.folder / "verify.json")["flavours"]["onnxruntime"]["cpu_kinds"]
    assert len(kinds) == 2 and proof_of(old, "onnxruntime").status == "passed"


def test_what_fails_for_onnxruntime_keeps_no_engine_from_being_built(
    old: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_layers, "OnnxSession", SaturatingSession)
    outcome = faqd_deploy("verify", old.folder)
    assert outcome.code == 1 and "int16" in outcome.stderr and "The TensorRT file passed" in outcome.stdout
    assert proof_of(old, "onnxruntime").status == "failed" and proof_of(old, "tensorrt").status == "passed"
    outcome = faqd_deploy("inspect", old.folder)
    assert "verify tensorrt: passed" in outcome.stdout and "verify onnxruntime: FAILED" in outcome.stdout


def test_explain_tells_where_a_file_saturates(old: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    record = explanation(old.path(STUDENT_ONNXRUNTIME), rules_only=True)
    print_explanation(record)
    said = " ".join(capsys.readouterr().out.split())
    rows = [row for row in record["integer_sums"] if row["saturates"]]
    assert rows and all(row["module"] and row["largest_pair"] > 2**15 for row in rows)
    assert f"In {len(rows)} of {len(record['integer_sums'])} layers" in said and "reduce_range" in said


# What a CPU is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sets", "int16"),
    [
        ("model name\t: Zen 3\nflags\t\t: fpu avx2 fma\n", ["avx2"], True),
        ("flags : avx2 avx512f avx512bw\n", ["avx2", "avx512"], True),
        ("flags : avx2 avx512bw avx512_vnni\nflags : fpu\n", ["avx2", "avx512", "avx512-vnni"], False),
        ("flags : avx2 avx_vnni amx_int8\n", ["avx2", "avx-vnni", "amx-int8"], False),
        ("flags : sse4_2\n", [], False),
        ("Features : fp asimd asimddp i8mm sve\n", ["asimd", "dotprod", "i8mm", "sve"], False),
        ("", [], False),
    ],
)
def test_instruction_sets(
    text: str, sets: list[str], int16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "cpuinfo")
    assert cpu.instruction_sets() == sets and cpu.adds_pairs_in_int16(sets) == int16
    assert cpu.cpu_kind().split()[1:] == sets
    monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "none")
    assert cpu.instruction_sets() == [] and cpu.cpu_model()
