"""Every file of the shelf, through every command: one sentence, exit code 2, seconds, bounded memory."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from faqd.benchmarks.cli import bench_command
from faqd.bundle import (
    EVAL,
    FLOAT_STUDENT,
    FLOAT_STUDENT_FP16,
    MANIFEST,
    PROBE_OUTPUTS,
    STUDENT_ONNXRUNTIME,
    STUDENT_TENSORRT,
    STUDENT_TENSORRT_FP32,
    TEACHER,
    VERIFY,
    Evaluation,
    save_probe_outputs,
    write_manifest,
)
from faqd.deploy.onnx_model.load import load_bytes, load_model
from faqd.deploy.onnx_model.scan import read_scanned, scan
from faqd.errors import UserError
from tests.fixtures.hostile_files import SHELF, WORST, Edit, constant, edited, good, shelve
from tests.fixtures.tiny_bundles import PREPROCESS, facts_of
from tests.fixtures.toy_runs import Outcome, faqd_deploy, outcome_of

NETWORKS = (STUDENT_TENSORRT, STUDENT_TENSORRT_FP32, STUDENT_ONNXRUNTIME, FLOAT_STUDENT, FLOAT_STUDENT_FP16, TEACHER)
TENSORRT_TAKES = (
    *("infinite scale", "a tensor that fills memory", "sizes that double", "a range without an end"),
    *("a range of the input", "sizes of the input", "axes without end", "long lists"),
)
"""Legal ONNX whose harm shows when it runs: `verify` comes before the board."""
LEGAL_PROTOBUF = (
    *("axis beyond the rank", "axis of another size", "scale of zero", "scale below zero", "scale that is no number"),
    *("infinite scale", "weight scale of zero", "a tensor that fills memory", "a cycle", "one tensor made twice"),
    *("sizes that double", "a range without an end", "a range of the input", "sizes of the input"),
    *("axes without end", "long lists"),
    *("one constant twice", "unknown operator", "a missing input"),
)
"""What the scan lets pass, because it takes a checker to see it; `inspect` reads no further."""

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed (pip install 'faqd[rtx]'): nothing here can build an engine",
)


def hostile_bundle(folder: Path, name: str) -> Path:
    """A bundle with a right manifest whose every network is this file of the shelf."""
    folder.mkdir()
    for network in NETWORKS:
        if name == "good":
            (folder / network).write_bytes(good().SerializeToString())
        else:
            shelve(name, folder / network)
    return described(folder)


def described(folder: Path, **other: Any) -> Path:
    """A manifest for the networks in `folder`, and evaluation data; other: facts that are not the usual ones."""
    images = np.zeros((4, 8, 8, 3), np.uint8)
    outputs = {"logits": np.zeros((4, 10), np.float32)}
    Evaluation(images, None, outputs).save(folder / EVAL)
    save_probe_outputs(folder, {"student": outputs, "teacher": outputs})
    preprocess = {**PREPROCESS.to_json(), "channels": "rgb", "mean": (0, 0, 0), "std": (1, 1, 1)}
    empty = {"codes": {}, "outputs": {}, "output_bits": 24, "driven": 8, "layers": [], "roundings": [], "others": []}
    digests: dict[str, Any] = dict.fromkeys(("tensorrt", "onnxruntime"), empty)
    facts = {
        "preprocess": preprocess,
        "input": {"name": "input", "shape": ["batch", 3, 8, 8]},
        "outputs": [{"name": "logits", "shape": ["batch", 10]}],
        "torch_digests": digests,
    }
    facts = {**facts_of("hostile"), **facts, **other}
    write_manifest(folder, facts, dict.fromkeys((*NETWORKS, EVAL, PROBE_OUTPUTS), ""))
    return folder


def is_refused(outcome: Outcome, word: str) -> None:
    assert outcome.code == 2, outcome.stderr
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in outcome.stderr
    assert word in lines[0] and lines[0].endswith(".") and lines[0].isprintable()


def test_the_file_that_all_others_are_made_from_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "good.onnx"
    path.write_bytes(good().SerializeToString())
    assert load_model(path) == good()
    assert load_bytes(path) == path.read_bytes()


@pytest.mark.parametrize("name", SHELF)
def test_verify_explain_bench_and_inspect_refuse_it(name: str, tmp_path: Path) -> None:
    bundle = hostile_bundle(tmp_path / "bundle", name)
    word = SHELF[name][1]
    is_refused(faqd_deploy("verify", bundle), word)
    is_refused(faqd_deploy("explain", bundle), word)
    is_refused(faqd_deploy("explain", bundle / TEACHER), word)
    is_refused(outcome_of(bench_command, (bundle, "--backend", "onnxruntime", "--skip-latency")), word)
    inspected = faqd_deploy("inspect", bundle)
    if name in LEGAL_PROTOBUF:
        assert inspected.code == 0, inspected.stderr
    else:
        is_refused(inspected, word)


@needs_rtx
@pytest.mark.parametrize("name", [name for name in SHELF if name not in TENSORRT_TAKES])
def test_build_engine_refuses_it(name: str, tmp_path: Path) -> None:
    bundle = hostile_bundle(tmp_path / "bundle", name)
    is_refused(faqd_deploy("build-engine", bundle), "")
    assert not list(bundle.glob("*.engine*"))


def _another_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(onnx.helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, ["batch", 3]))


def _another_name(model: onnx.ModelProto) -> None:
    model.graph.node[-1].output[0] = model.graph.output[0].name = "scores"


def _input_as_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].CopyFrom(model.graph.input[0])


def _wide(model: onnx.ModelProto) -> None:
    """Legal, and 15 GB in the reference."""
    scales = np.array([1, 1, 512, 512], np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(scales, "scales"))
    how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    model.graph.node.insert(4, onnx.helper.make_node("Resize", ["y", "", "scales"], ["wide"], "wide", **how))
    model.graph.node[5].input[0] = "wide"


def _no_zero_point(model: onnx.ModelProto) -> None:
    del model.graph.node[1].input[2:]


def _moved_zero_point(model: onnx.ModelProto) -> None:
    """For both of a pair: the codes are the same, and saturate elsewhere."""
    zero = next(t for t in model.graph.initializer if t.name == model.graph.node[0].input[2])
    zero.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(zero) + np.int8(3), zero.name))


def _many_scales(model: onnx.ModelProto) -> None:
    for name, values in (("scale", np.full(3, 0.02, np.float32)), ("zero", np.zeros(3, np.int8))):
        constant(model, name).CopyFrom(onnx.numpy_helper.from_array(values, name))


def _group_of_none(model: onnx.ModelProto) -> None:
    model.graph.node[3].attribute.append(onnx.helper.make_attribute("group", 0))


def _fixed_batch(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4


def _computed_scale(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, onnx.helper.make_node("Abs", ["scale"], ["computed"], "abs"))
    model.graph.node[1].input[1] = "computed"


@pytest.mark.parametrize(
    ("edit", "word", "facts"),
    [
        (_another_input, "has the inputs input, more, the manifest says input", {}),
        (_another_name, "has the outputs scores, the manifest says logits", {}),
        (_input_as_output, "is computed by no node", {"outputs": [{"name": "input", "shape": []}]}),
        (_wide, "layer logits takes 5,368,744,704 numbers for 32 probe images", {}),
        (_no_zero_point, "conv.dq (DequantizeLinear) has no zero point", {}),
        (_moved_zero_point, "conv.q (QuantizeLinear) has the zero point 3", {}),
        (_computed_scale, "conv.q (QuantizeLinear) computes its scale", {}),
        (_fixed_batch, "input has no free number of images", {}),
        (_group_of_none, "", {}),
        (_many_scales, "conv.q (QuantizeLinear) has not one scale and one zero point", {}),
        (lambda model: None, "no digests of torch's tensorrt student", {"torch_digests": "none"}),
        (lambda model: None, "damaged, input is a int, not an object", {"input": 3}),
        (lambda model: None, "damaged, input/name is missing", {"input": {}}),
        (lambda model: None, "damaged, outputs/0 is null", {"outputs": [None]}),
        (lambda model: None, "no digests of torch's tensorrt student", {"torch_digests": {"tensorrt": {"codes": {}}}}),
    ],
)
def test_verify_refuses_a_network_that_is_not_what_the_manifest_says(
    tmp_path: Path, edit: Edit, word: str, facts: dict[str, Any]
) -> None:
    for network in NETWORKS:
        (tmp_path / network).write_bytes(edited(edit))
    is_refused(faqd_deploy("verify", described(tmp_path, **facts)), word)


@pytest.mark.parametrize(
    "key", ["preprocess", "outputs", "size", "layers", "input", "teacher", "torch_digests", "faqd"]
)
def test_a_manifest_without_an_entry_is_damaged(tmp_path: Path, key: str) -> None:
    path = hostile_bundle(tmp_path / "b", "good") / MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in manifest.items() if name != key}))
    is_refused(faqd_deploy("verify", path.parent), "no digests of torch's" if key == "torch_digests" else key)
    for command in ("inspect", "explain") if key != "torch_digests" else ():
        is_refused(faqd_deploy(command, path.parent), key)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[" * 200_000, "nested too deep"),
        ('{"format": "faqd-bundle", "version": 1, "files": {}, "x": ' + "[" * 900 + "]" * 900 + "}", "missing"),
        ("[]", "not the manifest"),
    ],
)
def test_a_manifest_of_another_form_is_refused(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    for command in ("verify", "inspect", "explain", "build-engine"):
        is_refused(faqd_deploy(command, tmp_path), word)


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        ({"name": "\x1b[2Jbundle"}, "control characters"),
        ({"layers": [{}]}, "layers/0/name is missing"),
        ({"preprocess": {"height": 8, "width": 8, "mean": [0], "std": [0], "channels": "grey"}}, "preprocess"),
        ({"preprocess": {"height": 8, "width": 8, "mean": [0], "std": [1], "channels": "grey", "x": 1}}, "preprocess"),
        ({"torch_digests": {"tensorrt": {"output_bits": "a"}}}, "no digests of torch's"),
        ({"weight_bits": 10**400}, "weight_bits"),
        ({"name": "\ud800"}, "control characters"),
        ({"as_trained": [1]}, "as_trained"),
        ({"as_trained": {"images": 3}}, "as_trained/snr_db"),
    ],
)
def test_entries_that_are_none_are_refused(tmp_path: Path, facts: dict[str, Any], word: str) -> None:
    for network in NETWORKS:
        (tmp_path / network).write_bytes(good().SerializeToString())
    is_refused(faqd_deploy("verify", described(tmp_path, **facts)), word)


def test_names_of_a_proof_reach_no_terminal(tmp_path: Path) -> None:
    bundle = hostile_bundle(tmp_path / "b", "good")
    (bundle / VERIFY).write_text(json.dumps({"passed": True, "onnx_sha256": {"\x1b[2J": "0"}}))
    outcome = faqd_deploy("inspect", bundle)
    assert outcome.code == 0 and "STALE" in outcome.stdout and "\x1b" not in outcome.stdout


def test_a_network_beside_those_of_the_bundle_is_refused(tmp_path: Path) -> None:
    for network in (*NETWORKS, "other.onnx"):
        (tmp_path / network).write_bytes(good().SerializeToString())
    manifest = json.loads((described(tmp_path) / MANIFEST).read_text())
    facts = {key: manifest[key] for key in manifest if key != "files"}
    write_manifest(tmp_path, facts, dict.fromkeys([*manifest["files"], "other.onnx"], ""))
    is_refused(faqd_deploy("verify", tmp_path), "lists other.onnx")


def test_a_proof_that_is_none_is_told(tmp_path: Path) -> None:
    bundle = hostile_bundle(tmp_path / "b", "good")
    (bundle / VERIFY).write_text("[]")
    outcome = faqd_deploy("inspect", bundle)
    assert outcome.code == 0 and "verify: FAILED: not the result of a verification" in outcome.stdout


def test_metadata_reaches_no_terminal(tmp_path: Path) -> None:
    model = good()
    model.producer_name = "faqd"
    labels = "conv: \x1b[2J x 8; conv: 8 x " + "9" * 5000
    model.metadata_props.add(key="faqd.bits", value=labels)
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())
    outcome = faqd_deploy("explain", path, "--rules-only", "--json", "-")
    assert outcome.code == 0 and "\\u001b" not in outcome.stdout and "\x1b" not in outcome.stdout + outcome.stderr


@pytest.mark.parametrize("damage", [b"\x00" * 20, b"\xff" * 20])
def test_evaluation_data_whose_bytes_are_damaged(tmp_path: Path, damage: bytes) -> None:
    for network in NETWORKS:
        (tmp_path / network).write_bytes(good().SerializeToString())
    described(tmp_path)
    images, teacher = np.zeros((40, 8, 8, 3), np.uint8), np.random.default_rng(0).normal(size=(40, 10))
    arrays: dict[str, Any] = {"images": images, "teacher.logits": teacher.astype(np.float32)}
    np.savez_compressed(tmp_path / EVAL, **arrays)
    whole = (tmp_path / EVAL).read_bytes()
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    facts = {key: manifest[key] for key in manifest if key != "files"}
    for at in range(0, len(whole) - 20, 60):
        (tmp_path / EVAL).write_bytes(whole[:at] + damage + whole[at + 20 :])
        write_manifest(tmp_path, facts, dict.fromkeys((*NETWORKS, EVAL, PROBE_OUTPUTS), ""))
        outcome = faqd_deploy("verify", tmp_path)
        assert outcome.code in (1, 2) and "Traceback" not in outcome.stderr


@pytest.mark.parametrize(
    "data",
    [
        {"images": np.zeros((0, 8, 8, 3), np.uint8), "teacher.logits": np.zeros((0, 10), np.float32)},
        {"images": np.zeros((4, 8, 8, 3), np.uint8)},
        {"teacher.logits": np.zeros((4, 10), np.float32)},
        {"images": np.zeros((4, 8, 0, 3), np.uint8), "teacher.logits": np.zeros((4, 10), np.float32)},
        {"images": np.zeros((4, 8, 8, 3), np.uint8), "teacher.logits": np.array("ten")},
        {"images": np.zeros((4, 8, 8, 3), np.uint8), "teacher.logits": np.zeros((0, 10), np.float32)},
        {"images": np.array([{}], object)},
        {"images": np.zeros((4, 9, 9, 3), np.uint8), "teacher.logits": np.zeros((4, 10), np.float32)},
        {"images": np.zeros((4, 8, 8, 3), np.uint8), "teacher.logits": np.float32(1)},
        {
            "images": np.zeros((4, 8, 8, 3), np.uint8),
            "teacher.logits": np.zeros((4, 10), np.float32),
            "labels": np.zeros(3, int),
        },
        None,
    ],
    ids=[
        *("no images", "no outputs", "no width", "words", "no rows", "nothing", "pickled"),
        *("other size", "a number", "few labels", "no npz"),
    ],
)
def test_verify_refuses_evaluation_data_that_is_none(tmp_path: Path, data: dict[str, Any] | None) -> None:
    for network in NETWORKS:
        (tmp_path / network).write_bytes(good().SerializeToString())
    described(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    if data is None:
        (tmp_path / EVAL).write_bytes(b"none")
    else:
        np.savez(tmp_path / EVAL, **data)
    write_manifest(
        tmp_path,
        {key: manifest[key] for key in manifest if key != "files"},
        dict.fromkeys((*NETWORKS, EVAL, PROBE_OUTPUTS), ""),
    )
    is_refused(faqd_deploy("verify", tmp_path), "eval.npz")


def test_the_worst_take_little_memory_and_time(tmp_path: Path) -> None:
    """In a process that the system stops at 3 GB of address space or 30 s of processor time."""
    paths = [str(shelve(name, tmp_path / f"{index}.onnx")) for index, name in enumerate(WORST)]
    program = """
import json, resource, sys
from pathlib import Path
from faqd.deploy.onnx_model.load import load_model
from faqd.errors import UserError
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
said = []
for path in sys.argv[1:]:
    try:
        load_model(Path(path))
    except UserError as error:
        said.append(str(error))
print(json.dumps([said, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""
    result = subprocess.run(
        [sys.executable, "-c", program, *paths], capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )
    assert result.returncode == 0, result.stderr
    said, kilobytes = json.loads(result.stdout)
    assert len(said) == len(WORST)
    assert kilobytes < 300_000


def _joined(count: int) -> onnx.ModelProto:
    """A map joined with itself again and again."""
    model = good()
    nodes = [
        onnx.helper.make_node("Concat", [f"m{index}"] * 2, [f"m{index + 1}"], f"join{index}", axis=2)
        for index in range(count)
    ]
    nodes[0].input[:] = ["dq", "dq"]
    model.graph.node.extend(nodes)
    model.graph.node.append(onnx.helper.make_node("Conv", [f"m{count}", "w"], ["end"], "end"))
    return model


def _chain(count: int, operator: str, constant: str = "") -> onnx.ModelProto:
    """One operator again and again, with a convolution of every result."""
    model = good()
    for index in range(count):
        inputs = [f"c{index}" if index else "dq", *filter(None, [constant])]
        model.graph.node.append(onnx.helper.make_node(operator, inputs, [f"c{index + 1}"], f"c{index}"))
        model.graph.node.append(onnx.helper.make_node("Conv", [f"c{index + 1}", "w"], [f"k{index}"], f"k{index}"))
    return model


def _products(count: int) -> onnx.ModelProto:
    model = good()
    square = np.eye(8, dtype=np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(square, "square"))
    for index in range(count):
        inputs = [f"p{index}" if index else "input", "square"]
        model.graph.node.append(onnx.helper.make_node("MatMul", inputs, [f"p{index + 1}"], f"p{index}"))
    return model


@pytest.mark.parametrize(
    "model",
    [
        lambda: _joined(22),
        lambda: _chain(900, "Concat"),
        lambda: _chain(8_000, "Identity"),
        lambda: _products(8_000),
    ],
    ids=["doubled maps", "joins of one", "copies", "products"],
)
def test_explain_walks_any_network_in_seconds(tmp_path: Path, model: Callable[[], onnx.ModelProto]) -> None:
    path = tmp_path / "net.onnx"
    whole = model()
    for node in whole.graph.node:
        if node.op_type == "Concat" and len(node.input) == 1:
            node.attribute.append(onnx.helper.make_attribute("axis", 1))
    path.write_bytes(whole.SerializeToString())
    program = """
import resource, sys
from pathlib import Path
from faqd.deploy.explain.explain import explanation
from faqd.errors import UserError
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
try:
    print(len(explanation(Path(sys.argv[1]), rules_only=True)["layers"]))
except UserError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )
    assert result.returncode == 0, result.stderr[-500:]
    layers = sum(node.op_type in ("Conv", "MatMul") for node in whole.graph.node)
    assert result.stdout.strip() == str(layers) or "larger than anything" in result.stdout


def test_the_scan_alone_keeps_a_parser_from_other_files(tmp_path: Path) -> None:
    """The device part has no onnx: what it hands to TensorRT can name no file, wherever the name stands."""
    for name in SHELF:
        if name.startswith("weights"):
            with pytest.raises(UserError, match="in another file"):
                read_scanned(shelve(name, tmp_path / "x.onnx"))


def test_a_free_size_may_be_minus_one(tmp_path: Path) -> None:
    """As Paddle's exporter writes it; for others it is no size."""
    model = good()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = -1
    path = tmp_path / "free.onnx"
    path.write_bytes(model.SerializeToString())
    assert not load_model(path).graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value")


def test_damage_anywhere_ends_in_a_sentence_or_does_no_harm(tmp_path: Path) -> None:
    whole = good().SerializeToString()
    generator = np.random.default_rng(0)
    path = tmp_path / "damaged.onnx"
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        for at in generator.integers(0, len(data), generator.integers(1, 4)):
            data[at] = generator.integers(0, 256)
        path.write_bytes(data[: generator.integers(len(data) // 2, len(data) + 1)])
        try:
            load_model(path)
        except UserError:
            refused += 1
    assert refused > 200


def test_the_scan_reads_every_file_that_protobuf_writes() -> None:
    scan(good().SerializeToString(), "good")
    with pytest.raises(UserError, match=r"in memory: .*it is empty"):
        scan(b"", "in memory")
