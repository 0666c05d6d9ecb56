"""The proof passes on what we export, and fails on every fault that is put into the file, at the layer of the fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from faqd import reference
from faqd.bundle import (
    FLOAT_STUDENT,
    FLOAT_STUDENT_FP16,
    STUDENT_ONNXRUNTIME,
    STUDENT_TENSORRT,
    STUDENT_TENSORRT_FP32,
    TEACHER,
    TEACHER_FP16,
    VERIFY,
    Bundle,
    load_bundle,
    save_probe_outputs,
    write_manifest,
)
from faqd.deploy.bundle_facts import BundleOptions
from faqd.deploy.export.float16 import float16_from_float32
from faqd.deploy.export.teacher_float16 import TEACHER_IMAGES
from faqd.deploy.export.torch_to_onnx import onnx_from_deployed
from faqd.deploy.onnx_model.load import load_model
from faqd.deploy.onnx_model.session import OnnxSession
from faqd.deploy.reference.evaluator import Evaluator
from faqd.deploy.verify.layers import CHANCE, tolerated, trace_of, verify_file
from faqd.deploy.verify.numbers import wrong_constants
from faqd.deploy.verify.outputs import snr_db
from faqd.deploy.verify.segments import segments
from faqd.deploy.verify.table import print_verification
from faqd.deploy.verify.test_vectors import Drive, driven_codes, probe_inputs
from faqd.deploy.verify.ties import distinct_roundings
from faqd.deploy.verify.verify import verification
from faqd.deploy.write_bundle import Calibration, quantize_after_training
from faqd.errors import UserError
from faqd.files import read_json
from faqd.proof import EQUAL_CODES
from faqd.quantize.config import QuantConfig
from faqd.quantize.convert import convert
from faqd.reference import real
from faqd.train.data.options import DataOptions
from tests.fixtures.networks import Functional, calibrated, float_file_db, images, lively
from tests.fixtures.toy_runs import faqd_deploy

FLAVOURS = {"tensorrt": STUDENT_TENSORRT_FP32, "onnxruntime": STUDENT_ONNXRUNTIME}

PASSED = {"tensorrt": {"low": True, "high": True}, "onnxruntime": {"high": True}}
"""The limits that a file states: codes of onnxruntime's end at zero by themselves."""

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu, self.pool, self.fc = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 10)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(x + self.bn2(self.conv2(x)))
        return self.fc(torch.flatten(self.pool(x), 1))
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A user's own network on the digits, quantized after training to 4 bits."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "net.py").write_text(NETWORK)
    space: dict[str, Any] = {}
    exec(NETWORK, space)
    torch.save(lively(space["Net"](), 1).state_dict(), folder / "best.pth")
    data = asdict(DataOptions("digits"))
    bits = QuantConfig(4, 4)
    weights, out = folder / "best.pth", folder / "out"
    net = f"{folder}/net.py:Net"
    return quantize_after_training(
        net, weights, data, bits, Calibration(images=256), out, BundleOptions(200, licence="CC-BY-4.0"), lambda _: None
    )


@pytest.fixture(scope="module")
def probes(bundle: Bundle) -> NDArray[np.float32]:
    return probe_inputs(bundle.evaluation().images, bundle.preprocess.normalise)[0]


def test_a_good_bundle_passes(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    record = read_json(bundle.folder / "verify.json")
    assert record["passed"] and record["failures"] == []
    assert set(record["onnx_sha256"]) == {name for name in bundle.manifest["files"] if name.endswith(".onnx")}
    for result in record["flavours"].values():
        assert [row["layer"] for row in result["layers"] if "lowest" in row][:2] == ["x", "relu"]
        assert result["layers"][-1]["layer"] == "fc"
        assert all(row["torch_equal"] for row in result["layers"])
    assert record["as_trained"]["top1_agreement"] > 0.99
    assert record["float16"]["outputs"]["top1_agreement"] > 0.99
    assert load_bundle(bundle.folder).manifest["torch_digests"] == bundle.manifest["torch_digests"]
    print_verification(record)
    assert "proof: the files compute the student: " in capsys.readouterr().out


def test_the_probes_reach_beyond_every_clip(bundle: Bundle) -> None:
    for flavour, result in read_json(bundle.folder / "verify.json")["flavours"].items():
        for row in result["layers"]:
            if row["layer"] in ("relu", "relu_1"):
                assert (row["lowest"], row["highest"]) == (0, 15)
                assert row["beyond"] == PASSED[flavour]


def test_dark_images_hide_no_clip(tmp_path: Path) -> None:
    """The first images, which the probes are made of, reach a 20th of what the others do."""
    (tmp_path / "net.py").write_text(NETWORK)
    space: dict[str, Any] = {}
    exec(NETWORK, space)
    torch.save(lively(space["Net"](), 1).state_dict(), tmp_path / "best.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (400, 8, 8, 1), np.uint8)
    pixels[:376] //= 20
    np.savez(tmp_path / "images.npz", images=pixels)
    data = asdict(DataOptions(f"npz:{tmp_path}/images.npz", mean=(0.0,), std=(1.0,)))
    net, out = f"{tmp_path}/net.py:Net", tmp_path / "out"
    dark = quantize_after_training(
        net,
        tmp_path / "best.pth",
        data,
        QuantConfig(4, 4),
        Calibration(images=256),
        out,
        BundleOptions(100),
        lambda _: None,
    )
    assert dark.evaluation().images[:8].max() < 13
    for flavour, result in read_json(dark.folder / VERIFY)["flavours"].items():
        limited = [row for row in result["layers"] if row["layer"] in ("relu", "relu_1")]
        assert [row["beyond"] for row in limited] == [PASSED[flavour]] * 2
    model = load_model(dark.path(STUDENT_TENSORRT_FP32))
    next(node for node in model.graph.node if node.name == "relu_1.clip").op_type = "Relu"
    del next(node for node in model.graph.node if node.name == "relu_1.clip").input[1:]
    inputs, _ = probe_inputs(dark.evaluation().images, dark.preprocess.normalise)
    digests = dark.manifest["torch_digests"]["tensorrt"]
    assert verify_file(model, inputs, digests, [])["failures"][0] == "relu_1: the file has not torch's upper limit"
    found = verify_file(model, inputs, without_numbers(digests), [])["failures"]
    assert found[0] == "relu_1: the torch student and the integer reference differ"


def test_large_images_give_fewer_probes() -> None:
    counts = [
        len(probe_inputs(np.ones((20, size, size, 1), np.uint8), lambda pixels: pixels.astype(np.float32))[0])
        for size in (32, 224, 448, 2000)
    ]
    assert counts == [32, 32, 8, 4]


def test_driven_codes_fill_the_grid_and_reach_both_ends_of_an_average() -> None:
    codes = driven_codes("relu", (8, 16, 12, 12), 0, 15)
    assert codes.dtype == np.int16 and set(np.unique(codes)) == set(range(16))
    means = codes[1::2].mean((2, 3))
    assert means.min() < 1.5 and means.max() > 13.5
    assert np.array_equal(codes, driven_codes("relu", (8, 16, 12, 12), 0, 15))
    assert not np.array_equal(codes, driven_codes("relu_1", (8, 16, 12, 12), 0, 15))
    assert codes.sum() == 144_275  # the same on every machine, with every numpy
    kept = Drive({"relu": (0, 15)}, 3)("relu", np.zeros((5, 2, 2), np.int16))
    assert not kept[:2].any() and kept[2:].any()


def test_a_convolution_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    x, w = (generator.integers(-9, 9, shape).astype(np.float64) for shape in ((5, 6, 9, 9), (4, 3, 3, 3)))
    whole = reference.convolve(x, w, (2, 1), (1, 1, 0, 1), (1, 1), 2)
    monkeypatch.setattr(reference, "COLUMNS", 100)
    assert np.array_equal(reference.convolve(x, w, (2, 1), (1, 1, 0, 1), (1, 1), 2), whole)


# Faults ----------------------------------------------------------------------------------------------------------


def tensor(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    found: onnx.TensorProto = next(t for t in model.graph.initializer if t.name == name)
    return found


def change(model: onnx.ModelProto, name: str, edit: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    found = tensor(model, name)
    values = edit(numpy_helper.to_array(found).copy())
    found.CopyFrom(numpy_helper.from_array(values, name))


def swap_two_scales(model: onnx.ModelProto) -> None:
    change(model, "conv2.weight_scale", lambda scale: scale[[1, 0, *range(2, len(scale))]])


def flip_a_weight_code(model: onnx.ModelProto) -> None:
    def edit(codes: NDArray[Any]) -> NDArray[Any]:
        codes[3, 2, 1, 1] += 1
        return codes

    change(model, "conv2.codes", edit)


def transpose_the_weights(model: onnx.ModelProto) -> None:
    change(model, "conv2.codes", lambda codes: np.ascontiguousarray(codes.swapaxes(0, 1)))


def shift_a_bias_by_one_code(model: onnx.ModelProto) -> None:
    step = numpy_helper.to_array(tensor(model, "relu_1_quant.scale"))

    def edit(bias: NDArray[Any]) -> NDArray[Any]:
        if bias.dtype == np.int32:
            bias[2] += np.int32(step / numpy_helper.to_array(tensor(model, "conv2.bias_scale"))[2])
        else:
            bias[2] += step
        return bias

    change(model, "conv2.bias", edit)


def drop_the_clip(model: onnx.ModelProto) -> None:
    clip = next(node for node in model.graph.node if node.name == "relu_1.clip")
    for node in model.graph.node:
        node.input[:] = [clip.input[0] if name == clip.output[0] else name for name in node.input]
    model.graph.node.remove(clip)


def stretch_an_activation_scale(model: onnx.ModelProto) -> None:
    change(model, "relu_1_quant.scale", lambda scale: np.asarray(scale * np.float32(1.002)))


def turn_the_axis(model: onnx.ModelProto) -> None:
    """Legal: as many input as output channels, so that the scales fit there too."""
    weight = next(node for node in model.graph.node if node.name == "conv2.real_weight")
    axis = next(attribute for attribute in weight.attribute if attribute.name == "axis")
    assert axis.i == 0
    axis.i = 1


def merge_two_biases(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.input[:] = ["conv1.bias" if name == "conv2.bias" else name for name in node.input]


def merge_two_scales(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.input[:] = ["relu_quant.scale" if name == "relu_1_quant.scale" else name for name in node.input]


def change_the_classifier(model: onnx.ModelProto) -> None:
    def edit(codes: NDArray[Any]) -> NDArray[Any]:
        codes[3, 2] += 1 if codes[3, 2] < 127 else -1
        return codes

    change(model, "fc.codes", edit)


FAULTS: list[tuple[Callable[[onnx.ModelProto], None], str, str]] = [
    (swap_two_scales, "conv2: the file has not torch's weight scales", "relu_1"),
    (flip_a_weight_code, "conv2: the file has not torch's quantized weights", "relu_1"),
    (transpose_the_weights, "conv2: the file has not torch's quantized weights", "relu_1"),
    (shift_a_bias_by_one_code, "conv2: the file has not torch's bias", "relu_1"),
    (drop_the_clip, "relu_1: the file has not torch's ", "relu_1"),
    (stretch_an_activation_scale, "relu_1: the file has not torch's scale", "relu_1"),
    (merge_two_scales, "relu_1: the file has not torch's scale", "relu_1"),
    (merge_two_biases, "conv2: the file has not torch's bias", "relu_1"),
    (turn_the_axis, "conv2: the file has not torch's quantized weights", "relu_1"),
    (change_the_classifier, "fc: the file has not torch's quantized weights", "fc"),
]
"""The fault; how the failure by number begins; the layer whose codes are the first wrong ones."""


SEEN_BEFORE_THE_SUM = (
    *(swap_two_scales, flip_a_weight_code, transpose_the_weights),
    *(shift_a_bias_by_one_code, merge_two_biases, turn_the_axis),
)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(("fault", "number", "layer"), FAULTS, ids=[fault.__name__ for fault, _, _ in FAULTS])
def test_a_fault_is_found_at_its_layer(
    bundle: Bundle,
    probes: NDArray[np.float32],
    flavour: str,
    fault: Callable[[onnx.ModelProto], None],
    number: str,
    layer: str,
) -> None:
    """By the number that is wrong, and apart from that by the codes that it leads to."""
    model = load_model(bundle.path(FLAVOURS[flavour]))
    fault(model)
    digests = bundle.manifest["torch_digests"][flavour]
    assert verify_file(model, probes, digests, [False])["failures"][0].startswith(number)
    found = verify_file(model, probes, without_numbers(digests), [False])["failures"]
    # onnxruntime rounds conv2's output before the sum: its own place is the first that can be wrong.
    first = "conv2_out" if flavour == "onnxruntime" and fault in SEEN_BEFORE_THE_SUM else layer
    assert found and found[0].startswith(f"{first}: "), found[:3]


def without_numbers(digests: dict[str, Any]) -> dict[str, Any]:
    """As if the numbers of the file had not been read: only what they lead to."""
    grids = [{"layer": entry["layer"], "grid": entry["grid"]} for entry in digests["roundings"]]
    return {**digests, "layers": [], "others": [], "roundings": grids}


@pytest.mark.parametrize("name", ["relu_1_quant.scale", "conv2.weight_scale"])
def test_a_scale_off_by_so_little_that_few_codes_change_is_found(
    bundle: Bundle, probes: NDArray[np.float32], name: str
) -> None:
    """Grown in float32 steps until the first codes change: those few are enough."""
    path, digests = bundle.path(STUDENT_TENSORRT_FP32), without_numbers(bundle.manifest["torch_digests"]["tensorrt"])

    def codes(model: onnx.ModelProto) -> NDArray[Any]:
        trace = trace_of(model, probes, digests)
        return next(trace.computed["relu_1.codes"] for segment, _, _ in trace if segment.output == "relu_1.codes")

    wanted = codes(load_model(path))
    for exponent in range(16):
        model = load_model(path)
        grown = np.float32(1 + 2.0 ** (exponent - 23))
        change(model, name, partial(np.multiply, grown))
        differing = np.count_nonzero(codes(model) != wanted)
        found = verify_file(model, probes, digests, [])["failures"]
        if differing:
            break
        assert found == []
    assert 0 < differing < 0.001 * wanted.size
    assert found[0] == "relu_1: the torch student and the integer reference differ"


def test_a_faulty_bundle_fails_by_name_and_no_engine_is_built_from_it(bundle: Bundle, tmp_path: Path) -> None:
    """As if the exporter had made the fault: the checksums are those of the faulty file."""
    folder = tmp_path / "faulty"
    shutil.copytree(bundle.folder, folder)
    model = load_model(folder / STUDENT_TENSORRT_FP32)
    drop_the_clip(model)
    (folder / STUDENT_TENSORRT_FP32).write_bytes(model.SerializeToString())
    outcome = faqd_deploy("verify", folder)
    assert outcome.code == 2 and "changed since the bundle was written" in outcome.stderr
    facts = {key: bundle.manifest[key] for key in bundle.manifest if key != "files"}
    write_manifest(folder, facts, {name: entry["made_from"] for name, entry in bundle.manifest["files"].items()})
    outcome = faqd_deploy("verify", folder)
    assert outcome.code == 1 and "verification failed: tensorrt: relu_1: " in outcome.stderr
    assert "FAILED: tensorrt: relu_1: " in outcome.stdout
    refused = faqd_deploy("build-engine", folder)
    assert refused.code == 1 and "the verification failed" in refused.stderr and "--force" in refused.stderr
    assert not list(folder.glob("*.engine"))


def test_every_file_of_the_bundle_is_standard_onnx_and_says_what_it_is(bundle: Bundle) -> None:
    for name in bundle.manifest["files"]:
        if not name.endswith(".onnx"):
            continue
        model = load_model(bundle.path(name))
        assert {entry.domain for entry in model.opset_import} == {""} and not model.functions
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
        known = {value.name for value in (*inferred.value_info, *inferred.output)}
        assert known >= {output for node in inferred.node for output in node.output}
        for value in (*inferred.input, *inferred.output):
            assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
        data = bundle.path(name).read_bytes()
        for trace in (str(bundle.folder.parent), str(Path.home()), "site-packages", "/net.py"):
            assert trace.encode() not in data
        assert model.producer_name == "faqd" and model.producer_version == bundle.manifest["faqd"]
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert metadata["model_license"] == "CC-BY-4.0"
        if name not in (TEACHER, TEACHER_FP16):
            assert metadata["faqd.weights_sha256"] == bundle.manifest["files"][name]["made_from"]
            assert json.loads(metadata["faqd.preprocess"]) == json.loads(json.dumps(bundle.preprocess.to_json()))
            assert metadata["faqd.classes"].split(",") == bundle.manifest["classes"]
            bits = {row["name"]: f"{row['weights']} x {row['inputs']}" for row in bundle.manifest["layers"]}
            assert dict(entry.split(": ", 1) for entry in metadata["faqd.bits"].split("; ")) == bits


def test_the_teacher_is_there_in_fp16_and_what_that_costs_is_told(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    files = bundle.manifest["files"]
    assert files[TEACHER_FP16]["made_from"] == files[TEACHER]["made_from"]
    assert files[TEACHER_FP16]["bytes"] < 0.8 * files[TEACHER]["bytes"]
    half = load_model(bundle.path(TEACHER_FP16))
    assert half == float16_from_float32(load_model(bundle.path(TEACHER)))
    record = read_json(bundle.folder / VERIFY)
    compared = record["teacher_float16"]
    assert compared["images"] == min(TEACHER_IMAGES, len(bundle.evaluation().images))
    assert compared["top1_agreement"] > 0.9 and all(40 < value < 100 for value in compared["snr_db"].values())
    print_verification(record)
    assert "teacher FP16 = FP32: " in capsys.readouterr().out


def test_a_missing_rounding_is_named(bundle: Bundle, probes: NDArray[np.float32]) -> None:
    digests = bundle.manifest["torch_digests"]["tensorrt"]
    more = {**digests, "codes": {**digests["codes"], "forgotten": ""}}
    found = verify_file(load_model(bundle.path(STUDENT_TENSORRT_FP32)), probes, more, [False])["failures"]
    assert found == ["forgotten: the file has no quantized values of this layer"]


@pytest.mark.parametrize("name", [STUDENT_TENSORRT_FP32, STUDENT_TENSORRT, STUDENT_ONNXRUNTIME, TEACHER])
def test_a_bundle_without_one_of_its_files_is_refused(bundle: Bundle, name: str) -> None:
    files = {key: entry for key, entry in bundle.manifest["files"].items() if key != name}
    with pytest.raises(UserError, match=rf"manifest\.json: lists no {name}"):
        verification(Bundle(bundle.folder, {**bundle.manifest, "files": files}))


def test_numbers_that_are_none_fail_and_are_written(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(bundle.folder, folder)
    for name in (STUDENT_ONNXRUNTIME, TEACHER):
        model = load_model(folder / name)
        where, value = ("fc.weight_scale", 1e38) if name == STUDENT_ONNXRUNTIME else ("fc.bias", np.nan)
        change(model, where, partial(np.full_like, fill_value=value))
        (folder / name).write_bytes(model.SerializeToString())
    record = verification(Bundle(folder, bundle.manifest))
    assert not record["passed"] and json.loads(json.dumps(record, allow_nan=False)) == record
    assert f"{TEACHER} is -400 dB from torch's logits, at least 60 are needed" in record["failures"]
    print_verification(record)


def test_outputs_where_nothing_is_wanted_are_far_off() -> None:
    zeros = np.zeros(3, np.float32)
    assert snr_db(zeros, zeros) is None
    assert snr_db(zeros + 1, zeros) == snr_db(zeros + np.inf, zeros + 1) == snr_db(zeros * np.nan, zeros + 1) == -400


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_number_of_the_file_is_bound(bundle: Bundle, flavour: str) -> None:
    """One unit more in one place of each constant, wherever that leads."""
    model = load_model(bundle.path(FLAVOURS[flavour]))
    digests = bundle.manifest["torch_digests"][flavour]
    assert list(wrong_constants(model, digests)) == []
    generator = np.random.default_rng(0)
    tried = 0
    for constant in model.graph.initializer:
        values = numpy_helper.to_array(constant)
        if values.dtype == np.int64 or constant.name.endswith("zero_point"):
            continue  # shapes, which the checker binds; zero points, which load_network does
        for at in generator.integers(0, values.size, 3):
            changed = values.copy()
            more = np.nextafter(changed.flat[at], np.float32(np.inf)) if values.dtype.kind == "f" else 1
            changed.flat[at] = more if values.dtype.kind == "f" else changed.flat[at] ^ more
            mutant = onnx.ModelProto()
            mutant.CopyFrom(model)
            tensor(mutant, constant.name).CopyFrom(numpy_helper.from_array(changed, constant.name))
            limit = constant.name.endswith((".bottom", ".top")) and values.dtype.kind == "f"
            assert bool(list(wrong_constants(mutant, digests))) != limit, (constant.name, at)
            tried += 1
    assert tried > 40


@pytest.mark.parametrize("codes", [10, 320, 16_384, 500_000])
def test_a_layer_is_refused_for_a_count_that_chance_does_not_give(codes: int) -> None:
    counts = np.random.default_rng(0).poisson((1 - EQUAL_CODES) * codes, 1_000_000)
    limit = tolerated(codes)
    assert np.count_nonzero(counts > limit) <= 10 * CHANCE * counts.size
    assert limit < (1 - EQUAL_CODES) * codes + 6 * np.sqrt((1 - EQUAL_CODES) * codes) + 5
    assert tolerated(0) == 0


def rename_everything(model: onnx.ModelProto) -> None:
    change(model, "conv2.bias", lambda bias: bias + np.float16(3))
    for node in model.graph.node:
        node.input[:] = [f"{name}_" if name.endswith(".codes") and name in made(model) else name for name in node.input]
    for node in model.graph.node:
        node.output[:] = [f"{name}_" if name.endswith(".codes") else name for name in node.output]
    del model.graph.value_info[:]


def one_more(codes: NDArray[np.int8]) -> NDArray[np.int8]:
    changed: NDArray[np.int8] = codes.copy()
    changed.flat[7] += 1 if changed.flat[7] < 127 else -1
    return changed


def rewire(model: onnx.ModelProto) -> None:
    """Every constant is there as it was; another one is read."""
    node = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == "conv2.codes")
    codes = next(t for t in model.graph.initializer if t.name == "conv2.codes")
    model.graph.initializer.append(numpy_helper.from_array(one_more(numpy_helper.to_array(codes)), "more"))
    node.input[0] = "more"


def older_operators(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 18


def through_another_type(model: onnx.ModelProto) -> None:
    last = model.graph.node[-1]
    model.graph.node.insert(
        len(model.graph.node) - 1, helper.make_node("Cast", [last.input[0]], ["less"], "less", to=TensorProto.BFLOAT16)
    )
    last.input[0] = "less"


def rename_one(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Conv").name += "_"


def made(model: onnx.ModelProto) -> set[str]:
    return {name for node in model.graph.node for name in node.output}


@pytest.mark.parametrize(
    ("file", "edit", "failure"),
    [
        (STUDENT_TENSORRT, lambda m: change(m, "conv2.bias", lambda b: b + np.float16(3)), "relu_1: only"),
        (STUDENT_TENSORRT, lambda m: change(m, "fc.codes", lambda c: 0 * c), "logits: the FP16 output logits is"),
        (STUDENT_TENSORRT, lambda m: change(m, "conv2.codes", one_more), "conv2.codes: the FP16 file has not the"),
        (STUDENT_TENSORRT, lambda m: change(m, "relu_quant.scale", lambda s: s * 1.001), "relu_quant.scale: the FP16"),
        (STUDENT_TENSORRT, rewire, "the FP16 file has other operators"),
        (STUDENT_TENSORRT, through_another_type, "the FP16 file has other operators"),
        (STUDENT_TENSORRT, rename_one, "the FP16 file has other operators"),
        (STUDENT_TENSORRT, rename_everything, "x.codes: the FP16 file has no such quantized values"),
        (TEACHER_FP16, lambda m: change(m, "fc.bias", lambda b: 2 * b), f"{TEACHER_FP16}: fc.bias: the FP16 file has"),
        (TEACHER_FP16, older_operators, f"{TEACHER_FP16}: the FP16 file is of another opset"),
        (FLOAT_STUDENT_FP16, rename_one, f"{FLOAT_STUDENT_FP16}: the FP16 file has other operators"),
        (TEACHER, lambda m: change(m, "fc.bias", lambda b: b + 0.1), "teacher.onnx is"),
        (FLOAT_STUDENT, lambda m: change(m, "fc.bias", lambda b: b + 0.1), "student.float.onnx is"),
    ],
    ids=[
        "layer",
        "classifier",
        "one code",
        "scale",
        "wiring",
        "bfloat16",
        "one name",
        "renamed",
        "half teacher",
        "opset",
        "half float",
        "teacher",
        "float student",
    ],
)
def test_a_file_beside_the_exact_ones_that_computes_something_else_fails(
    bundle: Bundle, tmp_path: Path, file: str, edit: Callable[[onnx.ModelProto], None], failure: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(bundle.folder, folder)
    model = load_model(folder / file)
    edit(model)
    (folder / file).write_bytes(model.SerializeToString())
    record = verification(Bundle(folder, bundle.manifest))
    assert not record["passed"] and record["failures"][0].startswith(failure), record["failures"]


def test_the_float_student_is_held_against_torch(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    record = read_json(bundle.folder / VERIFY)
    assert record["float_student"]["images"] == 24 and record["float_student"]["snr_db"]["logits"] > 100
    print_verification(record)
    assert "student.float.onnx = unquantized student in torch: " in capsys.readouterr().out


def test_probes_at_which_torch_overflowed_tell_nothing(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(bundle.folder, folder)
    outputs = bundle.probe_outputs()
    outputs["teacher"]["logits"][-1] = np.inf
    save_probe_outputs(folder, outputs)
    assert verification(Bundle(folder, bundle.manifest))["passed"]
    outputs["teacher"]["logits"][0] += 1
    save_probe_outputs(folder, outputs)
    assert verification(Bundle(folder, bundle.manifest))["failures"][0].startswith("teacher.onnx is ")


def test_a_float_file_of_another_network_is_far_from_torch() -> None:
    x = images(0, 16)
    student = calibrated(lively(Functional(), 1), QuantConfig(8, 8))
    model = onnx_from_deployed(convert(student, "float"), x, {})
    assert float_file_db(model.SerializeToString(), student, x)["logits"] > 100
    change(model, "fc2.bias", lambda bias: bias + 0.1)
    assert float_file_db(model.SerializeToString(), student, x)["logits"] < 60


@pytest.mark.parametrize(("value", "roundings"), [(10.49999, 1), (10.5, 1), (10.4, 64), (10.0, 64)])
def test_a_constant_map_at_a_tie_is_one_rounding(value: float, roundings: int) -> None:
    """And a constant map that is wrong stays wrong in every pixel."""
    inputs = {"s": np.float32(1), "z": np.int8(0)}
    model = one_node("QuantizeLinear", inputs)
    model.graph.node.append(helper.make_node("DequantizeLinear", ["y0", "s", "z"], ["y"]))
    model.graph.output[0].name = "y"
    model.graph.input[0].type.tensor_type.shape.dim.add(dim_value=64)
    x = np.full(64, value, np.float32)
    values = Evaluator(model).run({"x": x})
    segment = next(segments(model))
    assert segment.output == "y0"
    assert distinct_roundings(segment, values, np.ones(64, bool)) == roundings
    assert distinct_roundings(segment, values, np.zeros(64, bool)) == 0


def test_ties_in_a_map_that_is_not_constant_count_one_by_one() -> None:
    """Such as a quarter of the averages of four codes."""
    model = one_node("QuantizeLinear", {"s": np.float32(1), "z": np.int8(0)})
    model.graph.node.append(helper.make_node("DequantizeLinear", ["y0", "s", "z"], ["y"]))
    model.graph.output[0].name = "y"
    for size in (4, 2, 8):
        model.graph.input[0].type.tensor_type.shape.dim.add(dim_value=size)
    x = np.random.default_rng(0).integers(0, 40, (4, 2, 8)).astype(np.float32) / np.float32(4)
    values = Evaluator(model).run({"x": x})
    ties = x % 1 == 0.5
    assert ties.sum() > 10
    assert distinct_roundings(next(segments(model)), values, ties) == ties.sum()


def test_ties_are_found_in_front_of_spare_channels() -> None:
    inputs = {"s": np.float32(1), "z": np.uint8(128), "pads": np.array([0, 1]), "axes": np.array([1])}
    model = one_node("QuantizeLinear", {"s": inputs["s"], "z": inputs["z"]})
    model.graph.initializer.extend(numpy_helper.from_array(inputs[name], name) for name in ("pads", "axes"))
    model.graph.node.append(helper.make_node("Pad", ["y0", "pads", "z", "axes"], ["y1"]))
    model.graph.node.append(helper.make_node("DequantizeLinear", ["y1", "s", "z"], ["y"]))
    model.graph.output[0].name = "y"
    for size in (2, 3, 5):
        model.graph.input[0].type.tensor_type.shape.dim.add(dim_value=size)
    values = Evaluator(model).run({"x": np.full((2, 3, 5), 10.49999, np.float32)})
    assert (values["y1"] == [[[138]] * 3 + [[128]]] * 2).all()
    differs = np.zeros((2, 4, 5), bool)
    differs[:, :3] = True
    assert distinct_roundings(next(segments(model)), values, differs) == 1


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\x00" * 99])
def test_a_damaged_file_is_refused_in_a_sentence(
    bundle: Bundle, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "damaged.onnx"
    path.write_bytes(damage(bundle.path(STUDENT_ONNXRUNTIME).read_bytes()))
    with pytest.raises(UserError, match=r"damaged\.onnx: not a valid ONNX file"):
        load_model(path)


# The reference on files of other tools ------------------------------------------------------------------------------


def one_node(
    operator: str, inputs: dict[str, Any], opset: int = 19, domain: str = "", outputs: int = 1, **attributes: Any
) -> onnx.ModelProto:
    names = [f"y{index}" for index in range(outputs)]
    node = helper.make_node(operator, ["x", *inputs], names, "node", domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y0", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values, name) for name, values in inputs.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def run(model: onnx.ModelProto, x: NDArray[np.float32]) -> NDArray[Any]:
    return real(Evaluator(model).run({"x": x})["y0"])


X = np.random.default_rng(0).normal(size=(2, 4, 7, 7)).astype(np.float32)
ONE = np.float32(0.1)
REFUSED: dict[str, onnx.ModelProto] = {
    "no NonZero": one_node("NonZero", {}),
    "no com.example.Relu": one_node("Relu", {}, domain="com.example"),
    "opset 13 to 20, found 11": one_node("Relu", {}, opset=11),
    "without auto_pad": one_node("MaxPool", {}, kernel_shape=[2, 2], auto_pad="SAME_UPPER"),
    "with one output": one_node("MaxPool", {}, outputs=2, kernel_shape=[2, 2]),
    "one scale above zero": one_node("QuantizeLinear", {"s": np.full(4, ONE), "z": np.zeros(4, np.int8)}, axis=1),
    "an activation needs one scale above zero": one_node("QuantizeLinear", {"s": np.float32(0), "z": np.int8(0)}),
    "alpha = beta = 1": one_node("Gemm", {"w": np.ones((7, 7), np.float32)}, alpha=2.0),
    "one bias for each column": one_node("Gemm", {"w": np.ones((7, 7), np.float32), "b": np.ones((7, 1), np.float32)}),
    "without antialias": one_node(
        "Resize",
        {"roi": np.array([], np.float32), "scales": np.array([1, 1, 2, 2], np.float32)},
        mode="linear",
        antialias=1,
    ),
    "cannot run this Conv": one_node("Conv", {"w": np.ones((3, 5, 3, 3), np.float32)}),
}


@pytest.mark.parametrize("pattern", REFUSED)
def test_the_reference_refuses_what_it_does_not_know(pattern: str) -> None:
    with pytest.raises(UserError, match=pattern):
        run(REFUSED[pattern], X)


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes"),
    [
        ("ReduceMean", {"axes": np.array([], np.int64)}, {}),
        ("ReduceMean", {"axes": np.array([1, 3])}, {"keepdims": 0}),
        ("Resize", {"": None, "scales": np.array([1, 1, 1, 2], np.float32)}, {"mode": "linear"}),
        ("Resize", {"": None, "scales": np.array([1, 1, 2, 3], np.float32)}, {"nearest_mode": "floor"}),
        ("Resize", {"": None, " ": None, "sizes": np.array([2, 4, 1, 5])}, {"mode": "linear"}),
    ],
    ids=["mean of all", "mean of some", "one axis", "nearest", "one row"],
)
@pytest.mark.parametrize("rule", ["half_pixel", "pytorch_half_pixel", "asymmetric"])
def test_the_reference_computes_what_onnxruntime_does(
    operator: str, inputs: dict[str, Any], attributes: dict[str, Any], rule: str
) -> None:
    nearest = "nearest_mode" in attributes
    if operator == "Resize":
        if nearest != (rule == "asymmetric"):
            return
        attributes = {**attributes, "coordinate_transformation_mode": rule}
    elif rule != "half_pixel":
        return
    model = one_node(
        operator, {name: values for name, values in inputs.items() if values is not None}, 18, **attributes
    )
    if operator == "Resize":
        model.graph.node[0].input[:] = ["x", *(name.strip() for name in inputs)]
    for size in X.shape:
        model.graph.input[0].type.tensor_type.shape.dim.add(dim_value=size)
    model.ir_version = 9
    (wanted,) = OnnxSession(model.SerializeToString(), optimise=False).run({"x": X}).values()
    np.testing.assert_allclose(run(model, X), wanted, atol=1e-6)


def test_the_reference_resizes_to_whole_sizes_alone() -> None:
    scales = {"roi": np.array([], np.float32), "scales": np.array([1, 1, 1.3, 1], np.float32)}
    model = one_node("Resize", scales, mode="linear")
    with pytest.raises(UserError, match=r"not from 7 to 9\.1"):
        run(model, X)


def test_maxima_of_codes_and_quotients_of_integers_stay_integers() -> None:
    codes = one_node("QuantizeLinear", {"s": ONE, "z": np.int8(0)})
    codes.graph.node.append(
        helper.make_node("MaxPool", ["y0"], ["p"], "pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    )
    found = Evaluator(codes).run({"x": X})["p"]
    wanted = F.max_pool2d(torch.from_numpy(run(codes, X).astype(np.float64)), 3, 2, 1).numpy()
    assert found.dtype == np.int8 and np.array_equal(found, wanted)
    shares = one_node("Shape", {})
    shares.graph.initializer.append(numpy_helper.from_array(np.array([-2, 3, 2, 4]), "by"))
    shares.graph.node.append(helper.make_node("Div", ["y0", "by"], ["d"], "div"))
    assert Evaluator(shares).run({"x": X})["d"].tolist() == [-1, 1, 3, 1]


def test_codes_with_scales_along_an_axis_are_moved_as_real_values() -> None:
    scale = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    weight = np.random.default_rng(0).integers(-9, 9, (3, 4)).astype(np.int8)
    constants = {
        "s": scale,
        "z": np.zeros(4, np.int8),
        "w": weight,
        "from": np.array([1]),
        "to": np.array([2]),
        "axis": np.array([0]),
    }
    model = one_node("Relu", constants)
    model.graph.node[0].input[:] = ["x"]
    model.graph.node.append(helper.make_node("DequantizeLinear", ["w", "s", "z"], ["r"], "real", axis=1))
    model.graph.node.append(helper.make_node("Slice", ["r", "from", "to", "axis"], ["part"], "slice"))
    values = Evaluator(model).run({"x": X})
    np.testing.assert_allclose(real(values["part"]), (weight * scale.astype(np.float64))[1:2])


def test_a_missing_zero_point_means_uint8() -> None:
    found = run(one_node("QuantizeLinear", {"s": ONE}), X)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.clip(np.rint(X.astype(np.float64) / np.float64(ONE)), 0, 255))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("kernel", [2, 3])
def test_pooling_is_that_of_torch(kernel: int, stride: int, padding: int, ceil: bool) -> None:
    x = torch.from_numpy(X).double()
    window: dict[str, Any] = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [padding] * 4}
    window["ceil_mode"] = int(ceil)
    wanted: Tensor = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil)
    np.testing.assert_array_equal(run(one_node("MaxPool", {}, **window), X), wanted.numpy())
    for include in (False, True):
        wanted = F.avg_pool2d(x, kernel, stride, padding, ceil, include)
        found = run(one_node("AveragePool", {}, count_include_pad=int(include), **window), X)
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-12)
