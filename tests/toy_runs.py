"""What tests of the training part share: the command line in this process, and the files a user would bring."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from faqd.command import run
from faqd.deploy.cli import cli as deploy_cli
from faqd.train.cli import cli as train_cli

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, channels=3, classes=10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
        )
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def build():
    return Net()
"""
"""A user's net.py."""
PLAIN = ("--mean", "none", "--std", "none")


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str


def faqd_train(*arguments: object) -> Outcome:
    return outcome_of(train_cli, arguments)


def faqd_deploy(*arguments: object) -> Outcome:
    return outcome_of(deploy_cli, arguments)


def succeeds(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.stderr
    return outcome


def outcome_of(command: object, arguments: tuple[object, ...]) -> Outcome:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run(command, [str(argument) for argument in arguments])  # type: ignore[arg-type]
        except SystemExit as end:
            code = int(end.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def write_images(folder: Path, count: int = 120, pixels: int = 8) -> Path:
    """A folder of digits as colour PNG files."""
    folder.mkdir(parents=True)
    for index, image in enumerate(load_digits().images[:count]):
        grey = np.rint(image * 255 / 16).astype(np.uint8)
        Image.fromarray(grey).resize((pixels, pixels)).convert("RGB").save(folder / f"{index:04d}.png")
    return folder


def write_net(folder: Path, code: str = NET) -> Path:
    """net.py with `code`, and beside it best.pth with the weights of its network as built."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "net.py"
    path.write_text(code)
    names: dict[str, object] = {}
    exec(compile(code, str(path), "exec"), names)
    torch.manual_seed(0)
    torch.save(names["build"]().state_dict(), folder / "best.pth")  # type: ignore[operator]
    return path


def everything_in(folder: Path) -> dict[str, bytes]:
    """The files below `folder`, hidden ones too, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class User:
    """A folder with net.py, best.pth and images, as the README has it."""

    folder: Path

    def distill(self, out: Path, *more: object) -> Outcome:
        """The README's distill command with few iterations; options in `more` override what stands before."""
        return faqd_train("distill", *self.teacher, *self.data, "--batch-size", 16, "--steps", 8, "--out", out, *more)

    @property
    def teacher(self) -> tuple[object, ...]:
        return "--teacher", f"{self.folder / 'net.py'}:build", "--teacher-weights", self.folder / "best.pth"

    @property
    def data(self) -> tuple[object, ...]:
        return "--data", f"folder:{self.folder / 'images'}", *PLAIN


def new_user(folder: Path) -> User:
    write_net(folder)
    write_images(folder / "images")
    return User(folder)
