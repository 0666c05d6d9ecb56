"""The numbered examples run as they stand, and show what they say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faqd.benchmarks.measure.user_metric import load_metric
from faqd.train.networks.source import user_function
from tests.fixtures.toy_runs import faqd_train, new_user, succeeds
from tests.repository.test_walls import ROOT

EXAMPLES = ROOT / "examples"


def printed(example: str, *arguments: Path) -> list[str]:
    line = [sys.executable, "-W", "error", str(EXAMPLES / example), *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def numbers(line: str) -> list[float]:
    return [float(word.strip(",")) for word in line.split() if word.startswith("0.")]


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """What the first example prints, and its bundle."""
    bundle = tmp_path_factory.mktemp("example") / "bundle"
    return printed("01_own_loop.py", bundle), bundle


def test_a_loop_of_ones_own(loop: tuple[list[str], Path]) -> None:
    *_, accuracies, proved = loop[0]
    teacher, untrained, distilled = numbers(accuracies)
    assert untrained < distilled - 0.05 and distilled > teacher - 0.02
    assert "proved; onnxruntime 0.9" in proved


def test_several_processes(tmp_path: Path) -> None:
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line = [*runner, str(EXAMPLES / "02_data_parallel.py"), str(tmp_path / "bundle")]
    for attempt in range(3):
        line[-1] = str(tmp_path / f"bundle{attempt}")
        done = subprocess.run(
            line, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        # In one run of some forty a process of torch's dies so on leaving, after all work is done.
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    assert "one student: True" in done.stdout and "proved" in done.stdout


def test_a_detector(tmp_path: Path) -> None:
    *_, taps, figures, proved = printed("03_detector.py", tmp_path / "bundle")
    teacher, untrained, distilled = numbers(figures)
    assert "body" in taps and teacher > 0.9 and untrained < distilled and distilled > teacher - 0.05
    assert "proved; onnxruntime 0." in proved


def test_a_measure_of_ones_own() -> None:
    spec = f"{EXAMPLES / '04_own_metric.py'}:"
    scores = np.array([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    found = {"teacher": {"logits": np.eye(3)}, "labels": np.array([1, 1, 1])}
    metric = load_metric(f"{spec}metric").function
    assert metric({"logits": scores}, found)["among the first two"] == pytest.approx(2 / 3)
    del found["labels"]
    assert user_function(f"{spec}select", "--select")({"logits": scores}, found) == pytest.approx(2 / 3)


def test_a_bundle_without_faqd(loop: tuple[list[str], Path], tmp_path: Path) -> None:
    (line,) = printed("05_bundle_without_faqd.py", loop[1])
    assert "397 images, 9" in line and line.endswith("% as the float network answers")
    picture = np.load(loop[1] / "eval.npz")["images"][0, ..., 0]
    Image.fromarray(picture).save(tmp_path / "a.png")
    (answer,) = printed("05_bundle_without_faqd.py", loop[1], tmp_path / "a.png")
    assert answer.startswith(f"{tmp_path / 'a.png'}: ") and answer[-1].isdigit()
    code = (EXAMPLES / "05_bundle_without_faqd.py").read_text("utf-8")
    assert not re.search(r"^(import|from) faqd", code, re.MULTILINE)


def test_pictures(tmp_path: Path) -> None:
    *_, apart, names = printed("06_pictures.py", tmp_path / "pictures")
    untrained, distilled = numbers(apart)
    assert distilled < untrained and names == "pictures: affinity.png, loss.png, maps.png"
    for name in ("affinity.png", "loss.png", "maps.png"):
        assert np.asarray(Image.open(tmp_path / "pictures" / name)).std() > 10


def test_a_sweep_of_jobs(tmp_path: Path) -> None:
    """Two at a time, one of them killed; started again, it is the folder that one command writes."""
    user, out = new_user(tmp_path / "user"), tmp_path / "runs"
    options = [*map(str, (*user.teacher, *user.data)), "--batch-size", "16", "--steps", "8"]
    setting = {"WEIGHTS": "2 4", "ACTIVATIONS": "4", "SEEDS": "0 1", "OUT": str(out)}
    setting |= {"FAQD_TRAIN": f"{sys.executable} -m faqd.train", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment, script = {**os.environ, **setting}, str(EXAMPLES / "08_sweep.sh")

    def started(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([script, *arguments], capture_output=True, text=True, env=environment)

    assert started("count").stdout == "4\n"
    none = started("4", *options)
    assert none.returncode == 2 and "error: cell 4: there are 4" in none.stderr
    with subprocess.Popen([script, "2", *options], env=environment, stderr=subprocess.DEVNULL) as crashing:
        while not (out / "w4a4-s0" / "run.json").is_file() and crashing.poll() is None:
            time.sleep(0.01)
        crashing.kill()
    assert crashing.returncode == -9 and not (out / "w4a4-s0" / "weights.safetensors").exists()
    assert started("0", *options).returncode == 0
    finished = (out / "w2a4-s0" / "weights.safetensors").stat()
    line = ["xargs", "-P", "2", "-I", "N", script, "N", *options]
    swept = subprocess.run(line, input="0\n1\n2\n3\n", capture_output=True, text=True, env=environment)
    assert swept.returncode == 0 and "w2a4-s0: this run is finished" in swept.stderr, swept.stderr
    assert (out / "w2a4-s0" / "weights.safetensors").stat() == finished
    lists = ("--weight-bits", "2,4", "--act-bits", 4, "--seeds", 2)
    succeeds(user.distill(tmp_path / "one", *lists))
    for run in sorted((tmp_path / "one").iterdir()):
        for name in ("weights.safetensors", "run.json"):
            assert (out / run.name / name).read_bytes() == (run / name).read_bytes()
    assert succeeds(user.distill(out, *lists, "--resume")).stderr.count("this run is finished") == 4
    assert succeeds(faqd_train("eval", out)).stdout.count("w4a4-s") == 2


HEADERS = ("/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu", "/usr/local/cuda/include")
"""Where packages put those of TensorRT and CUDA; FAQD_INCLUDE names other folders, with colons between."""


def test_the_engine_in_cpp_compiles(tmp_path: Path) -> None:
    folders = [Path(folder) for folder in (*os.environ.get("FAQD_INCLUDE", "").split(":"), *HEADERS) if folder]
    found = {name for name in ("NvInfer.h", "cuda_runtime_api.h") for folder in folders if (folder / name).is_file()}
    if len(found) < 2 or shutil.which("g++") is None:
        pytest.skip("no g++, or no headers of TensorRT and CUDA (FAQD_INCLUDE)")
    line = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-deprecated-declarations", "-fsyntax-only"]
    line += [str(EXAMPLES / "07_engine.cpp"), *(f"-isystem{folder}" for folder in folders)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
