"""A command that is interrupted while it imports ends as one that is interrupted later."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = "import sys; sys.path.insert(0, {folder!r}); from faqd.entry import begin; begin('slow')"


@pytest.mark.parametrize(
    ("module", "code", "said"),
    [
        ("raise KeyboardInterrupt", 130, "error: interrupted.\n"),
        (
            "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time\ntime.sleep(9)",
            130,
            "error: interrupted.\n",
        ),
        ("def main(): print('begun')", 0, ""),
    ],
)
def test_what_an_interrupted_import_ends_in(module: str, code: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(module, encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-c", CODE.format(folder=str(tmp_path))], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (code, said)


@pytest.mark.parametrize("package", ["faqd", "faqd.train", "faqd.deploy", "faqd.benchmarks"])
def test_every_command_begins(package: str) -> None:
    ended = subprocess.run([sys.executable, "-m", package, "--help"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and "Usage: " in ended.stdout and ended.stderr == ""
