"""What a build shows while it lasts, and what Ctrl-C leaves of it: nothing. Really built with TensorRT-RTX."""

from __future__ import annotations

import importlib.util
import io
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from faqd.bundle import STUDENT_TENSORRT, write_manifest
from faqd.deploy.engine.build import engine_from_onnx
from faqd.deploy.engine.options import BuildOptions
from faqd.deploy.engine.progress import Phase, Watch, interruptible, watched
from faqd.deploy.engine.trt import TensorRT
from tests.fixtures.qdq_network import residual_network, written
from tests.fixtures.tiny_bundles import facts_of

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed (pip install 'faqd[rtx]'): nothing here can build an engine",
)

COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell may start us with the signal ignored.
from faqd.deploy.cli import main
main()
"""


@needs_rtx
def test_a_log_gets_a_line_for_each_step(tmp_path: Path) -> None:
    said: list[str] = []
    onnx = written(residual_network(), tmp_path / "net.onnx")
    engine_from_onnx(onnx, tmp_path / "net.engine", BuildOptions(), said.append)
    steps = [line for line in said if line.startswith("net.engine: Building engine: ")]
    assert len(steps) >= 3
    assert steps[0].startswith("net.engine: Building engine: 1 of ")
    assert said.index(steps[0]) > next(index for index, line in enumerate(said) if "tensorrt_rtx --onnx=" in line)


def test_a_terminal_gets_bars_that_go_again() -> None:
    written_to = io.StringIO()
    console = Console(file=written_to, force_terminal=True, width=100)
    said: list[str] = []
    with watched("net.engine", said.append, console) as watch:
        outer, inner = Phase("Building engine", None, 6), Phase("Timing", "Building engine", 40)
        watch.start(outer)
        watch.start(inner)
        inner.done = 17
        watch.step(inner)
        watch._progress.refresh()  # type: ignore[attr-defined]
        shown = written_to.getvalue()
        watch.finish(inner)
        watch.finish(outer)
    assert "Building engine" in shown and "17/40" in shown
    assert said == []


def test_an_error_of_the_build_comes_out_of_its_thread() -> None:
    def broken() -> None:
        raise OSError("the screen is gone")

    trt = TensorRT("tensorrt", SimpleNamespace(IProgressMonitor=object))
    with pytest.raises(OSError, match="the screen is gone"):
        interruptible(trt, SimpleNamespace(), Watch(), broken)


@needs_rtx
def test_ctrl_c_ends_the_build_and_leaves_nothing(tmp_path: Path) -> None:
    written(residual_network(further_blocks=40), tmp_path / STUDENT_TENSORRT)
    write_manifest(tmp_path, facts_of("deep 8/8"), {STUDENT_TENSORRT: "0" * 64})
    before = {path.name for path in tmp_path.iterdir()}
    command = [sys.executable, "-c", COMMAND, "build-engine", str(tmp_path)]
    said = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as build:
        assert build.stderr is not None
        for line in build.stderr:
            said.append(line.rstrip())
            if "Building engine: 1 of" in line:
                build.send_signal(signal.SIGINT)
    assert build.returncode == 130
    assert said[-1] == "error: interrupted."
    assert not any("in INT8" in line for line in said), "it was built to the end"
    assert {path.name for path in tmp_path.iterdir()} == before
