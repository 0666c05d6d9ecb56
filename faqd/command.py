"""What the three command lines share: where a UserError becomes one sentence and an exit code."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import click

from faqd import __version__
from faqd.errors import INTERRUPTED, TERMINATED, Paused, UserError
from faqd.extras import EXTRA_OF, install
from faqd.files import refuse_unwritable, write_json
from faqd.notice import told

_DISK_FULL = "no space left on the disk{where}: free some, then run the same command again, a training with --resume."
_FORBIDDEN = "not permitted to write or read{where}: choose another folder."
_NO_FOLDER = "a file stands where a folder is needed{where}: choose another place."
_OF_THE_SYSTEM = {
    errno.ENOSPC: _DISK_FULL,
    errno.EDQUOT: _DISK_FULL,
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: _FORBIDDEN,
    errno.ENOTDIR: _NO_FOLDER,
    errno.EEXIST: _NO_FOLDER,
    errno.EISDIR: "a folder stands where a file is needed{where}: choose another name.",
    errno.EFBIG: "a file would be larger than this shell (ulimit -f) or file system allows{where}: raise the "
    "limit, then run the same command again, a training with --resume.",
    errno.ENAMETOOLONG: "too long a file name{where}: choose a shorter one.",
}


SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}
"""Of every command line: what click calls its context settings."""
ARGUMENTS = "faqd.arguments"
"""Where a click context keeps what stands behind the command's name."""
OTHERS = "Options"
"""The heading of options that are in no section; they come last."""


class Command(click.Command):
    """A command whose help has its options in sections; in a list of commands its first sentence stands whole. It knows
    its own arguments, whoever has called it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx) if isinstance(option, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(option, "section", OTHERS), []).append(record)
        for heading in sorted(sections, key=lambda heading: heading == OTHERS):
            with formatter.section(heading):
                formatter.write_dl(sections[heading])

    def get_short_help_str(self, limit: int = 45) -> str:
        return _first_sentence(self.help)


class Group(click.Group):
    """Several of them under one name."""

    command_class = Command

    def get_short_help_str(self, limit: int = 45) -> str:
        return _first_sentence(self.help)


def _first_sentence(text: str | None) -> str:
    first = (text or "").strip().split("\n\n")[0].split(". ")[0]
    return f"{' '.join(first.split()).removesuffix('.')}."


def flags(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one, in this order."""

    def added(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return added


def section(heading: str, *options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one, in this order, under a heading of the command's help."""

    def under(option: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def added(command: Any) -> Any:
            command = option(command)
            command.__click_params__[-1].section = heading
            return command

        return added

    return flags(*map(under, options))


def run(command: click.Command, arguments: Sequence[str] | None = None) -> None:
    """Run a click command on `arguments`, by default those of the process.

    Bad input ends in a sentence on stderr and the documented exit code.

    docs/commands.md has the codes in a table.
    """
    wait_briefly()
    with _terminated_like_interrupted(), ending_in_a_sentence(), told(lambda text: click.echo(text, err=True)):
        # Without standalone mode click returns the code of an Exit instead of leaving with it.
        sys.exit(command.main(arguments, standalone_mode=False))


def wait_briefly() -> None:
    """Let the threads of torch's OpenMP runtime sleep soon where they wait for each other, if the user has not said how
    they wait. To be called before torch is loaded: it reads the environment once.

    By default they spin for long, with which two processes on the same cores take each other's time; sleeping at once
    costs a single process more than spinning shortly. faqd.benchmarks.studies.waiting measures it.
    """
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


SPINS = 1000


@contextmanager
def ending_in_a_sentence() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        _fail(str(error), error.exit_code)
    except Paused as pause:
        click.echo(str(pause), err=True)
        sys.exit(0)
    except (KeyboardInterrupt, click.exceptions.Abort):
        _fail("interrupted.", INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        extra = EXTRA_OF.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        _fail(f"this command needs {error.name}, which is not installed: {install(extra)}", 2)
    except MemoryError as error:
        _fail(f"not enough memory{f' ({error})' if str(error) else ''}: give smaller images, or fewer at once.", 2)
    except OSError as error:
        if error.errno not in _OF_THE_SYSTEM:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _fail(_OF_THE_SYSTEM[error.errno].format(where=where), 2)


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM, what a batch system or a container sends, cleans up as Ctrl-C does; by default nothing would. The exit
    code is then the one that a shell has for it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    terminated = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except SystemExit as end:
        if terminated and end.code == INTERRUPTED:
            end.code = TERMINATED
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, code: int) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


def emit_json(target: str | None, value: Any) -> None:
    """Write `value` where `--json` says: a file, or `-` for standard output."""
    if target == "-":
        click.echo(json.dumps(value, indent=2, allow_nan=False))
    elif target is not None:
        write_json(Path(target), value)


def writable(context: click.Context, option: click.Parameter, value: Any) -> Any:
    """For options that name a file to write: what cannot be written is said before the work, not after it."""
    if value is not None and str(value) != "-":
        refuse_unwritable(Path(value))
    return value


json_option = click.option(
    "--json",
    "json_target",
    metavar="FILE",
    callback=writable,
    type=click.Path(dir_okay=False, allow_dash=True),
    help="Write the result as JSON to FILE, or to standard output for '-'.",
)


exclude_option = click.option(
    "--exclude",
    multiple=True,
    metavar="REGEX",
    help="Keep layers and operators float whose module path this fits; may be given several times.",
)
target_option = click.option(
    "--target",
    type=click.Choice(["tensorrt", "onnxruntime"]),
    default="tensorrt",
    help="Quantize 8-bit activations to the range of this runtime: 0..127, or 0..255.",
)
attention_option = click.option(
    "--attention",
    type=click.Choice(["float", "int8"]),
    show_default="float",
    help="Multiply activations by activations in this: queries by keys, and probabilities by values.",
)
strict_option = click.option(
    "--strict",
    is_flag=True,
    default=None,
    help="Refuse an operator without an integer form, instead of keeping it float.",
)


class Finite(click.FloatRange):
    """A number within bounds; nan and inf, which pass click's comparisons, are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def _versions() -> str:
    """What a report of a fault needs, without importing any of it."""
    found = [f"Python {platform.python_version()}"]
    for package in ("torch", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx"):
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    return ", ".join(found)


def _say_versions(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        click.echo(f"faqd {__version__}\n{_versions()}")
        context.exit()


version_option = click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_say_versions,
    help="Show the version, and those of what it works with.",
)
