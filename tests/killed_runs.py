"""Run commands of faqd-train that send themselves a signal: `python killed_runs.py < cases.json`.

A case: {when, signal, every_s (seconds between checkpoints), line, said (a file for stderr)}. `when` is
["iteration", n], ["write", part of a path, how often], ["removal", part of a path] or ["conclude"]. Prints the exit
codes, negative for a signal.
Every command is a process of its own, forked, so that torch is loaded once for all of them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from faqd.command import run
from faqd.train import distill
from faqd.train.cli import cli
from faqd.train.loop import fit as loop
from faqd.train.loop.batches import Batch
from faqd.train.loop.trainee import Trainee

Kill = Callable[[], None]


def at_iteration(kill: Kill, wanted: int) -> None:
    plain = Trainee.step

    def step(trainee: Trainee, batch: Batch, total: int) -> None:
        if trainee.iteration == wanted:
            kill()
        plain(trainee, batch, total)

    Trainee.step = step  # type: ignore[method-assign,assignment]


def in_a_write(kill: Kill, part: str, times: int) -> None:
    plain, seen = Path.write_bytes, 0

    def write_bytes(path: Path, data: Any) -> int:
        nonlocal seen
        seen += part in str(path)
        if seen == times and part in str(path):
            plain(path, data[: len(data) // 2])
            kill()
        return plain(path, data)

    Path.write_bytes = write_bytes  # type: ignore[method-assign,assignment]


def in_a_removal(kill: Kill, part: str) -> None:
    plain = shutil.rmtree

    def rmtree(path: Path) -> None:
        if part in str(path):
            next(path.iterdir()).unlink()
            kill()
        plain(path)

    vars(shutil)["rmtree"] = rmtree


def before_the_results(kill: Kill) -> None:
    vars(distill)["conclude"] = lambda *arguments: kill()


WHEN: dict[str, Callable[..., None]] = {
    "iteration": at_iteration,
    "write": in_a_write,
    "removal": in_a_removal,
    "conclude": before_the_results,
}


def start(case: dict[str, Any]) -> int:
    """Run a case in a child; its exit code."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(case["said"], os.O_WRONLY | os.O_CREAT), 2)
        loop.CHECKPOINT_EVERY_S = case["every_s"]
        # A shell starts what runs in its background with SIGINT ignored, and that is inherited.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        number = signal.Signals[case["signal"]]
        WHEN[case["when"][0]](lambda: os.kill(os.getpid(), number), *case["when"][1:])
        run(cli, case["line"])
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    # Loads what torch loads with the first optimizer.
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    print(json.dumps([start(case) for case in json.load(sys.stdin)]))  # noqa: T201
