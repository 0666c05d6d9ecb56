"""faqd-bench on tiny bundles: the record, the table, the gates, and input that is wrong."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faqd.benchmarks.backends.sessions import OnnxruntimeBackend
from faqd.benchmarks.bench import bench
from faqd.benchmarks.cli import main
from faqd.benchmarks.measure.latency import Length
from faqd.benchmarks.measure.switches import Options
from faqd.benchmarks.record.gates import Gates
from faqd.benchmarks.record.schema import complaint
from faqd.benchmarks.report.terminal import console_for, print_result
from faqd.bundle import FLOAT_STUDENT, STUDENT_ONNXRUNTIME, STUDENT_TENSORRT, TEACHER, load_bundle
from faqd.deploy.onnx_model.session import OnnxSession
from faqd.errors import UserError
from tests.fixtures.tiny_bundles import ISLANDS, PREPROCESS, make_bundle, network, write_verify

QUICK = Options(batch=(1, 4), length=Length(duration_s=0.02, rounds=2, warm_up_ms=0.0))


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit code of the command as the shell would see it."""
    monkeypatch.setattr(sys, "argv", ["faqd-bench", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bundles")
    make_bundle(root / "student")
    make_bundle(root / "ptq", "tiny PTQ", kind="ptq", noise=0.3, verify=None)
    make_bundle(root / "labelless", labels=False)
    make_bundle(root / "dense", dense=True, labels=False)
    return {path.name: path for path in root.iterdir()}


def record(*folders: Path, options: Options = QUICK) -> dict[str, Any]:
    return bench([load_bundle(folder) for folder in folders], OnnxruntimeBackend(1, "test"), options).result


def test_session_runs_a_network_optimised_or_not(folders: dict[str, Path]) -> None:
    bundle = load_bundle(folders["student"])
    data = bundle.evaluation()
    feeds = {"input": bundle.preprocess.normalise(data.images)}
    for optimise in (True, False):
        session = OnnxSession(bundle.path(TEACHER), optimise=optimise)
        assert (session.inputs, session.outputs) == (("input",), ("logits",))
        np.testing.assert_allclose(session.run(feeds)["logits"], data.teacher["logits"], atol=1e-4)
    assert OnnxSession(bundle.path(TEACHER).read_bytes()).inputs == ("input",)


@pytest.mark.parametrize("content", [b"", b"no model", network(np.ones((64, 10), np.float32))[:-40]])
def test_session_on_a_damaged_file(tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.onnx: not a valid ONNX file"):
        OnnxSession(path)
    with pytest.raises(UserError, match=r"the model in memory: onnxruntime .* cannot load it"):
        OnnxSession(content)
    with pytest.raises(UserError, match="no such file"):
        OnnxSession(tmp_path / "absent.onnx")
    assert capfd.readouterr() == ("", ""), "what is raised is not printed as well"


def test_session_on_wrong_feeds(folders: dict[str, Path]) -> None:
    session = OnnxSession(folders["student"] / TEACHER)
    with pytest.raises(UserError, match="cannot run the network"):
        session.run({"input": np.ones((1, 3, 3), np.float32)})
    with pytest.raises(UserError, match="cannot run the network"):
        session.run({"other": np.ones((1, 1, 8, 8), np.float32)})


def test_a_bound_query_computes_what_run_does(folders: dict[str, Path]) -> None:
    session = OnnxSession(folders["student"] / TEACHER)
    x = np.random.default_rng(0).standard_normal((8, 8, 1, 4), np.float32).transpose(3, 2, 0, 1)
    query = session.bound({"input": x})
    feed, result = query.feeds["input"], query.results["logits"]
    for factor in (1.0, -2.0):
        feed[:] = factor * x
        query()
        np.testing.assert_array_equal(result, session.run({"input": feed})["logits"])
    with pytest.raises(UserError, match="cannot run the network"):
        session.bound({"input": x[:, :, 1:]})


def test_the_record_of_two_bundles(folders: dict[str, Path]) -> None:
    found = record(folders["student"], folders["ptq"])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["format"], found["version"]) == ("faqd-bench", 2)
    assert [network["id"] for network in found["networks"]] == [
        "teacher",
        "student-0",
        "float-0",
        "student-1",
        "float-1",
    ], "the common teacher stands there once"
    teacher, student, baseline, ptq, _ = found["networks"]
    assert teacher["accuracy"]["top1"] == {**teacher["accuracy"]["top1"], "count": 108, "n": 120}
    assert teacher["accuracy"]["agreement"] is None
    assert student["accuracy"]["agreement"]["value"] > ptq["accuracy"]["agreement"]["value"]
    assert baseline["accuracy"] is None, "its weights were never meant to classify"
    for entry in found["networks"]:
        assert [times["batch"] for times in entry["latency"]] == [1, 4]
        assert all(times["samples"] >= 10 for times in entry["latency"])
    assert [(ratio["batch"], ratio["over"], ratio["baseline"]) for ratio in ptq["speed_up"]] == [
        (1, "own_float", "float-1"),
        (1, "teacher", "teacher"),
        (4, "own_float", "float-1"),
        (4, "teacher", "teacher"),
    ]
    assert [bundle["verify"] for bundle in found["bundles"]] == ["passed", "missing"]
    assert found["environment"]["cpu"]
    assert found["backend"]["onnxruntime"]
    assert not any("No PTQ row" in note for note in found["notes"])
    assert any("faqd-deploy ptq" in note for note in record(folders["student"])["notes"])


def test_accuracy_is_that_of_the_student_file(folders: dict[str, Path]) -> None:
    bundle = load_bundle(folders["ptq"])
    data = bundle.evaluation()
    assert data.labels is not None
    session = OnnxSession(bundle.path(STUDENT_ONNXRUNTIME))
    guess = session.run({"input": PREPROCESS.normalise(data.images)})["logits"].argmax(1)
    student = record(folders["ptq"], options=Options(skip_latency=True))["networks"][1]
    assert student["accuracy"]["top1"]["count"] == int((guess == data.labels).sum())


def test_the_file_for_engines_is_judged_beside_the_one_that_is_timed(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", engine_noise=1.5)
    found = record(tmp_path / "b", options=replace(QUICK, gates=Gates(min_agreement=0.9, max_p99_ms=1e6)))
    assert complaint(found) is None
    student = found["networks"][1]
    beside = student["engine_file"]
    assert [network["file"] for network in found["networks"]] == [TEACHER, STUDENT_ONNXRUNTIME, FLOAT_STUDENT]
    bundle = load_bundle(tmp_path / "b")
    data = bundle.evaluation()
    scores = OnnxSession(bundle.path(STUDENT_TENSORRT), optimise=False).run(
        {"input": PREPROCESS.normalise(data.images)}
    )["logits"]
    assert beside["file"] == STUDENT_TENSORRT and beside["metric"] is None
    assert beside["accuracy"]["top1"]["count"] == int((scores.argmax(1) == data.labels).sum())
    assert beside["accuracy"]["fidelity"]["least"] < student["accuracy"]["fidelity"]["least"]
    gates = [(gate["file"], gate["measure"], gate["passed"]) for gate in found["gates"]]
    assert gates == [
        (STUDENT_ONNXRUNTIME, "agreement", True),
        (STUDENT_TENSORRT, "agreement", False),
        (STUDENT_ONNXRUNTIME, "p99_ms", True),
    ], "what is not timed has no latency to judge"
    text = printed(found)
    assert f"{STUDENT_ONNXRUNTIME}, run here: proof passed; kept: fidelity 0.99" in text
    assert f"{STUDENT_TENSORRT}, for engines, as written: proof passed; ruined: fidelity" in text


def test_what_the_proof_has_counted_is_in_the_record(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", engine_noise=0.02)
    counted = {"codes": 1000, "differing": 2, "largest_difference": 1}
    layers = [{"plain": counted, "optimised": counted}, {"plain": {"relative_error": 0.0}}, {}]
    verdict = {"passed": True, "every_cpu": True, "cpu_kinds": []}
    options = Options(skip_latency=True)
    write_verify(bundle, flavours={"tensorrt": {**verdict, "layers": layers}, "onnxruntime": verdict})
    proofs = record(tmp_path / "b", options=options)["bundles"][0]["proofs"]
    nothing = dict.fromkeys(counted)
    assert proofs == {
        STUDENT_TENSORRT: {"status": "passed", "codes": 2000, "differing": 4, "largest_difference": 1},
        STUDENT_ONNXRUNTIME: {"status": "passed", **nothing},
    }
    for damage in ([{"plain": {"codes": "many"}}], [3], "none", [{"plain": 7}]):
        write_verify(bundle, flavours={"tensorrt": {**verdict, "layers": damage}, "onnxruntime": verdict})
        proofs = record(tmp_path / "b", options=options)["bundles"][0]["proofs"]
        assert proofs[STUDENT_TENSORRT] == {"status": "passed", **nothing}


def test_equal_float_graphs_are_timed_once(folders: dict[str, Path], tmp_path: Path) -> None:
    make_bundle(tmp_path / "again", "twin")
    networks = record(folders["student"], tmp_path / "again")["networks"]
    assert [entry["id"] for entry in networks] == ["teacher", "student-0", "float-0", "student-1"]
    assert networks[3]["own_float"] == "float-0"


def test_a_bundle_whose_verify_speaks_of_another_file(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", verify=False)
    options = Options(skip_latency=True)
    assert record(tmp_path / "b", options=options)["bundles"][0]["verify"] == "failed"
    write_verify(load_bundle(tmp_path / "b"), onnx_sha256={"student.onnxruntime.onnx": "0"})
    assert record(tmp_path / "b", options=options)["bundles"][0]["verify"] == "stale"


def test_label_free_and_dense_bundles(folders: dict[str, Path]) -> None:
    student = record(folders["labelless"])["networks"][1]["accuracy"]
    assert student["top1"] is None
    assert student["agreement"]["value"] > 0.9
    student = record(folders["dense"])["networks"][1]["accuracy"]
    assert student["agreement"] is None
    assert student["snr_db"]["map"] > 10


def test_the_command_prints_a_table_of_at_most_100_columns(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundles = [folders["student"], folders["ptq"]]
    quick = ["--duration", "0.05", "--rounds", "2", "--batch", "1,2", "--backend", "onnxruntime"]
    code = call(monkeypatch, *bundles, *quick, "--json", tmp_path / "r.json", "--report", tmp_path / "r.html")
    out = capsys.readouterr().out
    assert code == 0
    assert max(map(len, out.splitlines())) <= 100
    assert "\x1b" not in out
    assert all(word in out for word in ("tiny teacher", "tiny 8/8", "tiny PTQ", "distilled", "unquantized"))
    assert "tiny PTQ, PTQ" in out, "in tables without a kind the name says it"
    found = json.loads((tmp_path / "r.json").read_text())
    assert f"{100 * found['networks'][1]['accuracy']['top1']['value']:.1f}" in out
    assert found["command"][:2] == ["faqd-bench", str(bundles[0])]
    assert found["switches"]["batch"] == [1, 2]
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


def printed(result: dict[str, Any]) -> str:
    """What the terminal shows of it, in one line."""
    console = console_for(io.StringIO())
    print_result(result, console)
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


def test_what_stays_float_is_told_and_whether_int8_is_worth_it(tmp_path: Path) -> None:
    make_bundle(tmp_path / "most", "most", islands=ISLANDS, int8_share=0.8123)
    make_bundle(tmp_path / "few", "few", kind="ptq", islands=ISLANDS, int8_share=0.4)
    make_bundle(tmp_path / "all", "all", islands=[], int8_share=1.0)
    make_bundle(tmp_path / "old", "old")
    folders = [tmp_path / name for name in ("most", "few", "all", "old")]
    found = record(*folders, options=Options(skip_latency=True))
    most, few, whole, old = found["bundles"]
    assert (most["islands"], most["int8_share"], most["worth_int8"]) == (ISLANDS, 0.8123, True)
    assert (few["islands"], few["int8_share"], few["worth_int8"]) == (ISLANDS, 0.4, False)
    assert (whole["islands"], whole["int8_share"], whole["worth_int8"]) == ([], 1.0, True)
    assert old.keys().isdisjoint({"islands", "int8_share", "worth_int8"})
    assert complaint(found) is None
    text = printed(found)
    said = (
        "old, proof and what is kept of its teacher: student.onnxruntime.onnx, run here: proof passed; kept: fidelity"
    )
    assert said in text
    kinds = "2 float islands, the first at norm (net.py:12): matmul (2 times), LayerNorm, softmax"
    assert f"most: {kinds}; 81.2 % of the multiply-accumulates run in INT8. few, PTQ: {kinds}; 40.0 %" in text
    assert text.count("INT8 is not worth it here") == 1
    assert "operators in float of most, few, PTQ" in text, "two that are equal in this share a table"
    assert "1 norm (LayerNorm) net.py:12 2 attend (matmul), weigh (softmax), attend_1 (matmul)" in text
    assert "All multiply-accumulates in INT8: all." in text
    assert text.count("old:") == 0


def test_of_many_islands_the_terminal_shows_the_first(tmp_path: Path) -> None:
    islands = [{"operators": {f"norm{index}": "LayerNorm"}, "line": f" (net.py:{index})"} for index in range(25)]
    make_bundle(tmp_path / "b", islands=islands, int8_share=0.9)
    text = printed(record(tmp_path / "b", options=Options(skip_latency=True)))
    assert "norm9 (LayerNorm) net.py:9" in text and "norm10" not in text
    assert "… 15 more" in text


def test_layers_that_were_kept_float_are_no_islands(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", islands=[], int8_share=0.3)
    text = printed(record(tmp_path / "b", options=Options(skip_latency=True)))
    assert "tiny 8/8: 30.0 % of the multiply-accumulates run in INT8: INT8 is not worth it here." in text
    assert "float island" not in text and "All multiply-accumulates" not in text


def test_json_on_standard_output_is_alone_there(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, folders["student"], "--skip-latency", "--json", "-") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["networks"][1]["latency"] == []
    assert "tiny 8/8" in captured.err


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--min-agreement", "0.5", "--min-accuracy-ratio", "0.5"), 0, ""),
        (("--min-agreement", "1"), 1, "tiny PTQ, student.onnxruntime.onnx: agreement"),
        (("--min-accuracy-ratio", "0.999"), 1, "tiny PTQ, student.onnxruntime.onnx: accuracy ratio"),
        (("--min-agreement", "2"), 2, "min-agreement"),
        (("--batch", "1,x"), 2, "no list of batch sizes"),
        (("--batch", "0"), 2, "no list of batch sizes"),
    ],
)
def test_gates_and_usage(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    target = tmp_path / "r.json"
    assert call(monkeypatch, folders["ptq"], "--skip-latency", "--json", target, *options) == code
    assert said in capsys.readouterr().err
    assert target.is_file() == (code < 2), "a gate speaks after everything is written"


def test_bundles_that_cannot_be_compared(folders: dict[str, Path], tmp_path: Path) -> None:
    make_bundle(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match=r"their eval\.npz differ"):
        record(folders["student"], tmp_path / "other")
    with pytest.raises(UserError, match="use --min-agreement"):
        record(folders["labelless"], options=Options(gates=Gates(min_accuracy_ratio=0.9)))
    with pytest.raises(UserError, match="need an output of shape"):
        record(folders["dense"], options=Options(gates=Gates(min_agreement=0.9)))


def test_what_is_no_bundle_ends_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, tmp_path) == 2
    assert "not a bundle" in capsys.readouterr().err
    make_bundle(tmp_path / "b")
    with (tmp_path / "b" / STUDENT_ONNXRUNTIME).open("ab") as stream:
        stream.write(b"x")
    assert call(monkeypatch, tmp_path / "b") == 2
    assert "changed since" in capsys.readouterr().err


def test_help_needs_neither_onnxruntime_nor_torch() -> None:
    block = "import sys; sys.modules.update(dict.fromkeys(['onnxruntime', 'onnx', 'torch', 'tensorrt']));"
    program = f"{block} sys.argv = ['faqd-bench', '--help']; from faqd.benchmarks.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ}, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--min-accuracy-ratio" in done.stdout


@pytest.mark.parametrize("key", ["teacher", "preprocess", "input", "size", "name"])
def test_a_manifest_that_lacks_something_is_a_sentence(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str,
) -> None:
    folder = Path(shutil.copytree(folders["student"], tmp_path / "copy"))
    manifest = json.loads((folder / "manifest.json").read_text())
    damaged = {**manifest, "teacher": {}} if key == "name" else {k: v for k, v in manifest.items() if k != key}
    (folder / "manifest.json").write_text(json.dumps(damaged))
    assert call(monkeypatch, folder, "--skip-latency", "--backend", "onnxruntime") == 2
    error = capsys.readouterr().err
    assert "manifest.json: damaged, " in error and key in error and "export the run again" in error
    manifest["files"]["eval.npz"] = {}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert call(monkeypatch, folder) == 2
    assert "manifest.json: damaged, files/eval.npz/sha256 is missing" in capsys.readouterr().err
