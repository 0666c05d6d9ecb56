"""Engines really built with TensorRT-RTX, which needs no GPU: what runs in INT8, what is refused, what is left."""

from __future__ import annotations

import importlib.util
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faqd.bundle import FLOAT_STUDENT_FP16, STUDENT_TENSORRT, TEACHER, TEACHER_FP16, VERIFY, Bundle, write_manifest
from faqd.deploy.cuda import cuda
from faqd.deploy.engine import build as engine
from faqd.deploy.engine.build import engine_from_onnx
from faqd.deploy.engine.bundle_engines import build_bundle
from faqd.deploy.engine.options import BuildOptions
from faqd.deploy.engine.record import read_record
from faqd.deploy.engine.trt import Messages, TensorRT, builder_here
from faqd.deploy.export.float16 import float16_from_float32
from faqd.deploy.runtime import runtime
from faqd.deploy.runtime.runtime import load_engine
from faqd.errors import UserError
from faqd.files import sha256, write_json
from tests.fixtures.qdq_network import LAYERS, residual_network, unbuildable_network, written
from tests.fixtures.tiny_bundles import facts_of, write_verify

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed (pip install 'faqd[rtx]'): nothing here can build an engine",
)


def build(onnx: Path, said: list[str] | None = None, **options: Any) -> dict[str, Any]:
    lines: list[str] = [] if said is None else said
    return engine_from_onnx(onnx, onnx.with_suffix(".engine"), BuildOptions(**options), lines.append)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@needs_rtx
def test_every_layer_of_a_well_placed_network_runs_in_int8(tmp_path: Path) -> None:
    onnx = written(residual_network(), tmp_path / "net.onnx")
    said: list[str] = []
    record = build(onnx, said)
    assert {product["node"]: product["int8"] for product in record["int8"]["products"]} == dict.fromkeys(LAYERS, True)
    assert record["not_int8"] == []
    assert record["layers_read_from"] in ("build log", "engine inspector")
    assert record["warnings"] == []
    assert said[-1].startswith("net.engine: ") and "6 of 6 convolutions and matrix products in INT8" in said[-1]


@needs_rtx
def test_a_conv_without_qdq_is_reported_by_name(tmp_path: Path) -> None:
    onnx = written(residual_network(without_qdq="conv2"), tmp_path / "net.onnx")
    said: list[str] = []
    record = engine_from_onnx(onnx, tmp_path / "net.engine", BuildOptions(), said.append, expected_int8=LAYERS)
    assert [product["node"] for product in record["int8"]["products"] if not product["int8"]] == ["conv2"]
    assert record["int8"]["missing"] == ["conv2"]
    assert len(record["not_int8"]) == 1 and record["not_int8"][0].startswith("conv2")
    assert any("6 layers should run in INT8, 5 do; not so: conv2" in line for line in said)


@needs_rtx
def test_the_record_says_what_the_engine_is(tmp_path: Path) -> None:
    onnx = written(residual_network(), tmp_path / "net.onnx")
    record = build(onnx, max_shapes={"images": (16, 3, 16, 16)}, workspace_mib=512, opt_level=2)
    assert record == json.loads((tmp_path / "net.engine.json").read_text())
    assert record == read_record(tmp_path / "net.engine")
    assert record["engine"]["sha256"] == sha256(tmp_path / "net.engine")
    assert record["onnx"] == {"file": "net.onnx", "sha256": sha256(onnx)}
    assert record["builder"]["name"] in ("tensorrt", "tensorrt_rtx")
    assert record["typing"] == "strong"
    assert record["float_type"] == "fp32"
    assert record["inputs"] == [{"name": "images", "shape": [-1, 3, 16, 16], "dtype": "float"}]
    assert record["outputs"] == [{"name": "classifier", "shape": [-1, 16], "dtype": "float"}]
    assert record["shapes"] == {"images": {"min": [1, 3, 16, 16], "opt": [8, 3, 16, 16], "max": [16, 3, 16, 16]}}
    assert record["options"]["workspace_mib"] == 512 and record["options"]["opt_level"] == 2
    assert record["platform"] == {"system": platform.system(), "architecture": platform.machine()}
    assert files(tmp_path) == {"net.onnx", "net.engine", "net.engine.json"}


@needs_rtx
def test_the_record_speaks_of_the_bytes_that_were_parsed(tmp_path: Path) -> None:
    onnx = written(residual_network(), tmp_path / "net.onnx")
    parsed = sha256(onnx)

    def say(line: str) -> None:
        if "Building engine" in line:  # Somebody exports again while the builder is at work.
            onnx.write_bytes(b"another network")

    record = engine_from_onnx(onnx, tmp_path / "net.engine", BuildOptions(), say)
    assert record["onnx"]["sha256"] == parsed != sha256(onnx)


def test_a_file_that_changed_since_the_bundle_was_read_is_refused(tmp_path: Path) -> None:
    onnx = written(residual_network(), tmp_path / "net.onnx")
    with pytest.raises(UserError, match=r"net\.onnx: changed since the bundle was read"):
        engine_from_onnx(onnx, tmp_path / "net.engine", BuildOptions(), lambda line: None, sha256="0" * 64)
    assert files(tmp_path) == {"net.onnx"}


@needs_rtx
@pytest.mark.parametrize(
    "option",
    [{"timing_cache": Path("cache")}, {"version_compatible": True}, {"hardware_compatibility": "ampere+"}],
    ids=str,
)
def test_what_tensorrt_rtx_does_not_have_is_refused_before_the_build(tmp_path: Path, option: dict[str, Any]) -> None:
    onnx = written(residual_network(), tmp_path / "net.onnx")
    if builder_here(cuda.device_or_none()[0] is not None)[0].name != "tensorrt_rtx":
        pytest.skip("the full TensorRT is installed, which has it")
    said: list[str] = []
    with pytest.raises(UserError, match=r"^--.*: TensorRT-RTX \d+\.\d+.* does not have it"):
        build(onnx, said, **option)
    assert said == [] and files(tmp_path) == {"net.onnx"}


@needs_rtx
def test_less_verbosity_keeps_the_types_from_us_and_that_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    record = build(written(residual_network(), tmp_path / "net.onnx"), said, profiling_verbosity="none")
    assert record["layers_read_from"] is None and record["options"]["profiling_verbosity"] == "none"
    assert "--profiling-verbosity detailed" in said[-1]


@needs_rtx
def test_the_equivalent_line_is_said_and_recorded(tmp_path: Path) -> None:
    said: list[str] = []
    onnx = written(residual_network(), tmp_path / "net.onnx")
    record = build(onnx, said, opt_level=1)
    assert f"--onnx={onnx}" in record["trtexec"] and "--builderOptimizationLevel=1" in record["trtexec"]
    assert "--maxShapes=images:64x3x16x16" in record["trtexec"]
    assert any(line.endswith(record["trtexec"]) for line in said)


@needs_rtx
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[: len(data) // 2], "not a valid ONNX file"),
        (lambda data: b"", "not a valid ONNX file"),
        (lambda data: b"this is no network", "not a valid ONNX file"),
    ],
    ids=["truncated", "empty", "text"],
)
def test_a_damaged_file_ends_in_a_sentence(tmp_path: Path, damage: Any, says: str) -> None:
    onnx = tmp_path / "net.onnx"
    onnx.write_bytes(damage(residual_network().SerializeToString()))
    with pytest.raises(UserError, match=f"net.onnx: .*{says}.*export it again") as caught:
        build(onnx)
    assert caught.value.exit_code == 2
    assert files(tmp_path) == {"net.onnx"}


@needs_rtx
def test_a_zero_point_that_tensorrt_does_not_take_is_named(tmp_path: Path) -> None:
    onnx = written(residual_network(zero=np.uint8(128)), tmp_path / "net.onnx")
    with pytest.raises(UserError, match=r"node input\.code \(QuantizeLinear\): .*zero point") as caught:
        build(onnx)
    assert caught.value.exit_code == 2


@needs_rtx
def test_what_the_parser_only_warns_of_stands_in_the_record(tmp_path: Path) -> None:
    said: list[str] = []
    record = build(written(residual_network(zero=np.uint8(0)), tmp_path / "net.onnx"), said)
    assert "UINT8" in record["warnings"][0]
    assert any(line.startswith("net.engine: warning: ") and "UINT8" in line for line in said)


@needs_rtx
def test_messages_of_two_builds_at_once_stay_apart(tmp_path: Path) -> None:
    # TensorRT keeps to the logger it met first, for as long as something of it is alive, such as this traceback.
    with pytest.raises(UserError) as alive:
        build(written(unbuildable_network(), tmp_path / "bad.onnx"))
    record = build(written(residual_network(), tmp_path / "net.onnx"))
    assert record["warnings"] == [] and record["layers_read_from"] is not None
    assert alive.value.exit_code == 1


@needs_rtx
def test_a_failed_build_leaves_the_engine_of_before(tmp_path: Path) -> None:
    onnx = written(residual_network(), tmp_path / "net.onnx")
    build(onnx)
    before = {name: sha256(tmp_path / name) for name in ("net.engine", "net.engine.json")}
    written(unbuildable_network(), onnx)
    with pytest.raises(UserError, match=r"built no engine: .*scale") as caught:
        build(onnx)
    assert caught.value.exit_code == 1
    assert {name: sha256(tmp_path / name) for name in before} == before
    assert files(tmp_path) == {"net.onnx", *before}


@needs_rtx
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx = written(residual_network(), tmp_path / "net.onnx")

    def cut_short(path: Path, data: Any) -> int:
        with path.open("wb") as stream:
            stream.write(bytes(data)[:1000])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", cut_short)
    with pytest.raises(OSError, match="No space left"):
        build(onnx)
    assert files(tmp_path) == {"net.onnx"}


@needs_rtx
def test_a_changed_engine_is_refused_before_any_cuda_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(written(residual_network(), tmp_path / "net.onnx"))
    path = tmp_path / "net.engine"
    path.write_bytes(path.read_bytes() + b"\0")
    monkeypatch.setattr(runtime, "open_cuda", lambda backend: pytest.fail("CUDA was asked"))
    with pytest.raises(UserError, match=r"net\.engine: not the engine .*SHA-256 differs.*build-engine"):
        load_engine(path)


@needs_rtx
def test_an_engine_without_a_record_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(written(residual_network(), tmp_path / "net.onnx"))
    (tmp_path / "net.engine.json").unlink()
    monkeypatch.setattr(runtime, "open_cuda", lambda backend: pytest.fail("CUDA was asked"))
    with pytest.raises(UserError, match=r"no record net\.engine\.json"):
        load_engine(tmp_path / "net.engine")


@needs_rtx
def test_an_engine_of_another_version_is_refused(tmp_path: Path) -> None:
    record = build(written(residual_network(), tmp_path / "net.onnx"))
    record["builder"]["version"] = "10.3.0"
    write_json(tmp_path / "net.engine.json", record)
    with pytest.raises(UserError, match=r"built with .* 10\.3\.0, and this machine has .*build-engine"):
        load_engine(tmp_path / "net.engine")


@needs_rtx
def test_without_a_gpu_loading_ends_in_a_sentence(tmp_path: Path) -> None:
    if cuda.device_or_none()[0] is not None:
        pytest.skip("this machine has a GPU")
    build(written(residual_network(), tmp_path / "net.onnx"))
    with pytest.raises(UserError, match="Engines run only on an NVIDIA GPU"):
        load_engine(tmp_path / "net.engine")


def make_bundle(
    folder: Path, layers: tuple[str, ...] = LAYERS, student: str = STUDENT_TENSORRT, teacher: str = TEACHER_FP16
) -> Bundle:
    folder.mkdir()
    names = (student, FLOAT_STUDENT_FP16, teacher)
    for name in names:
        network = residual_network()
        written(float16_from_float32(network) if "fp16" in name else network, folder / name)
    known = {"operator": "Conv", "weights": "8", "inputs": "8", "weight_shape": [8, 8, 3, 3], "runs_int8": True}
    rows = [{"name": name, **known} for name in layers]
    return write_manifest(folder, facts_of("tiny 8/8", layers=rows), dict.fromkeys(names, "0" * 64))


@needs_rtx
def test_a_bundle_is_built_and_its_record_bound_to_the_verification(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    kept = {"images": 9, "fidelity": {"y": 0.9876}, "least": 0.9876, "verdict": "kept", "top1_agreement": None}
    write_verify(bundle, fidelity={STUDENT_TENSORRT: kept})
    said: list[str] = []
    records = build_bundle(bundle, all=True, force=False, options=BuildOptions(), say=said.append)
    assert f"{STUDENT_TENSORRT} is proved; of its teacher: kept, fidelity 0.988." in said
    assert [record["fidelity"] for record in records] == [kept, None, None]
    assert [record["engine"]["file"] for record in records] == [
        "student.tensorrt.engine",
        "student.float.fp16.engine",
        "teacher.fp16.engine",
    ]
    assert [record["float_type"] for record in records] == ["fp32", "fp16", "fp16"]
    assert records[0]["int8"]["expected"] == 6 and records[0]["int8"]["missing"] == []
    assert records[1]["int8"]["expected"] is None
    proof = {"file": VERIFY, "sha256": sha256(bundle.folder / VERIFY), "passed": True, "complaint": None}
    assert [record["verify"] for record in records] == [proof] * 3
    assert not any("warning" in line for line in said)


@needs_rtx
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"passed": False}, "the verification failed"),
        ({"onnx_sha256": {STUDENT_TENSORRT: "0" * 64}}, "another student.tensorrt.onnx"),
        ({"onnx_sha256": {}}, "another student.tensorrt.onnx"),
        ({"manifest_sha256": "0" * 64}, "another manifest.json"),
        ({"manifest_sha256": None}, "another manifest.json"),
        ({"onnx_sha256": None}, "not the result of a verification"),
    ],
)
def test_only_verified_files_are_built(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    write_verify(bundle, **changes)
    with pytest.raises(UserError, match=says) as caught:
        build_bundle(bundle, all=False, force=False, options=BuildOptions(), say=lambda text: None)
    assert caught.value.exit_code == 1
    assert not list(bundle.folder.glob("*.engine"))
    said: list[str] = []
    (record,) = build_bundle(bundle, all=False, force=True, options=BuildOptions(), say=said.append)
    assert says in said[0] and "--force" in said[0]
    assert record["verify"]["passed"] is False and says in record["verify"]["complaint"]


@needs_rtx
def test_missing_verification_and_missing_int8_layers_are_said(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", layers=(*LAYERS, "gone"))
    said: list[str] = []
    (record,) = build_bundle(bundle, all=False, force=False, options=BuildOptions(), say=said.append)
    assert "no verify.json" in said[0]
    assert record["verify"] is None
    assert any("7 layers should run in INT8, 6 do; not so: gone" in line for line in said)


@needs_rtx
def test_a_bundle_without_an_fp16_teacher_gets_an_fp32_one_and_is_told(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", teacher=TEACHER)
    write_verify(bundle)
    said: list[str] = []
    records = build_bundle(bundle, all=True, force=False, options=BuildOptions(), say=said.append)
    assert records[2]["engine"]["file"] == "teacher.engine" and records[2]["float_type"] == "fp32"
    assert said[0].startswith("warning: ") and "holds no teacher.fp16.onnx" in said[0] and "FP32" in said[0]


def test_a_student_for_onnxruntime_has_no_engine(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", student="student.onnxruntime.onnx")
    with pytest.raises(UserError, match=r"--target onnxruntime.*--target tensorrt"):
        build_bundle(bundle, all=False, force=False, options=BuildOptions(), say=lambda text: None)


def test_no_builder_without_a_driver_is_a_sentence() -> None:
    class NoDriver:
        __version__ = "10.13.3"

        @staticmethod
        def Builder(log: Any) -> Any:
            raise TypeError("pybind11::init(): factory function returned nullptr")

    with pytest.raises(UserError, match=r"TensorRT 10\.13\.3 starts no builder .*GPU.*\[rtx\]"):
        engine.new_builder(TensorRT("tensorrt", NoDriver), None, Messages())


@pytest.mark.parametrize(
    ("name", "version", "strong"),
    [
        ("tensorrt", "10.3.0", False),
        ("tensorrt", "10.11.0.33", False),
        ("tensorrt", "10.12.0", True),
        ("tensorrt", "11.4.1", True),
        ("tensorrt_rtx", "1.7.1.116", True),
    ],
)
def test_strong_typing_from_ten_twelve_on(name: Any, version: str, strong: bool) -> None:
    assert TensorRT(name, type("Module", (), {"__version__": version})).strongly_typed is strong


def test_the_device_part_needs_no_torch_and_no_onnx() -> None:
    blocked = ("torch", "onnx", "onnxruntime", "onnxscript", "tensorrt", "tensorrt_rtx", "cuda", "pycuda")
    modules = (
        "engine.build",
        "runtime.runtime",
        "cuda.cuda",
        "engine.trt",
        "engine.kernels",
        "engine.record",
        "board.doctor",
    )
    program = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import importlib
for name in {modules!r}:
    importlib.import_module("faqd.deploy." + name)
from faqd.deploy.cuda.cuda import device_or_none
from faqd.deploy.engine.trt import installed
from faqd.errors import UserError
device, why = device_or_none()
assert device is None and "[device]" in why, why
try:
    installed()
except UserError as error:
    assert "JetPack" in str(error) and "[tensorrt]" in str(error) and "[rtx]" in str(error), error
else:
    raise AssertionError("tensorrt was blocked")
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.parametrize("backend", [None, "auto"])
def test_an_unknown_cuda_back_end_is_a_sentence(monkeypatch: pytest.MonkeyPatch, backend: str | None) -> None:
    monkeypatch.setenv("FAQD_CUDA_BACKEND", "opencl")
    with pytest.raises(UserError, match=r"'opencl': choose auto, cuda-bindings or pycuda"):
        cuda.device_or_none(backend)
    cuda.device_or_none("pycuda")  # What is asked for by name does not look at the variable.
