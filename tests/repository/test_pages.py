"""The pages: links lead somewhere, every command is listed with what its JSON holds, every exit code is one."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from faqd import errors
from faqd.benchmarks.cli import bench_command
from faqd.deploy.cli import cli as deploy_cli
from faqd.train.cli import cli as train_cli
from tests.repository.test_walls import ROOT

PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), ROOT / "results" / "README.md"])
COMMANDS = (ROOT / "docs" / "commands.md").read_text("utf-8")


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page if not name else page.parent / name
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            dead.append(target)
    assert not dead


def test_every_command_is_listed_and_its_json_described() -> None:
    listed, described = COMMANDS.split("## Where output goes")
    for tool, group in (("faqd-train", train_cli), ("faqd-deploy", deploy_cli)):
        for name, command in group.commands.items():
            assert f"`{tool} {name}`" in listed or f", `{name}`" in listed, name
            if any(isinstance(option, click.Option) and "--json" in option.opts for option in command.params):
                assert f"`{name}`" in described or name == "recipes", name
    assert "`faqd-bench`" in listed


def test_the_table_has_the_exit_codes() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", COMMANDS, re.MULTILINE)}
    assert codes == {0, 1, 2, errors.INTERRUPTED, errors.TERMINATED}


LINES = re.compile(
    r"`(?P<tool>faqd-train|faqd-deploy|faqd-bench|faqd train|faqd deploy|faqd bench)(?P<rest>[ \w./{}<>=,:|-]*)`"
)
TOOLS = {"train": train_cli, "deploy": deploy_cli, "bench": bench_command}


def command_lines() -> list[tuple[str, str, str]]:
    """(file, tool, what follows) of everything in backticks that begins as a command of ours, in pages and messages."""
    sources = [*PAGES, *sorted((ROOT / "faqd").rglob("*.py")), *sorted((ROOT / "faqd").rglob("*.html"))]
    return [
        (str(path.relative_to(ROOT)), found["tool"][5:], found["rest"])
        for path in sources
        for found in LINES.finditer(re.sub(r'"\s*\n\s*f?"', "", path.read_text("utf-8")))
    ]


def test_commands_that_pages_and_messages_name_exist() -> None:
    lines, wrong = command_lines(), []
    assert len(lines) > 60
    for path, tool, rest in lines:
        command, words = TOOLS[tool], rest.replace("`", " ").split()
        if isinstance(command, click.Group):
            if not words or words[0].startswith(("-", "{")):
                continue
            named = [name for name in words[0].split("|") if name not in command.commands]
            if named:
                wrong.append(f"{path}: {tool} {rest}")
                continue
            command = command.commands[words[0].split("|")[0]]
        known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--version"}
        wrong += [f"{path}: {tool} {rest}" for word in words if word.startswith("--") and word not in known]
    assert not wrong
