"""What --help shows: options in sections, defaults that are true, whole sentences in lists of commands."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from faqd.benchmarks.cli import bench_command
from faqd.deploy.cli import cli as deploy_cli
from faqd.train.cli import cli as train_cli
from faqd.train.recipes import DistillRecipe, TeacherRecipe, distill_recipe, teacher_recipe

GROUPS = {"faqd-train": train_cli, "faqd-deploy": deploy_cli}
COMMANDS = {
    "faqd-bench": bench_command,
    **{f"{tool} {name}": command for tool, group in GROUPS.items() for name, command in group.commands.items()},
}
LEFT_OPEN = {
    "teacher": {"--resize", "--views"},
    "distill": {
        "--arch",
        "--init",
        "--logit",
        "--adaptors",
        "--feature-layer",
        "--batch-size",
        "--views",
        "--lr",
        "--optimizer",
        "--resize",
    },
}
"""What the recipe leaves to the data, the network or the start, of which help has words."""


def options(command: click.Command) -> list[click.Option]:
    return [parameter for parameter in command.params if isinstance(parameter, click.Option)]


@pytest.mark.parametrize("tool", GROUPS)
def test_a_list_of_commands_cuts_no_sentence(tool: str) -> None:
    listed = CliRunner().invoke(GROUPS[tool], ["--help"], prog_name=tool).output.partition("Commands:")[2]
    words = " ".join(listed.split())
    assert "..." not in listed and all(f"{name} " in words for name in GROUPS[tool].commands)
    assert words.count(".") >= len(GROUPS[tool].commands)


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if len(options(command)) > 10])
def test_many_options_are_in_sections(name: str) -> None:
    lost = [option.opts[0] for option in options(COMMANDS[name]) if not hasattr(option, "section")]
    assert set(lost) <= {"--version"}
    tool, *below = name.split()
    shown = CliRunner().invoke(GROUPS.get(tool, bench_command), [*below, "--help"], prog_name=tool).output
    assert shown.index("\nOutput:") < shown.index("\nOptions:")
    assert all(option.opts[0] in shown for option in options(COMMANDS[name]))


def test_a_default_is_shown_wherever_there_is_one() -> None:
    for name, command in COMMANDS.items():
        context = click.Context(command, info_name=name, show_default=True)
        for option in options(command):
            if option.default in (None, False, ()) or option.required or option.is_flag:
                continue
            record = option.get_help_record(context)
            assert record is None or repr(option.default).startswith("Sentinel") or "[default: " in record[1], option


@pytest.mark.parametrize(
    ("name", "recipe"), [("teacher", teacher_recipe("digits-teacher")), ("distill", distill_recipe("default"))]
)
def test_defaults_in_parentheses_are_those_of_the_recipe(name: str, recipe: TeacherRecipe | DistillRecipe) -> None:
    fields = vars(recipe.training) | vars(recipe)
    said = {o.opts[0]: (o.show_default, str(fields.get(str(o.name)))) for o in options(train_cli.commands[name])}
    stated = {flag: pair for flag, pair in said.items() if isinstance(pair[0], str) and flag not in LEFT_OPEN[name]}
    assert len(stated) > 3 and all(shown == value for shown, value in stated.values()), stated
