"""What was typed behind a command, and of that what would do nothing: an option without effect is refused, for whoever
gave it believes that it has one."""

from __future__ import annotations

from collections.abc import Iterable

import click
from click.core import ParameterSource

from faqd.command import ARGUMENTS
from faqd.errors import UserError


def arguments_given() -> list[str]:
    """Within a command, what stands behind its name: behind `faqd-bench`, or `faqd bench`."""
    found: list[str] = click.get_current_context().meta[ARGUMENTS]
    return found


def options_given() -> list[str]:
    """Within a command, the options that stand on its line, by their first spelling."""
    context = click.get_current_context()
    return [
        option.opts[0]
        for option in context.command.params
        if isinstance(option, click.Option)
        and context.get_parameter_source(str(option.name)) == ParameterSource.COMMANDLINE
    ]


def refuse_idle(idle: Iterable[str], why: str) -> None:
    """UserError where one of these options was given. why: it does nothing, as a sentence without its end."""
    if found := [option for option in options_given() if option in set(idle)]:
        raise UserError(f"{', '.join(found)}: {why}; leave {'it' if len(found) == 1 else 'them'} out.")


def refuse_all_but(good: Iterable[str], why: str) -> None:
    """The same for every option that is not among these."""
    refuse_idle(set(options_given()) - set(good), why)
