"""The commands of the README work as they stand there, in the order in which they stand there."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
MINUTES = 15

# Setting up is what .ci/run does, in an environment of its own.
SET_UP = re.compile(r"(make|git clone|cd faqd|pip install|python3? -m venv|(source|\.) \S*activate)\b")


def bash_blocks(text: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    """The lines of a block, continued lines in one, without those that set up."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not SET_UP.match(line.strip())]


def readme() -> str:
    if not README.is_file():
        pytest.skip("there is no README.md")
    return README.read_text(encoding="utf-8")


def run(lines: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run lines in one shell that stops at the first failure and says which line that was."""
    script = folder / "readme.sh"
    script.write_text("\n".join(["set -euxo pipefail", *lines]) + "\n", encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(script)],
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60 * MINUTES,
    )


NET_PY = """\
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
"""


def lay_out_a_users_files(folder: Path) -> None:
    """net.py, best.pth and images/, which the README's reader already has; the pictures are digits in colour."""
    (folder / "net.py").write_text(NET_PY, encoding="utf-8")
    (folder / "images").mkdir()
    pictures = load_digits().images[:400].repeat(4, 1).repeat(4, 2) / 16
    colours = np.random.default_rng(0).uniform(0.4, 1, (len(pictures), 1, 1, 3))
    pixels = np.round(255 * pictures[..., None] * colours).astype(np.uint8)
    for index, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / "images" / f"{index:03}.png")
    torch.manual_seed(0)
    network = runpy.run_path(str(folder / "net.py"))["build"]()
    network.train()(torch.from_numpy((pixels.transpose(0, 3, 1, 2) / 255 - 0.45) / 0.225).float())
    torch.save(network.state_dict(), folder / "best.pth")


def test_the_commands_of_the_readme_work(tmp_path: Path) -> None:
    lines = [line for block in bash_blocks(readme()) for line in commands(block)]
    assert lines, "README.md has no ```bash block"
    lay_out_a_users_files(tmp_path)
    result = run(lines, tmp_path)
    assert result.returncode == 0, result.stdout[-6000:]


def test_files_that_the_readme_points_to_are_there() -> None:
    targets = re.findall(r"\]\(([^)#\s]+)|(?:src|srcset|href)=\"([^\"#]+)\"", readme())
    local = [target for pair in targets for target in pair if target and "://" not in target]
    assert not [target for target in local if not (ROOT / target).exists()]


def make_targets() -> list[str]:
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return re.findall(r"^make (\S+)", text, flags=re.MULTILINE)


def test_make_has_what_its_help_and_the_pages_name() -> None:
    targets = make_targets()
    assert {"demo", "test", "check", "wheel"} <= set(targets)
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, check=True)
    pages = [path.read_text(encoding="utf-8") for path in (README, ROOT / "CONTRIBUTING.md") if path.is_file()]
    named = re.findall(r"(?:^ {4}|`)make ([a-z-]+)", "\n".join(pages), flags=re.MULTILINE)
    assert set(named) <= set(targets)


SAMPLE = """\
```bash
git clone ADDRESS faqd
cd faqd
make demo        # set-up
```
```text
false
```
```bash
made=$(printf '%s' 7)
echo "$made" \\
  > file
```
Then:
```bash
test "$made" = "$(cat file)"  # the same shell, the same folder
```
"""


def test_blocks_run_in_one_shell_and_set_up_is_left_out(tmp_path: Path) -> None:
    blocks = [commands(block) for block in bash_blocks(SAMPLE)]
    assert [len(block) for block in blocks] == [0, 2, 1]
    assert run([line for block in blocks for line in block], tmp_path).returncode == 0


@pytest.mark.parametrize("line", ["false", "false | cat", "echo $nothing", "cat missing"])
def test_a_failing_line_ends_the_run(line: str, tmp_path: Path) -> None:
    result = run([line, "touch reached"], tmp_path)
    assert result.returncode != 0
    assert not (tmp_path / "reached").exists()
