"""What the three command lines share: where a UserError becomes one sentence and an exit code."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from faqd import __version__
from faqd.errors import UserError
from faqd.files import write_json

EXTRA_OF = {
    "torch": "train",
    "safetensors": "train",
    "PIL": "train",
    "sklearn": "train",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnx_ir": "onnx",
    "onnxruntime": "onnx",
    "cuda": "device",
}
INTERRUPTED = 130


def run(command: click.Command) -> None:
    """Run a click command; bad input ends in a sentence on stderr and the documented exit code.

    0 done; 1 a gate, a verification or a build failed; 2 bad input or usage; 130 interrupted.
    """
    with ending_in_a_sentence():
        command(standalone_mode=False)


@contextmanager
def ending_in_a_sentence() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        _fail(str(error), error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.exceptions.Abort):
        _fail("interrupted.", INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        extra = EXTRA_OF.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        _fail(f"this command needs {error.name}, which is not installed: pip install 'faqd[{extra}]'", 2)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _fail(f"no space left on the disk{_where(error)}: free some and run the same command again.", 2)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            _fail(f"not permitted to write or read{_where(error)}: choose another folder.", 2)
        raise


def _where(error: OSError) -> str:
    return f" ({error.filename})" if error.filename else ""


def _fail(message: str, code: int) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


def emit_json(target: str | None, value: Any) -> None:
    """Write `value` where `--json` says: a file, or `-` for standard output."""
    if target == "-":
        click.echo(json.dumps(value, indent=2, allow_nan=False))
    elif target is not None:
        write_json(Path(target), value)


json_option = click.option(
    "--json",
    "json_target",
    metavar="FILE",
    help="Write the result as JSON to FILE, or to standard output for '-'.",
)
version_option = click.version_option(__version__, prog_name="faqd")
