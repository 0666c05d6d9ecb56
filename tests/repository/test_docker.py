"""The Dockerfiles as far as they can be read without docker: what they copy is there, what they install exists."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from pathlib import Path

import click
import pytest

from faqd.cli import cli

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
KNOWN = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENTRYPOINT", "CMD"}


def instructions(path: Path) -> list[tuple[str, str]]:
    """(word, the rest) of each, with continued lines joined."""
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def test_there_are_two() -> None:
    assert [path.name for path in FILES] == ["cpu.Dockerfile", "jetson.Dockerfile"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_copied_is_there_and_not_ignored(path: Path) -> None:
    stages: list[str] = []
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    for word, rest in instructions(path):
        assert word in KNOWN, f"{word}: a typing error, or new to this test"
        if word == "FROM":
            stages.append(rest.partition(" AS ")[2])
        if word == "COPY":
            flags = [part for part in rest.split() if part.startswith("--")]
            *sources, _ = [part for part in rest.split() if not part.startswith("--")]
            if flags:
                assert flags == [f"--from={stages[0]}"] and stages[0]
            else:
                assert sources and all((ROOT / source).exists() and source in sent for source in sources), sources
    assert len(stages) == 2
    # What the wheel is made of, by setup.cfg.
    copied = " ".join(rest for word, rest in instructions(path) if word == "COPY")
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = [setup["metadata"]["long_description"].removeprefix("file: "), setup["metadata"]["license_files"]]
    assert all(name in copied.split() for name in ("setup.cfg", "pyproject.toml", "faqd", *named))


@pytest.mark.parametrize(
    ("name", "wanted", "never"), [("cpu", "train,onnx", "torchvision"), ("jetson", "device", "train")]
)
def test_extras_exist_and_a_board_gets_no_torch(name: str, wanted: str, never: str) -> None:
    path = ROOT / "docker" / f"{name}.Dockerfile"
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    (extras,) = (
        found for word, rest in instructions(path) if word == "RUN" for found in re.findall(r"\.whl\)\[(.*?)\]", rest)
    )
    assert extras == wanted and never not in extras
    assert all(setup.has_option("options.extras_require", extra) for extra in extras.split(","))
    if name == "jetson":
        assert "torch" not in setup["options.extras_require"]["device"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_commands_exist(path: Path) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    found = dict(instructions(path))
    (entry,) = json.loads(found["ENTRYPOINT"])
    assert f"{entry} = " in setup["options.entry_points"]["console_scripts"]
    text = path.read_text("utf-8")
    shown = [
        re.sub(r"^.*?(?:faqd(?:-jetson)?) ", "", line)
        for line in text.splitlines()
        if line.startswith("#   docker run")
    ]
    for arguments in (json.loads(found["CMD"]), *map(shlex.split, shown)):
        command: click.Command = cli
        for word in arguments:
            if word.startswith("-"):
                break
            assert isinstance(command, click.Group) and word in command.commands, arguments
            command = command.commands[word]
    built = [line for line in text.splitlines() if line.startswith("#   docker build")]
    assert len(built) == 1 and f"-f docker/{path.name} " in built[0]
