"""The self-test: its cases are what they claim, it builds them all, and whatever goes wrong is told as what it is."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from faqd.deploy.board import selftest as module
from faqd.deploy.board.cases import CASES_FILE, Case, load_cases
from faqd.deploy.board.selftest import OUTCOMES, line, selftest, summary, tried
from faqd.deploy.cli import cli
from faqd.deploy.cuda.cuda import device_or_none
from faqd.errors import UserError
from tests.deploy.engine.test_engine import needs_rtx
from tests.fixtures import selftest_networks

CASES, SHA256 = load_cases()
BY_NAME = {case.name: case for case in CASES}
BOARDS = Path(__file__).parents[3] / "results" / "boards"
Arrays = dict[str, NDArray[Any]]


def test_the_file_is_what_its_script_makes() -> None:
    made = selftest_networks.arrays()
    with np.load(CASES_FILE, allow_pickle=False) as file:
        assert list(file) == list(made)
        for name, array in made.items():
            np.testing.assert_array_equal(file[name], array)
            assert file[name].dtype == array.dtype
    assert CASES_FILE.stat().st_size < 300_000


def test_every_case_is_legal_onnx_and_says_what_it_is_for() -> None:
    assert len(CASES) >= 30 and len(BY_NAME) == len(CASES)
    for case in CASES:
        model = onnx.load_model_from_string(case.onnx)
        onnx.checker.check_model(model, full_check=True)
        assert {value.name for value in model.graph.input} == set(case.inputs)
        assert {value.name for value in model.graph.output} == set(case.expected) == set(case.steps)
        assert set(case.int8) <= {node.name for node in model.graph.node}
        assert case.shows.endswith(".") and len(case.shows) > 20


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_must_come_out_is_also_what_onnxruntime_says(case: Case) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(case.onnx, options, providers=["CPUExecutionProvider"])
    found = session.run(list(case.expected), dict(case.inputs))
    for name, values in zip(case.expected, found, strict=True):
        result = module.compared(name, values, case)
        assert result["right"], result
        if case.name not in ("common-scales", "per-channel-scales", "fp16-rest"):
            assert result["max_steps"] < 0.01, "powers of two: nothing is rounded but what must be"


@pytest.mark.parametrize("bits", range(1, 8))
def test_values_reach_beyond_every_clip(bits: int) -> None:
    case = BY_NAME[f"clip-{bits}-bit"]
    codes = case.expected["act"] / case.steps["act"]
    assert codes.max() <= 2**bits - 1
    at_the_top = np.mean(codes >= min(2**bits - 1, 100))
    assert at_the_top > 0.05 and np.mean(codes == 0) > 0.1


def test_the_linear_case_would_show_a_lost_upper_bound() -> None:
    for name, output in (("linear-clip", "out"), ("linear-clip-float", "clip")):
        case = BY_NAME[name]
        unbounded = {output: case.expected[output] + (case.expected[output] == case.expected[output].max())}
        assert not module.compared(output, unbounded[output], case)["right"]


# Built with TensorRT-RTX ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return selftest(None, None, lambda text: None)


@needs_rtx
def test_all_cases_that_faqd_relies_on_are_built_in_int8(record: dict[str, Any]) -> None:
    assert record["summary"]["broken"] == []
    assert [result["name"] for result in record["cases"]] == list(BY_NAME)
    for result in record["cases"]:
        if result["relied_on"]:
            assert [layer["int8"] for layer in result["layers"]] == [True] * len(BY_NAME[result["name"]].int8), result
    outcomes = {result["name"]: result["outcome"] for result in record["cases"]}
    assert outcomes["int32-bias"] == "refused" and outcomes["transposed"] == "float"


@needs_rtx
def test_the_record_says_on_what_it_was_found(record: dict[str, Any]) -> None:
    json.loads(json.dumps(record, allow_nan=False))
    assert (record["format"], record["version"], record["cases_sha256"]) == ("faqd-selftest", 1, SHA256)
    assert record["builder"]["version"] and record["machine"]["architecture"]
    assert (record["gpu"] is None) == bool(record["no_gpu_because"])
    assert record["summary"]["run"] == (record["gpu"] is not None)
    assert "faqd-selftest-" not in json.dumps(record["cases"]), "a temporary folder is nobody's business"


def without_qdq(case: Case) -> Case:
    """The case with its first Q/DQ pair taken out: legal, and float without a word."""
    model = onnx.load_model_from_string(case.onnx)
    pair = [node for node in model.graph.node if node.output[0] in ("images.q.code", "images.q")]
    for node in pair:
        model.graph.node.remove(node)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "images.q":
                node.input[index] = "images"
    return dataclasses.replace(case, onnx=model.SerializeToString())


def right(engine: Path, inputs: Arrays) -> Arrays:
    """A GPU on which everything comes out as it must."""
    return dict(BY_NAME[engine.stem].expected)


def off_by(codes: float, share: float) -> Any:
    """A GPU on which a share of all outputs is so many codes off."""

    def run(engine: Path, inputs: Arrays) -> Arrays:
        case = BY_NAME[engine.stem]
        found = {name: values.copy() for name, values in case.expected.items()}
        for name, values in found.items():
            values.reshape(-1)[: round(share * values.size)] += codes * case.steps[name]
        return found

    return run


def broken_down(engine: Path, inputs: Arrays) -> Arrays:
    raise UserError("CUDA: cuStreamSynchronize failed: an illegal memory access", exit_code=1)


def no_number(engine: Path, inputs: Arrays) -> Arrays:
    return {name: np.full_like(values, np.nan) for name, values in BY_NAME[engine.stem].expected.items()}


def other_shape(engine: Path, inputs: Arrays) -> Arrays:
    return {name: values[:1] for name, values in BY_NAME[engine.stem].expected.items()}


@needs_rtx
@pytest.mark.parametrize(
    ("run", "outcome", "says"),
    [
        (None, "built", "not run"),
        (right, "right", "the outputs are right"),
        (off_by(1, 0.009), "right", "the outputs are right"),
        (off_by(1, 0.02), "wrong", "98.0% equal, up to 1.0 steps off"),
        (off_by(2, 0.001), "wrong", "up to 2.0 steps off"),
        (no_number, "wrong", "no number"),
        (other_shape, "wrong", "0.0% equal"),
        (broken_down, "failed", "illegal memory access"),
    ],
    ids=["not run", "right", "rare", "many", "far", "nan", "shape", "breaks"],
)
def test_what_comes_out_is_judged(tmp_path: Path, run: Any, outcome: str, says: str) -> None:
    result = tried(BY_NAME["clip-4-bit"], tmp_path, run)
    assert result["outcome"] == outcome and says in line(result)
    assert summary([result])["broken"] == ([] if outcome in ("right", "built") else ["clip-4-bit"])
    json.dumps(result, allow_nan=False)


@needs_rtx
@pytest.mark.parametrize("run", [None, right, off_by(3, 0.5)], ids=["not run", "right", "wrong"])
def test_a_case_that_fell_to_float_is_reported_as_such(tmp_path: Path, run: Any) -> None:
    result = tried(without_qdq(BY_NAME["clip-4-bit"]), tmp_path, run)
    assert result["not_int8"] == ["conv"] and "float: conv" in line(result)
    assert result["outcome"] == ("wrong" if run not in (None, right) else "float")
    assert summary([result])["broken"] == ["clip-4-bit"]


@needs_rtx
def test_a_case_that_is_refused_says_by_whom_and_why(tmp_path: Path) -> None:
    result = tried(BY_NAME["int32-bias"], tmp_path, right)
    assert result["outcome"] == "refused" and result["outputs"] == []
    assert "node bias (DequantizeLinear)" in result["message"] and str(tmp_path) not in result["message"]
    assert summary([result])["broken"] == [], "faqd does not rely on it"


@needs_rtx
def test_the_command_ends_in_one_if_a_case_does_not_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cases = [without_qdq(BY_NAME["clip-4-bit"]), BY_NAME["clip-3-bit"]]
    monkeypatch.setattr(module, "load_cases", lambda: (cases, SHA256))
    target = tmp_path / "board.json"
    result = CliRunner().invoke(cli, ["selftest", "--cases", "clip-[34]", "--json", str(target)])
    assert isinstance(result.exception, UserError) and result.exception.exit_code == 1
    assert str(result.exception) == "not as faqd needs it: clip-4-bit"
    assert json.loads(target.read_text())["summary"]["broken"] == ["clip-4-bit"], "the JSON is written all the same"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cases", "["], r"--cases \[: not a regular expression"),
        (["--cases", "squeeze"], r"matches none of clip-1-bit, clip-2-bit"),
        (["--cuda", "opencl"], "Invalid value for '--cuda'"),
    ],
)
def test_bad_options_end_in_a_sentence(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(cli, ["selftest", *arguments])
    assert result.exit_code != 0
    assert re.search(says, f"{result.output}{result.exception}")


def test_a_damaged_case_file_ends_in_a_sentence(tmp_path: Path) -> None:
    damaged = tmp_path / "cases.npz"
    for content in (b"", b"no zip at all", CASES_FILE.read_bytes()[:5000]):
        damaged.write_bytes(content)
        with pytest.raises(UserError, match=r"cases\.npz: the cases of the self-test cannot be read .*install"):
            load_cases(damaged)


# What boards have sent in --------------------------------------------------------------------------------------------


def test_every_board_in_results_is_a_whole_run() -> None:
    paths = sorted(BOARDS.glob("*.json"))
    assert paths
    for path in paths:
        record = json.loads(path.read_text(encoding="utf-8"))
        assert (record["format"], record["version"]) == (module.FORMAT, module.VERSION), path
        assert path.name.startswith(f"{record['builder']['name']}-{record['builder']['version']}-"), path
        assert path.name.endswith("-no-gpu.json") == (record["gpu"] is None), path
        assert record["summary"] == summary(record["cases"]), path
        assert {result["outcome"] for result in record["cases"]} <= set(OUTCOMES), path
        assert len(record["cases"]) >= 30, path


@needs_rtx
def test_the_board_without_a_gpu_is_what_comes_out_here(record: dict[str, Any]) -> None:
    if device_or_none()[0] is not None:
        pytest.skip("this machine has a GPU")
    name = f"{record['builder']['name']}-{record['builder']['version']}-no-gpu.json"
    if not (BOARDS / name).is_file():
        pytest.skip(f"results/boards has no {name}")
    kept = json.loads((BOARDS / name).read_text(encoding="utf-8"))
    for key in ("cases_sha256", "summary", "typing"):
        assert kept[key] == record[key], f"{key} differs: run `faqd-deploy selftest --json results/boards/{name}` again"
    for before, now in zip(kept["cases"], record["cases"], strict=True):
        assert (before["outcome"], before["layers"]) == (now["outcome"], now["layers"])


NO_DRIVER = """
__version__ = "10.13.3"

class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = range(3)

class Builder:
    def __init__(self, log):
        raise TypeError("pybind11::init(): factory function returned nullptr")
"""
"""What the full TensorRT is on a machine without a driver."""


def run_beside(folder: Path, *modules: tuple[str, str]) -> subprocess.CompletedProcess[str]:
    """The self-test with these modules found before what is installed."""
    for name, code in modules:
        (folder / f"{name}.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": f"{folder}:{Path(__file__).parents[3]}"}
    command = [sys.executable, "-m", "faqd.deploy", "selftest", "--cases", "linear-clip$"]
    command += ["--json", str(folder / "r.json")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


needs_no_gpu = pytest.mark.skipif(device_or_none()[0] is not None, reason="this machine has a GPU, so TensorRT builds")


@needs_rtx
@needs_no_gpu
def test_tensorrt_rtx_does_the_build_half_beside_a_tensorrt_without_a_driver(tmp_path: Path) -> None:
    result = run_beside(tmp_path, ("tensorrt", NO_DRIVER))
    assert result.returncode == 0, result.stderr
    assert re.search(
        r"TensorRT 10\.13\.3 is installed too, but builds only .* a GPU: TensorRT-RTX .* builds", result.stderr
    )
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["builder"]["name"] == "tensorrt_rtx" and record["summary"]["outcomes"] == {"built": 1}


@needs_no_gpu
def test_a_tensorrt_that_starts_no_builder_is_one_sentence(tmp_path: Path) -> None:
    result = run_beside(tmp_path, ("tensorrt", NO_DRIVER), ("tensorrt_rtx", "raise ImportError('not here')"))
    assert result.returncode == 2 and not (tmp_path / "r.json").exists()
    assert (
        result.stderr.startswith("error: TensorRT 10.13.3 starts no builder here") and "not built" not in result.stderr
    )
