"""Where the commands begin: nothing is imported yet, so that Ctrl-C ends in a sentence while that goes on, too."""

from __future__ import annotations

import sys
from importlib import import_module

from faqd.errors import INTERRUPTED


def umbrella() -> None:
    begin("faqd.cli")


def train() -> None:
    begin("faqd.train.cli")


def deploy() -> None:
    begin("faqd.deploy.cli")


def bench() -> None:
    begin("faqd.benchmarks.cli")


def begin(module: str) -> None:
    """Import the command line `module` and run its `main`."""
    try:
        main = import_module(module).main
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted.\n")
        sys.exit(INTERRUPTED)
    main()
